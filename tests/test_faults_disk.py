"""Disks that are full or cannot be written, clocks, and folders in use: what is told, and what is kept."""

import resource
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from fault_commands import at_step, equal

from resa_hf.checkpoints import checkpoints, newest_whole
from resa_hf.commands import single_stage
from resa_hf.evaluation.engine import Completion, Sampling
from resa_hf.evaluation.store import Store
from resa_hf.experiment.folder import alone_in
from resa_hf.experiment.prepare import read_rows, save_rows
from resa_hf.tuning.teacher_cache import TeacherCache, row_key
from resa_hf.writing import WritingError

pytest_plugins = ("fault_commands",)

NAMES = {"stage1": "Stage I", "stage2": "Stage II"}


@pytest.mark.parametrize("stage", ["stage1", pytest.param("stage2", marks=pytest.mark.long)])
def test_the_disk_is_full_while_a_checkpoint_is_written(commands, undisturbed, disk, fault, stage):
    disk.resize(undisturbed.room(commands, stage, 1.5))
    out = disk.folder / "out"
    told = commands.fails(stage, out)
    assert f"{out / 'checkpoint-4'} cannot be written: " in told and "0.0 MB are free there" in told
    assert newest_whole(out) == out / "checkpoint-2" and not any((out / ".unfinished").iterdir())
    disk.resize("64m")
    assert equal(commands.ends(stage, out), undisturbed.weights(commands, stage))
    fault(f"full disk while a checkpoint is written in {NAMES[stage]}", told=told,
          kept="checkpoint-2; the half of checkpoint-4 is removed; with room it ends with the same bits")  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_disk_is_full_when_the_result_is_saved(commands, undisturbed, disk, fault, stage):
    disk.resize(undisturbed.room(commands, stage, 2, 0.5))
    out = disk.folder / "out"
    told = commands.fails(stage, out)
    assert str(out) in told and "cannot be written: No space left on device" in told, told
    assert newest_whole(out) == out / "checkpoint-4" and not (out / "report.json").exists()
    disk.resize("64m")
    assert equal(commands.ends(stage, out), undisturbed.weights(commands, stage))
    fault(f"full disk while the result of {NAMES[stage]} is saved", told=told,
          kept="checkpoint-4; with room it ends with the same bits")  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_disk_is_full_while_the_report_is_written(commands, undisturbed, disk, fault, stage, monkeypatch):
    disk.resize("64m")
    out, usual = disk.folder / "out", single_stage.versions
    monkeypatch.setattr(single_stage, "versions", lambda: disk.fill() or usual())
    told = commands.fails(stage, out)
    assert f"{out / 'report.json'} cannot be written: No space left on device (0.0 MB" in told
    assert not [path for path in out.iterdir() if "report.json" in path.name]
    monkeypatch.undo()
    (disk.folder / "ballast").unlink()
    assert equal(commands.ends(stage, out), undisturbed.weights(commands, stage))
    fault(f"full disk while report.json of {NAMES[stage]} is written", told=told,
          kept="the result and checkpoint-4; no half of a report; with room the same bits and a report")  # fmt: skip


def test_the_disk_is_full_at_the_start(commands, disk, fault):
    out = disk.folder / "out"
    out.mkdir()
    disk.fill()
    told = commands.fails("stage1", out)
    assert "cannot be written: No space left on device" in told and not checkpoints(out)
    fault("full disk when a run is started", told=told, kept="nothing was begun")


@pytest.mark.long
def test_a_file_is_larger_than_is_allowed(commands, undisturbed, tmp_path, fault):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        told = commands.fails("stage1", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{tmp_path / 'out/checkpoint-2'} cannot be written" in told
    assert not checkpoints(tmp_path / "out")
    assert equal(commands.ends("stage1", tmp_path / "out"), undisturbed.weights(commands, "stage1"))
    fault("file larger than ulimit -f allows", told=told, kept="the folder, for the same command")


def test_the_disk_is_full_while_completions_are_kept(disk, fault):
    path, prompts, sampling = disk.folder / "answers.jsonl", ["one", "two"], Sampling()
    store = Store(path, {"engine": "tiny"}, prompts, sampling)
    first, second = Completion("1" * 20_000, 1, False, (1,)), Completion("2" * 90_000, 1, False, (2,))
    store.add({(0, 0): first})
    with pytest.raises(WritingError, match=r"answers.jsonl cannot be written: No space left on device") as raised:
        store.add({(1, 0): second})
    disk.resize("1m")
    again = Store(path, {"engine": "tiny"}, prompts, sampling)
    assert again.done == {(0, 0): first}
    again.add({(1, 0): second})
    assert Store(path, {"engine": "tiny"}, prompts, sampling).answers() == [[first], [second]]
    fault("full disk while completions are appended", told=raised.value,
          kept="the answers before; the line that was cut off is dropped and answered again")  # fmt: skip


def test_the_disk_fills_up_before_the_teacher_cache_has_its_room(disk, fault, monkeypatch):
    found = [SimpleNamespace(free=10**9)]  # a moment ago
    usual = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: found.pop() if found else usual(path))
    state, row = torch.randn(1, 3, 100_000), [1, 2, 3]
    with pytest.raises(WritingError, match=r"teacher-.*\.bin cannot be written: No space left on device") as raised:
        TeacherCache(disk.folder, "x", [row], [state])
    disk.resize("8m")
    cache = TeacherCache(disk.folder, "x", [row], [state])
    cache.write([row_key(row)], [state])
    assert torch.equal(cache.read([row_key(row)], 3)[0], state)
    fault("full disk while the teacher cache is made", told=raised.value,
          kept="the run's checkpoints; with room the cache is made, and read as it was written")  # fmt: skip


def test_the_disk_is_full_while_packed_data_is_saved(disk, fault):
    rows = Dataset.from_dict({"input_ids": [list(range(1000))] * 30})
    path = disk.folder / "data" / "train"
    with pytest.raises(WritingError, match=r"data/train cannot be written: ") as raised:
        save_rows(rows, path)
    disk.resize("8m")
    save_rows(rows, path)
    assert read_rows(path)["input_ids"][29] == list(range(1000))
    fault("full disk while packed data is saved", told=raised.value, kept="nothing was begun; with room it is saved")


def test_the_output_folder_is_read_only(commands, disk, fault):
    disk.protect()
    for out in (disk.folder, disk.folder / "out"):
        told = commands.fails("stage1", out)
        assert f"The output folder {out} cannot be written: Read-only file system." in told
    fault("read-only output folder", told=told, kept="nothing was begun: told before anything is loaded")


@pytest.mark.long
def test_the_output_folder_becomes_read_only_in_mid_run(commands, undisturbed, disk, fault, monkeypatch):
    disk.resize("64m")
    out = disk.folder / "out"
    with at_step(monkeypatch, 3, disk.protect):
        told = commands.fails("stage1", out)
    assert "checkpoint-4/" in told and "cannot be written: Read-only file system" in told
    disk.unprotect()
    assert newest_whole(out) == out / "checkpoint-2"
    assert equal(commands.ends("stage1", out), undisturbed.weights(commands, "stage1"))
    fault("output folder becomes read-only in mid-run", told=told,
          kept="checkpoint-2; writable again it ends with the same bits")  # fmt: skip


@pytest.mark.long
def test_the_output_folder_is_deleted_in_mid_run(commands, undisturbed, tmp_path, fault, monkeypatch):
    out = tmp_path / "out"
    with at_step(monkeypatch, 3, lambda: shutil.rmtree(out)):
        found = commands.ends("stage1", out)
    assert equal(found, undisturbed.weights(commands, "stage1"))
    assert [path.name for path in checkpoints(out)] == ["checkpoint-4"]
    fault("output folder deleted in mid-run", told=f"nothing; {commands.printed.strip().splitlines()[-1]}",
          kept="what is written from then on: checkpoint-4, SAE and report, with the same bits")  # fmt: skip


def test_the_output_folder_cannot_be_made(commands, tmp_path, fault):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    deep = tmp_path.joinpath(*["d" * 200] * 22)
    for what, out, reason in (
        ("output folder that is a file", tmp_path / "file", "it is there, and no folder"),
        ("output folder inside a file", tmp_path / "file" / "out", "Not a directory"),
        ("output folder that is a loop of links", tmp_path / "loop", "it is there, and no folder"),
        ("output folder behind a loop of links", tmp_path / "loop" / "out", "Too many levels of symbolic links"),
        ("name of 300 bytes as output folder", tmp_path / ("n" * 300), "File name too long"),
        ("path of more than 4,096 bytes as output folder", deep, "File name too long"),
    ):
        told = commands.fails("stage1", out)
        assert told == f"resa-hf train-sae: The output folder {out} cannot be written: {reason}."
        fault(what, told=told.replace("n" * 300, "nnn...").replace("d" * 200, "ddd..."), kept="nothing was begun")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.long
def test_the_clock_is_set_back(commands, undisturbed, disk, tmp_path, fault, monkeypatch):
    """Between two starts, and in the middle of each; files are then younger than now."""
    disk.resize(undisturbed.room(commands, "stage1", 1.5))
    out, usual = disk.folder / "out", time.time
    clock = SimpleNamespace(back=0.0)
    monkeypatch.setattr(time, "time", lambda: usual() - clock.back)
    with at_step(monkeypatch, 3, lambda: vars(clock).update(back=clock.back + 86_400)):
        commands.fails("stage1", out)  # for want of room
        disk.resize("64m")
        clock.back += 30 * 86_400
        assert newest_whole(out) == out / "checkpoint-2"
        found = commands.ends("stage1", out)
    assert clock.back == 32 * 86_400 and equal(found, undisturbed.weights(commands, "stage1"))
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2", "checkpoint-4"]
    fault("clock set back, in mid-run and between two starts", told="nothing, and nothing goes by it",
          kept="all checkpoints; it ends with the same bits")  # fmt: skip


def test_two_runs_in_one_folder(commands, undisturbed, tmp_path, fault):
    with alone_in(tmp_path / "out"):
        told = commands.fails("stage1", tmp_path / "out")
    assert f"Another command is at work in {tmp_path / 'out'}" in told
    assert equal(commands.ends("stage1", tmp_path / "out"), undisturbed.weights(commands, "stage1"))
    fault("two runs in one folder", told=told, kept="the first run, untouched; the second starts once it has ended")
