"""The memory that `--dry_run` predicts: against weights counted by hand, and against a measured peak."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from resa_hf.arguments import LoraArguments
from resa_hf.cli import main
from resa_hf.commands.memory import (
    activations_size,
    adapter_size,
    cross_entropy_parts,
    model_size,
    stage1_parts,
    stage2_parts,
)
from resa_hf.sae.config import SAETrainingConfig
from resa_hf.tuning.config import SAETuningConfig

ROOT = Path(__file__).parents[1]
WIDTH, INNER, LAYERS, WORDS = 64, 192, 4, 1000
LAYER = 4 * WIDTH**2 + 3 * WIDTH * INNER  # numbers in the linear layers of one
NORMS = 2 * WIDTH


def skeleton(tied=False, kind="llama"):
    config = AutoConfig.for_model(
        kind, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=WORDS, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def stage1(**settings):
    defaults = {"output_dir": "unused", "hookpoints": ["layers.1"], "num_latents": 512, "k": 8, "max_length": 32}
    return SAETrainingConfig(**defaults | settings, use_cpu=True, bf16=False)


def stage2(**settings):
    return SAETuningConfig(
        **{"output_dir": "unused", "max_length": 32, "per_device_train_batch_size": 1} | settings,
        use_cpu=True,
        bf16=False,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_weights_by_hand(tied):
    meta, table = skeleton(tied), WORDS * WIDTH
    head = 0 if tied else table
    linear, rest = LAYERS * LAYER, table + LAYERS * NORMS + WIDTH
    assert model_size(meta, torch.bfloat16) == 2 * (linear + rest + head)
    # Half a byte a number, and a float32 scale for 64 of them.
    assert model_size(meta, torch.bfloat16, in_4bit=True) == linear / 2 + linear / 64 * 4 + 2 * (rest + head)
    assert model_size(meta, torch.float32, depth=2) == 4 * (2 * (LAYER + NORMS) + table + WIDTH)


def test_an_saes_training_and_what_follows():
    meta, args = skeleton(), stage1()
    parts = stage1_parts(meta, torch.float32, args)
    assert parts["source"] == model_size(meta, torch.float32, depth=2)
    # Encoder and decoder; weights, gradients and two buffers.
    assert parts["saes"] == 2 * 512 * WIDTH * 4 * 4
    assert stage1_parts(meta, torch.float32, stage1(hookpoints=["layers.1", "2"]))["saes"] == 2 * parts["saes"]
    after = cross_entropy_parts(meta, torch.float32, args)
    assert after["source"] == model_size(meta, torch.float32)
    assert after["logits"] == 2048 * WORDS * 16


def test_settings_of_stage_2_that_save_memory():
    meta, lora = skeleton(), LoraArguments(lora_r=2)
    known = {"latents": 512, "hookpoint": "layers.1"}
    plain = stage2_parts(meta, torch.float32, lora, stage2(), **known)
    assert plain["sae"] == 2 * 512 * WIDTH * 4 and plain["teacher"] == 0
    assert stage2_parts(meta, torch.float32, lora, stage2(sae_dtype="bfloat16"), **known)["sae"] == plain["sae"] / 2
    taught = stage2_parts(meta, torch.float32, lora, stage2(), **known, teacher=True)
    assert taught["teacher"] == taught["model"] == model_size(meta, torch.float32)
    # With `stop` the layers above the hookpoint keep something alone: 2 of 4.
    stopped = stage2_parts(meta, torch.float32, lora, stage2(sae_gradient="stop"), **known)
    assert stopped["activations"] == plain["activations"] / 2
    checkpointed = stage2(gradient_checkpointing=True)
    states = LAYERS * 32 * WIDTH * 4
    assert activations_size(meta, torch.float32, lora, checkpointed, 32) == states + plain["activations"] / LAYERS


@pytest.mark.parametrize(
    ("optim", "a_number"),
    [("adamw_torch_fused", 16), ("adamw_bnb_8bit", 10), ("paged_adamw_8bit", 8), ("paged_adamw_32bit", 8), ("sgd", 8)],
)
def test_what_an_optimiser_takes_for_each_number_that_it_trains(optim, a_number):
    numbers = LAYERS * 2 * (4 * (WIDTH + WIDTH) + 3 * (WIDTH + INNER))
    assert adapter_size(skeleton(), LoraArguments(lora_r=2), optim) == a_number * numbers


def test_dry_run_tells_it_of_a_run_in_4_bits(tmp_path, capsys):
    AutoConfig.for_model(
        "llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=32_768, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    linear, rest = 16 * (4 * 1024**2 + 3 * 1024 * 4096), 2 * 32_768 * 1024 + 33 * 1024
    flags = ["--model_name_or_path", str(tmp_path), "--dataset", "d", "--dry_run", "--sae", "somewhere"]
    for more, size in (("false", 2 * (linear + rest)), ("true", linear * 0.5625 + 2 * rest)):
        assert main(["tune", *flags, "--load_in_4bit", more]) == 0
        printed = capsys.readouterr().out
        assert f"model {size / 2**30:.2f}" in printed
        assert json.loads(printed[: printed.index("\n\n")])["load_in_4bit"] == (more == "true")


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
@pytest.mark.parametrize(
    "flags",
    [
        ("--stages", "1"),
        ("--stages", "2"),
        ("--stages", "2", "--gradient_checkpointing"),
    ],
)
def test_predicted_is_near_the_measured_peak(flags):
    shape = {"hidden_size": 512, "layers": 4, "intermediate_size": 1024, "vocabulary": 16_000, "hookpoint": 1}
    shape |= {"latents": 16_384, "tokens": 256, "sequences": 8}
    words = [word for name, size in shape.items() for word in (f"--{name}", str(size))]
    command = [sys.executable, "-m", "benchmarks", "memory", *words, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    _, predicted, measured, *_ = [cell.strip() for cell in done.stdout.splitlines()[-1].split("|")][1:]
    assert 0.7 < float(predicted) / float(measured) < 1.3
    assert float(measured) > 0.2
