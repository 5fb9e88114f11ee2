"""
GRPO in two processes: under DDP what one process gives for the same completions, and under FSDP2, ZeRO-2 and ZeRO-3
what DDP gives, where the processes write answers of different lengths; also where a run was cut and goes on.
"""

import json

import accelerate
import pytest
from distributed_runs import assert_weights_agree, needs_deepspeed, run_jobs
from distributed_worker import train_rl
from packaging.version import Version
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
# The tiny base's embeddings are its LM head.
fsdp2 = pytest.param(
    "fsdp2",
    marks=pytest.mark.skipif(
        Version(accelerate.__version__) < Version("1.15"), reason="tied embeddings under FSDP2 need accelerate 1.15"
    ),
)
BASE = {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 64,
    "max_steps": 3,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "seed": 0,
}
# Scores of random text that differ; plain gradient descent, so that the adapter's difference is that of the gradients.
FIXED = {
    "fixed": True,
    "reward_funcs": ["repetition_penalty"],
    "repetition_ngram": 1,
    "optim": "sgd",
    "learning_rate": 0.02,
    "max_grad_norm": 0.0,
    "save_strategy": "no",
}
SAMPLED = {"fixed": False, "learning_rate": 1e-3, "beta": 0.04, "checkpoints": [1], "save_steps": 1}
ADAPTER = "adapter_model.safetensors"


def log_of(folder):
    """What each step says of its loss and rewards."""
    names = ("loss", "grad_norm", "reward", "reward_std", "kl", "completions/mean_length")
    log = json.loads((folder / "report.json").read_text())["log"]
    return [{name: entry[name] for name in names if name in entry} for entry in log if "loss" in entry]


def assert_agree(folder, expected):
    for ours, others in zip(log_of(folder), log_of(expected), strict=True):
        assert ours == pytest.approx(others, rel=1e-5, abs=1e-5)
    assert_weights_agree(folder, expected, ADAPTER)


def test_two_processes_give_what_one_gives_for_the_same_completions(tmp_path):
    run_jobs("ddp", [("train_rl", tmp_path / "two", {**BASE, **FIXED})])
    train_rl("alone", str(tmp_path / "one"), {**BASE, **FIXED, "per_device_train_batch_size": 16})
    assert_agree(tmp_path / "two", tmp_path / "one")
    assert all(entry["reward_std"] > 0 and entry["grad_norm"] > 0 for entry in log_of(tmp_path / "one"))
    trained = load_file(tmp_path / "one" / ADAPTER)
    assert max(trained[name].abs().max() for name in trained if "lora_B" in name) > 1e-3


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """Three steps under DDP."""
    folder = tmp_path_factory.mktemp("rl") / "ddp"
    run_jobs("ddp", [("train_rl", folder, {**BASE, **SAMPLED})])
    return folder


def test_two_processes_leave_one_result(ddp):
    report = json.loads((ddp / "report.json").read_text())
    assert [entry["step"] for entry in report["log"] if "reward" in entry] == [1, 2, 3]
    assert report["steps"] == {"1": str(ddp / "steps/1")} and report["moved"]["1"]["kl"] > 0
    # The last step's checkpoint is not kept: a run that is finished needs none.
    assert {path.name for path in ddp.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize(
    "kind",
    [
        fsdp2,
        pytest.param("zero2", marks=[needs_deepspeed, pytest.mark.long]),
        pytest.param("zero3", marks=[needs_deepspeed, pytest.mark.long]),
    ],
)
def test_weights_spread_over_processes_give_what_ddp_gives(ddp, kind, tmp_path):
    run_jobs(kind, [("train_rl", tmp_path, {**BASE, **SAMPLED})])
    assert_agree(tmp_path, ddp)
    assert_weights_agree(tmp_path, ddp, f"steps/1/{ADAPTER}")
    lengths = [json.loads((tmp_path / f"lengths-{rank}.json").read_text()) for rank in (0, 1)]
    assert len(lengths[0]) == len(lengths[1]) == 3 and lengths[0] != lengths[1]


@pytest.mark.long
@pytest.mark.parametrize(
    "kind",
    [fsdp2, pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)],
)
def test_from_a_checkpoint_of_spread_weights_it_ends_like_ddp(ddp, kind, tmp_path):
    run_jobs(kind, [("train_rl", tmp_path, {**BASE, **SAMPLED, "max_steps": 2})])
    (tmp_path / "report.json").unlink()
    run_jobs(kind, [("train_rl", tmp_path, {**BASE, **SAMPLED})])
    # The step whose checkpoint is not kept, being the last of the first part, is done again.
    assert len(json.loads((tmp_path / "lengths-0.json").read_text())) == 2
    assert_agree(tmp_path, ddp)
