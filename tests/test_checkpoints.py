"""Checkpoints: whole or not there, the newest whole one is taken, and a resumed run ends as an undisturbed one."""

import hashlib
import json
import os
import random
import shutil

import pytest
import torch
from killed import run_killed
from sae_reference import HOOKPOINTS, config, rows, same
from tuning_reference import make_trainer, moved_adapter, ragged_dataset, tiny_model, tiny_sae

from resa_hf.checkpoints import checkpoints, damage, newest_whole, set_torn_aside
from resa_hf.experiment.stages import train_from_last_checkpoint
from resa_hf.sae.trainer import SAETrainer

STEPS = 6
SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}


def stage1(make_model, folder, **changes):
    """Two SAEs, dead latents and AuxK among them, and a schedule-free average."""
    settings = {"hookpoints": HOOKPOINTS[:2], "auxk_alpha": 0.1, "dead_after_tokens": 100, "max_steps": STEPS}
    return SAETrainer(make_model("qwen2"), config(folder, **settings | SAVING | changes), rows(24))


def stage2(folder, **changes):
    model = moved_adapter(tiny_model(dtype=torch.float32), dropout=0.1, moved=False)
    settings = {"per_device_train_batch_size": 2, "max_steps": STEPS} | SAVING | changes
    return make_trainer(model, folder, sae=tiny_sae(torch.float32), dataset=ragged_dataset(), **settings)


@pytest.fixture
def make_trainers(make_model):
    """By stage what makes a trainer for a folder, and what it ends with."""

    def ends(trainer):
        state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        optimizer = trainer.optimizer.state_dict()["state"]
        averages = {f"{i}/{name}": value for i, part in optimizer.items() for name, value in part.items()}
        progress = trainer.progress.tensors() if isinstance(trainer, SAETrainer) else {}
        return state | {name: torch.as_tensor(value) for name, value in averages.items()} | progress

    return {"stage1": (lambda folder, **kw: stage1(make_model, folder, **kw), ends), "stage2": (stage2, ends)}


def finish(make, ends, folder):
    trainer = make(folder)
    train_from_last_checkpoint(trainer)
    assert trainer.state.global_step == STEPS
    return ends(trainer)


def test_the_list_of_files_is_that_of_the_folder_and_the_oldest_go(make_trainers, tmp_path):
    make, ends = make_trainers["stage1"]
    finish(make, ends, tmp_path)
    # None is written at the last step, where Trainer could not resume.
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    for checkpoint in checkpoints(tmp_path):
        listed = json.loads((checkpoint / "files.json").read_text())
        files = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
        assert listed.keys() == files.keys() - {"files.json", "seconds.json"}
        for name, (size, digest) in listed.items():
            content = files[name].read_bytes()
            assert (size, digest) == (len(content), hashlib.blake2b(content).hexdigest()[:32])
    assert not any((tmp_path / ".unfinished").iterdir())
    finish(lambda folder: make(folder, save_steps=1, save_total_limit=1), ends, tmp_path / "one")
    assert [path.name for path in checkpoints(tmp_path / "one")] == ["checkpoint-5"]


def test_the_best_checkpoint_is_kept_and_named_by_its_place(make_model, tmp_path):
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    # The loss falls, so that the first step has the highest.
    settings = {
        "greater_is_better": True,
        "metric_for_best_model": "eval_loss",
        "learning_rate": 1e-3,
        "save_total_limit": 2,
        "max_steps": 5,
        "save_strategy": "steps",
    }
    trainer = SAETrainer(make_model("qwen2"), config(tmp_path, **every | settings), rows(24), rows(4, seed=6))
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = max(losses, key=losses.get)
    assert best < 4
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{best}", "checkpoint-5"]
    for path in checkpoints(tmp_path):
        state = json.loads((path / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}") and damage(path) is None


KINDS = {
    "stage1": ["layers.1/sae_weights.safetensors", "layers.0/cfg.json", "sae_progress.safetensors"],
    "stage2": ["adapter_model.safetensors", "adapter_config.json"],
}
OF_BOTH = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "files.json"]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_checkpoint_that_is_not_whole_is_told_and_the_one_before_taken(
    make_trainers, tmp_path, stage, capsys, fault
):
    make, ends = make_trainers[stage]
    whole = finish(make, ends, tmp_path / "whole")
    for number, name in enumerate(KINDS[stage] + OF_BOTH):
        for harm in ("missing", "cut", "changed"):
            folder = tmp_path / f"{number}-{harm}"
            shutil.copytree(tmp_path / "whole", folder)
            path = folder / "checkpoint-4" / name
            content = path.read_bytes()
            if harm == "missing":
                path.unlink()
            elif harm == "cut":
                path.write_bytes(content[: len(content) // 2])
            else:
                middle = len(content) // 2
                path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            assert damage(folder / "checkpoint-2") is None
            assert newest_whole(folder) == folder / "checkpoint-2", (name, harm)
            set_torn_aside(folder)
            told = capsys.readouterr().out
            assert "checkpoint-4 is not whole" in told and "torn-checkpoint-4" in told
            # A changed digit of the list itself shows as another file that does not fit it.
            assert name in told or (name == "files.json" and harm == "changed")
            assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"]
            fault(f"file {harm} in a checkpoint of {stage}", told=told, kept="checkpoint-2, which is gone on from")
    resumed = finish(make, ends, folder)
    assert same(resumed, whole)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]


def test_where_no_checkpoint_is_whole_training_starts_again(make_trainers, tmp_path, capsys):
    make, ends = make_trainers["stage2"]
    assert newest_whole(tmp_path / "nowhere") is None
    whole = finish(make, ends, tmp_path)
    for path in checkpoints(tmp_path):
        (path / "optimizer.pt").write_bytes(b"")
    assert same(finish(make, ends, tmp_path), whole)
    assert capsys.readouterr().out.count("optimizer.pt has 0 bytes") == 2


def test_a_resumed_training_is_not_evaluated_at_its_start_again(make_model, tmp_path):
    for _ in range(2):  # the second goes on from the first one's last checkpoint
        trainer = SAETrainer(
            make_model("qwen2"), config(tmp_path, eval_on_start=True, max_steps=STEPS, **SAVING), rows(24), rows(4)
        )
        train_from_last_checkpoint(trainer)
        assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [0]


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_nothing_in_a_checkpoint_is_unpickled(make_trainers, tmp_path, name):
    make, ends = make_trainers["stage2"]
    finish(make, ends, tmp_path / "run")
    path = tmp_path / "run/checkpoint-4" / name
    torch.save({"state": Hostile(tmp_path / "reached")}, path)
    listed = json.loads((path.parent / "files.json").read_text())
    listed[name] = [path.stat().st_size, hashlib.blake2b(path.read_bytes()).hexdigest()[:32]]
    (path.parent / "files.json").write_text(json.dumps(listed))
    with pytest.raises(Exception, match="(?i)weights.only"):
        finish(make, ends, tmp_path / "run")
    assert not (tmp_path / "reached").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_killed_at_a_file_operation_it_ends_with_the_same_bits(make_trainers, tmp_path, stage):
    make, ends = make_trainers[stage]
    killed_at(make, ends, tmp_path, [random.Random(part).uniform(part / 4, (part + 1) / 4) for part in range(4)])


@pytest.mark.long
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_killed_at_any_file_operation_it_ends_with_the_same_bits(make_trainers, tmp_path, stage):
    make, ends = make_trainers[stage]
    killed_at(make, ends, tmp_path, [part / 40 for part in range(40)])


def killed_at(make, ends, folder, shares):
    """Each share of a run's file operations is where it is killed; one checkpoint is kept, at every step."""

    def often(place):
        return make(place, save_steps=1, save_total_limit=1)

    whole = finish(often, ends, folder / "whole")
    operations = run_killed(lambda: finish(often, ends, folder / "counted"), folder / "counted")
    assert operations > 100
    for number, share in enumerate(shares):
        place = folder / f"killed-{number}"
        at = max(1, round(share * operations))
        assert run_killed(lambda place=place: finish(often, ends, place), place, at) is None
        found = checkpoints(place)
        # After the first has stood, one always does.
        assert newest_whole(place) is not None if found else share < 0.3, (at, found)
        assert same(finish(often, ends, place), whole), (at, found)
