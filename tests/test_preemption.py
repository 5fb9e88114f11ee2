"""SIGTERM: a checkpoint after the step, exit code 75, and the same command goes on to the same bits."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from sae_reference import config, rows, same, weights
from safetensors.torch import load_file
from small_sweep import recipe, write
from transformers import TrainerCallback

from resa_hf.checkpoints import checkpoints
from resa_hf.cli import main as resa_hf
from resa_hf.experiment.manifest import code_state, note_start, without_secrets
from resa_hf.experiment.stages import train_from_last_checkpoint
from resa_hf.late_flag import LateFlag
from resa_hf.preempted_training import saved_when_preempted
from resa_hf.preemption import Preempted, check_preemption, handle_preemption, preempting_workers, preemption_handled
from resa_hf.sae.trainer import SAETrainer

ROOT = Path(__file__).parents[1]


class Signal(TrainerCallback):
    """SIGTERM in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def trainer(make_model, folder, *callbacks, **changes):
    return SAETrainer(make_model("qwen2"), config(folder, **changes), rows(24), callbacks=list(callbacks))


def test_training_ends_after_the_step_with_a_checkpoint_and_goes_on_from_it(make_model, tmp_path):
    whole = trainer(make_model, tmp_path / "a")
    train_from_last_checkpoint(whole)
    stopped = trainer(make_model, tmp_path / "b", Signal(3))
    with preemption_handled(), pytest.raises(SystemExit) as caught:
        train_from_last_checkpoint(stopped)
    assert caught.value.code == 75 and stopped.state.global_step == 3
    assert [path.name for path in checkpoints(tmp_path / "b")] == ["checkpoint-3"]
    resumed = trainer(make_model, tmp_path / "b")
    train_from_last_checkpoint(resumed)
    assert resumed.state.global_step == 6
    assert same(weights(resumed), weights(whole))
    assert same(resumed.progress.tensors(), whole.progress.tensors())


def test_between_two_generations_it_is_saved(make_model, tmp_path):
    stopped = trainer(make_model, tmp_path, Signal(1))
    with preemption_handled(), pytest.raises(Preempted):
        train_from_last_checkpoint(stopped, every=4)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4"]


def test_after_the_last_step_the_result_is_saved_first(make_model, tmp_path):
    last = trainer(make_model, tmp_path, Signal(6))
    with preemption_handled():
        train_from_last_checkpoint(last)
        assert last.state.global_step == 6 and not checkpoints(tmp_path)
        with pytest.raises(Preempted):
            check_preemption()


def test_outside_of_training_it_ends_at_once_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with preemption_handled():
        with pytest.raises(Preempted):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Preempted):
            check_preemption()
    assert signal.getsignal(signal.SIGTERM) is before
    check_preemption()  # nothing of it is left


def test_a_forked_helper_dies_of_it_as_ever():
    with preemption_handled():
        child = os.fork()
        if not child:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            finally:
                os._exit(3)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


def test_without_a_handler_training_is_as_it_was(make_model, tmp_path):
    one = trainer(make_model, tmp_path)
    with saved_when_preempted(one):
        one.train()
    assert one.state.global_step == 6 and not checkpoints(tmp_path)


def test_a_flag_is_told_once_and_not_before_it_is_put():
    flag = LateFlag()
    assert flag.take() is False
    flag.put(torch.tensor(True))
    assert (flag.take(), flag.take()) == (True, False)


def wait_long():
    check_preemption()  # as a job does: one that was queued already comes to a worker all the same
    time.sleep(60)


def work_until_signalled(pool):
    try:
        with preempting_workers():
            works = [pool.submit(wait_long) for _ in range(5)]
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGTERM)
            works[0].result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def test_workers_are_told_and_their_queue_is_dropped():
    started = time.monotonic()
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("fork"), handle_preemption)
    with preemption_handled(), pytest.raises(Preempted):
        work_until_signalled(pool)
    assert time.monotonic() - started < 30


def start(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "resa_hf.cli", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ,
    )  # fmt: skip


def stop_when(process, found):
    deadline = time.monotonic() + 240
    while not found():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=240)[0]
    assert process.returncode == 75, told
    return told


def adapters(root):
    return {path.relative_to(root): load_file(path) for path in root.glob("**/adapter/adapter_model.safetensors")}


@pytest.mark.long
@pytest.mark.parametrize(("command", "processes"), [("run", 1), ("run", 2), ("sweep", 1), ("sweep", 2)])
def test_a_command_passes_it_on_to_its_jobs_and_ends_with_its_code(tmp_path, command, processes):
    content = recipe(tmp_path / "parts", processes=processes)
    content["stage2"] |= {"max_steps": 60, "save_strategy": "steps", "save_steps": 10}
    if command == "sweep":
        content["grid"] = {"stage2.learning_rate": [1e-3, 2e-3]}
    path = write(tmp_path / "recipe.yaml", content)
    words = [command, "--config", str(path)]
    process = start(*words)
    # Stage II trains.
    told = stop_when(process, lambda: any((tmp_path / "parts").glob("**/arms/**/checkpoint-10/files.json")))
    assert "stopped by SIGTERM; the same command goes on from here" in told
    assert not any((tmp_path / "parts").glob("**/report.md"))
    assert any((tmp_path / "parts").glob("**/arms/**/run/checkpoint-*/files.json"))
    assert resa_hf(words) == 0
    assert resa_hf([*words, "--output_dir", str(tmp_path / "whole")]) == 0
    found, wanted = adapters(tmp_path / "parts"), adapters(tmp_path / "whole")
    assert found.keys() == wanted.keys() and len(found) == (2 if command == "sweep" else 1)
    assert all(same(found[name], wanted[name]) for name in wanted)
    manifest = next((tmp_path / "parts").glob("**/manifest.json"))
    assert len(json.loads(manifest.read_text())) == 2


def test_the_manifest_tells_each_start(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["resa-hf", "tune", "--hub_token", "hf_secret", "--seed", "3"])
    for rate in (1.0, 2.0):
        note_start(tmp_path, {"learning_rate": rate, "seed": 3}, {"fingerprint": "abc"})
    first, second = json.loads((tmp_path / "manifest.json").read_text())
    assert first["settings"] == {"learning_rate": 1.0, "seed": 3} and second["settings"]["learning_rate"] == 2.0
    assert first["command"] == ["resa-hf", "tune", "--hub_token", "***", "--seed", "3"]
    assert second["data"] == {"fingerprint": "abc"} and second["versions"]["torch"] == torch.__version__
    monkeypatch.setenv("RANK", "1")
    note_start(tmp_path, {})
    assert len(json.loads((tmp_path / "manifest.json").read_text())) == 2


def test_the_commit_is_that_of_git():
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git repository")
    assert code_state()["commit"] == done.stdout.strip()


def test_secrets_of_both_spellings_are_hidden():
    words = ["x", "--hub_token=a", "--push_to_hub_token", "b", "--api_key", "c", "--tokenizer", "d"]
    shown = without_secrets(words)
    assert shown == ["x", "--hub_token=***", "--push_to_hub_token", "***", "--api_key", "***", "--tokenizer", "d"]
