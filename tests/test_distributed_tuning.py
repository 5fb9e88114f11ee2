"""Stage II in two processes, under DDP, FSDP2, ZeRO-2 and ZeRO-3: what one process gives with the same batches."""

import pytest
import torch
from distributed_runs import assert_logs_agree, assert_weights_agree, needs_deepspeed, run_jobs, told
from distributed_worker import tune
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from tuning_reference import batch_of, tiny_model

from resa_hf import load_reasoning_adapter

LENGTHS, ROWS = [12, 5, 9], 9
# 9 rows: a round of 8 and one of 1, in which the second process has none. Plain gradient descent at a large rate, so
# that the adapter's difference is that of the gradients.
BASE = {"rows": ROWS, "lengths": LENGTHS, "num_train_epochs": 2}
CASES = {
    "flow": {**BASE, "sft_weight": 0.5, "kl_beta": 0.5},
    "stop": {**BASE, "sae_gradient": "stop"},
    "adapted": {**BASE, "kl_reference": "adapted", "control": "low_rank"},
    "source": {**BASE, "kl_reference": "source"},
}
TOKENS = sum(LENGTHS[row % len(LENGTHS)] for row in range(ROWS))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("stage2")
    tiny_model(dtype=torch.float32).save_pretrained(root / "model")
    return root


@pytest.fixture(scope="module")
def alone(root):
    for name, settings in CASES.items():
        model = {"model": str(root / "model"), "per_device_train_batch_size": 8}
        tune("alone", str(root / "alone" / name), {**settings, **model})
    return root / "alone"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "cases"),
    [
        ("ddp", ["flow", "stop", "adapted", "source"]),
        ("fsdp2", ["flow", "stop", "adapted", "source"]),
        pytest.param("zero2", ["flow", "source"], marks=needs_deepspeed),
        pytest.param("zero3", ["flow", "stop", "adapted"], marks=needs_deepspeed),
    ],
)
def test_two_processes_give_what_one_gives(root, alone, kind, cases):
    model = {"model": str(root / "model"), "per_device_train_batch_size": 4}
    run_jobs(kind, [("tune", root / kind / name, {**CASES[name], **model}) for name in cases])
    for name in cases:
        folder = root / kind / name
        assert_logs_agree(folder, alone / name)
        assert_weights_agree(folder, alone / name, "adapter_model.safetensors")
        tokens = [entry["num_tokens"] for entry in told(folder)["log"] if "loss" in entry]
        assert tokens[1] == TOKENS and tokens[3] == 2 * TOKENS and len(tokens) == 4
        _loads_in_one_process(root / "model", folder, alone / name)


@pytest.mark.long
@pytest.mark.parametrize(
    "kind",
    [
        "fsdp2",
        pytest.param("zero2", marks=needs_deepspeed),
        pytest.param("zero3", marks=needs_deepspeed),
    ],
)
def test_from_a_checkpoint_of_spread_weights_it_ends_with_the_same_bits(root, kind):
    settings = {**CASES["flow"], "model": str(root / "model"), "per_device_train_batch_size": 4}
    settings |= {"optim": "adamw_torch", "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 1}
    whole, again = root / kind / "whole", root / kind / "again"
    run_jobs(kind, [("tune", whole, settings)])
    run_jobs(kind, [("tune", again, {**settings, "resume": str(whole / "checkpoint-2")})])
    ours, others = load_file(again / "adapter_model.safetensors"), load_file(whole / "adapter_model.safetensors")
    assert ours.keys() == others.keys() and all(ours[name].equal(others[name]) for name in others)
    # But for Trainer's train_loss, which divides the sum of a part of the steps by the number of all.
    logs = [[entry for entry in told(folder)["log"] if "loss" in entry] for folder in (again, whole)]
    assert [e["loss"] for e in logs[0]] == [e["loss"] for e in logs[1]] and len(logs[0]) == 4
    assert [e["num_tokens"] for e in logs[0]] == [e["num_tokens"] for e in logs[1]]


@torch.no_grad()
def _loads_in_one_process(model, adapter, expected):
    batch = batch_of(padded=False)["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain = base(batch).logits
    ours, others = (
        load_reasoning_adapter(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), str(place))(
            batch
        ).logits
        for place in (adapter, expected)
    )
    torch.testing.assert_close(ours, others, rtol=0, atol=1e-4)
    assert (ours - plain).abs().max() > 1e-3
