"""Files that change, are cut or are replaced while a run reads them, or between two starts of it."""

import faulthandler
import json
import os
import shutil
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fault_commands import STEPS, at_step, equal
from sae_reference import config, rows
from safetensors.torch import load_file, save_file

from resa_hf.checkpoints import newest_whole
from resa_hf.data import load_qa
from resa_hf.errors import DataError
from resa_hf.evaluation.engine import Completion, Sampling
from resa_hf.evaluation.store import Store
from resa_hf.experiment.arms import Arm
from resa_hf.experiment.folder import RunFolder
from resa_hf.experiment.pipeline import run_experiment
from resa_hf.experiment.prepare import prepare, read_rows, save_rows
from resa_hf.experiment.settings import RunArguments, RunSettings
from resa_hf.experiment.stages import train_from_last_checkpoint
from resa_hf.on_disk import Numbering
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.checkpoint import save_sae
from resa_hf.sae.trainer import SAETrainer
from resa_hf.tiny import tiny_path

pytest_plugins = ("fault_commands",)


class Stopped(OSError):
    """Ends a run in its middle, as a user's Ctrl-C would."""


def stop():
    raise Stopped("stopped after a checkpoint")


@pytest.fixture
def stopped(commands, tmp_path, monkeypatch):
    """Starts a stage, and stops it behind its first checkpoint; returns the folder."""

    def start(stage, *flags):
        with at_step(monkeypatch, 3, stop):
            assert "stopped after" in commands.fails(stage, tmp_path / "out", *flags)
        assert newest_whole(tmp_path / "out") == tmp_path / "out" / "checkpoint-2"
        return tmp_path / "out"

    return start


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 - 7])


def as_parquet(path):
    table = pa.Table.from_pylist([json.loads(line) for line in path.read_text().splitlines()])
    pq.write_table(table, path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_dataset_is_cut_in_mid_run(commands, undisturbed, tmp_path, fault, monkeypatch, kind):
    path = commands.rows if kind == "jsonl" else as_parquet(commands.rows)
    expected, whole, flags = undisturbed.weights(commands, "stage1"), path.read_bytes(), ("--dataset", str(path))
    with at_step(monkeypatch, 3, lambda: cut(path)):
        found = commands.ends("stage1", tmp_path / "out", *flags)
    assert equal(found, expected)
    told = commands.fails("stage1", tmp_path / "again", *flags)
    assert str(path) in told and ("is not JSON" in told if kind == "jsonl" else "cannot be read" in told)
    path.write_bytes(whole)
    assert equal(commands.ends("stage1", tmp_path / "again", *flags), found)
    fault(f".{kind} dataset cut in mid-run", told=f"at the next start: {told}",
          kept="the run itself, which reads a copy: the same bits")  # fmt: skip


@pytest.mark.long
def test_the_dataset_is_cut_while_it_is_read(tmp_path, fault, monkeypatch):
    path, usual = tmp_path / "long.jsonl", Numbering.__call__
    lines = [f'{{"problem": "{number:06}", "answer": "1"}}\n' for number in range(20_000)]
    path.write_text("".join(lines))

    def cut_then(self, text):
        os.truncate(path, 15_000 * len(lines[0]) - 7)
        return usual(self, text)

    monkeypatch.setattr(Numbering, "__call__", cut_then)
    with pytest.raises(DataError, match=rf"Line 15000 of {path} is not JSON") as raised:
        load_qa(path)
    path.write_text("".join(lines))
    monkeypatch.undo()
    assert load_qa(path)[1].kept == 20_000
    fault("dataset cut while it is read", told=raised.value, kept="nothing was begun: whole again it is read")


@pytest.mark.long
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_dataset_changes_between_two_starts(commands, undisturbed, stopped, fault, stage):
    out, text = stopped(stage), commands.rows.read_text()
    commands.rows.write_text(text.replace('"antwort": "1"', '"antwort": "2"'))
    told = commands.fails(stage, out)
    assert f"{out} holds a run with other settings (data)" in told
    commands.rows.write_text(text)
    assert equal(commands.ends(stage, out), undisturbed.weights(commands, stage))
    fault("dataset changed between two starts", told=told,
          kept="checkpoint-2; with the old data it ends with the same bits")  # fmt: skip


@pytest.mark.long
def test_packed_data_is_cut_in_mid_run(make_model, tmp_path, fault):
    """A mapped file that is cut ends the process by SIGBUS: nothing can be told then, but at the next start."""
    folder, out = tmp_path / "data" / "train", tmp_path / "out"
    save_rows(rows(20_000), folder)

    def trained(step=None, place=out):
        args = config(place, max_steps=STEPS, save_strategy="steps", save_steps=2, disable_tqdm=True)
        trainer = SAETrainer(make_model("qwen2"), args, read_rows(folder))

        def watch(*_):
            if trainer.state.global_step == step:
                (file,) = folder.glob("*.arrow")
                os.truncate(file, 5000)

        trainer.model.register_forward_pre_hook(watch)
        train_from_last_checkpoint(trainer)
        return {name: value.clone() for name, value in trainer.model.state_dict().items()}

    whole = trained(place=tmp_path / "whole")
    shutil.copytree(folder, tmp_path / "kept")
    child = os.fork()
    if not child:
        faulthandler.disable()
        trained(step=3)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGBUS
    assert newest_whole(out) == out / "checkpoint-2"
    with pytest.raises(DataError, match=rf"The rows in {folder} are missing or damaged") as raised:
        trained()
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "kept", folder)
    assert equal(trained(), whole)
    fault("packed data cut in mid-run", told=f"at once the kernel's `Bus error`; at the next start: {raised.value}",
          kept="checkpoint-2; with the data again the same bits")  # fmt: skip


@pytest.mark.long
def test_the_sae_is_replaced(commands, undisturbed, stopped, tmp_path, fault, monkeypatch):
    def replace(seed):
        save_sae(TopKSAE(128, 256, 8, hookpoint="layers.2", seed=seed), commands.sae)

    shutil.copytree(commands.sae, tmp_path / "kept")
    with at_step(monkeypatch, 3, lambda: replace(7)):
        found = commands.ends("stage2", tmp_path / "through")
    assert equal(found, undisturbed.weights(commands, "stage2"))
    told = commands.fails("stage2", tmp_path / "through")
    assert f"sae: {commands.sae} has changed since the run in {tmp_path / 'through'} was started" in told
    fault("SAE replaced in mid-run", told=f"at the next start: {told}",
          kept="the run itself, which holds the SAE it began with: the same bits")  # fmt: skip
    shutil.rmtree(commands.sae)
    shutil.copytree(tmp_path / "kept", commands.sae)
    out = stopped("stage2")
    replace(7)
    told = commands.fails("stage2", out)
    assert "has changed since the run" in told
    shutil.rmtree(commands.sae)
    shutil.copytree(tmp_path / "kept", commands.sae)
    assert equal(commands.ends("stage2", out), found)
    fault("SAE of the same shape put in its place between two starts", told=told,
          kept="checkpoint-2; with the old SAE it ends with the same bits")  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "role"),
    [("stage1", "base"), *(pytest.param("stage2", role, marks=pytest.mark.long) for role in ("base", "source"))],
)
def test_a_model_is_replaced_between_two_starts(commands, stopped, tmp_path, fault, stage, role):
    copy = tmp_path / "model"
    shutil.copytree(tiny_path("base"), copy)
    flags = ("--model_name_or_path", str(copy))
    if role == "source":
        flags = ("--source_model", str(copy), "--kl_reference", "source")
    out = stopped(stage, *flags)
    weights = next(copy.glob("*.safetensors"))
    whole, tensors = weights.read_bytes(), load_file(weights)
    save_file(
        {name: value + 1e-2 * torch.ones_like(value) for name, value in tensors.items()}, weights, {"format": "pt"}
    )
    told = commands.fails(stage, out, *flags)
    assert f"{role}: {copy} has changed since the run in {out} was started" in told
    weights.write_bytes(whole)
    found = commands.ends(stage, out, *flags)
    assert equal(found, commands.ends(stage, tmp_path / "whole", *flags))
    fault(f"{role} model replaced between two starts of {'Stage I' if stage == 'stage1' else 'Stage II'}", told=told,
          kept="checkpoint-2; with the old weights it ends with the same bits")  # fmt: skip


def run_settings(commands, folder, **models):
    run = RunArguments(
        dataset=str(commands.rows), question_column="frage", answer_column="antwort", held_out=8, template="chat",
        pack=False, dtype="float32", output_dir=str(folder), **models,
    )  # fmt: skip
    return RunSettings(run, {"hookpoints": ["layers.1"]}, {"max_length": 64}, Sampling(), [Arm("a")])


@pytest.mark.parametrize("role", ["base", "source", "sae"])
def test_a_model_or_sae_is_replaced_between_two_starts_of_a_run(commands, tmp_path, fault, role):
    copy = tmp_path / "copy"
    shutil.copytree(commands.sae if role == "sae" else tiny_path("base"), copy)
    named = {"base": "model_name_or_path", "source": "source_model", "sae": "sae"}[role]
    settings = run_settings(
        commands, tmp_path / "run", **{"model_name_or_path": "resa_hf/tiny/base", named: str(copy)}
    )
    whole = commands.rows.read_text()
    cut(commands.rows)
    with pytest.raises(DataError, match="is not JSON"):  # a first start that comes no further
        run_experiment(RunFolder(tmp_path / "run"), settings)
    commands.rows.write_text(whole)
    weights = next(copy.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DataError, match=f"{role}: {copy} has changed since the run in") as raised:
        run_experiment(RunFolder(tmp_path / "run"), settings)
    fault(f"{role} of `resa-hf run` replaced between two starts", told=raised.value, kept="all that was finished")


DAMAGED = ("manifest.json", "inputs.json", "checkpoint-2/seconds.json", "report.json")
JUNK = {"brackets": b"[" * 100_000, "empty": b"", "a list": b"[]", "a number": b"3", "nothing": b"null",
        "no UTF-8": b"\xff\xfe\x00", "cut": None}  # fmt: skip


def broken(path, junk):
    kept = path.read_bytes()
    path.write_bytes(kept[: len(kept) // 2] if junk is None else junk)
    return kept


@pytest.mark.parametrize("name", ["settings.json", *(pytest.param(name, marks=pytest.mark.long) for name in DAMAGED)])
def test_a_file_of_a_stage_is_damaged(commands, undisturbed, stopped, fault, name):
    out = stopped("stage1")
    if name == "report.json":
        commands.ends("stage1", out)
    path = out / name
    for what, junk in JUNK.items():
        if (name, what) in (("manifest.json", "a list"), ("checkpoint-2/seconds.json", "cut")):
            continue  # which it may be
        kept = broken(path, junk)
        told = commands.fails("stage1", out)
        assert f"{path} is damaged: " in told and "Delete it, and start the same command again" in told, (what, told)
        path.write_bytes(kept)
    path.unlink()
    assert equal(commands.ends("stage1", out), undisturbed.weights(commands, "stage1"))
    fault(f"{name} cut, empty, of another type or no UTF-8", told=told,
          kept="checkpoint-2; without that file it ends with the same bits")  # fmt: skip


@pytest.mark.parametrize("name", ["data.json", "questions.json"])
def test_a_file_of_a_runs_data_is_damaged(commands, tmp_path, fault, name):
    run = run_settings(commands, tmp_path / "run", model_name_or_path="resa_hf/tiny/base").run
    folder = RunFolder(tmp_path / "run")
    report = prepare(folder, run, 64)
    path = folder.data(name)
    whole = path.read_bytes()
    if name == "data.json":
        for junk in JUNK.values():
            broken(path, junk)
            with pytest.raises(DataError, match=rf"{path} is damaged: .* Delete it") as raised:
                prepare(folder, run, 64)
            path.write_bytes(whole)
        fault("data.json cut, empty, of another type or no UTF-8", told=raised.value,
              kept="the packed data; without that file the same is made again")  # fmt: skip
    path.unlink()
    assert prepare(folder, run, 64) == report and path.read_bytes() == whole


@pytest.mark.parametrize(
    "junk", [b"[]\n", b"3\n", b"null\n", b'{"seconds": 1.0}\n', b'{"seconds": 1.0, "completions": [[0, 0]]}\n',
             b'{"seconds": 1.0, "completions": [[0, 0, {"text": 1}]]}\n', b"\xff\xfe\n"]
)  # fmt: skip
def test_stored_completions_are_damaged(tmp_path, fault, junk):
    path, opened = tmp_path / "completions.jsonl", ({"engine": "tiny"}, ["one"], Sampling())
    answer = Completion("1", 1, False, (1,))
    Store(path, *opened).add({(0, 0): answer})
    whole = path.read_bytes()
    for content, reason in (
        (junk, "is damaged|holds completions of another"),
        (whole + junk, "is damaged, and no store"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{path} ({reason}).*Delete it") as raised:
            Store(path, *opened)
    path.write_bytes(whole)
    assert Store(path, *opened).done == {(0, 0): answer}
    fault("completions.jsonl with a line of another kind", told=raised.value,
          kept="the file, to be mended by hand; without it all is answered again")  # fmt: skip
