"""Whole commands with 4-bit models and 8-bit optimisers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_sweep import recipe, write

from resa_hf.cli import main
from resa_hf.commands import single_stage
from resa_hf.experiment import loading, stages
from resa_hf.hookpoints import decoder_layers
from resa_hf.quantization import is_in_4bit
from resa_hf.tuning.trainer import SAETuningTrainer

bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers that a command has trained."""
    found: list[Any] = []
    original = stages.train_from_last_checkpoint

    def train(trainer: Any) -> float:
        found.append(trainer)
        return original(trainer)

    for module in (stages, single_stage):
        monkeypatch.setattr(module, "train_from_last_checkpoint", train)
    return found


OPTIMISERS = pytest.mark.parametrize(
    ("name", "kind", "paged"),
    [("adamw_bnb_8bit", "AdamW", False), ("paged_adamw_8bit", "AdamW", True), ("adamw_8bit", "AdamW", False)],
)


def check_optimiser(trainer: Any, kind: str, paged: bool) -> None:
    """bitsandbytes' own class, with states of one byte where it keeps such: from 4,096 entries on."""
    inner = trainer.optimizer.optimizer
    assert type(inner) is getattr(bnb.optim, kind) and inner.is_paged == paged and inner.args.optim_bits == 8
    states = [(p.numel(), state["state1"].dtype) for p, state in inner.state.items()]
    assert states and all((dtype == torch.uint8) == (size >= 4096) for size, dtype in states)


@pytest.mark.slow
@OPTIMISERS
def test_8_bit_optimisers_reach_stage_2_of_tune(
    tmp_path: Path, trained: list[Any], name: str, kind: str, paged: bool
) -> None:
    flags = {
        "model_name_or_path": "resa_hf/tiny/base", "dataset": "tiny-reasoner", "limit": "40", "held_out": "8",
        "template": "chat", "pack": "false", "max_length": "64", "max_steps": "2", "report_to": "none",
        "dtype": "float32",
        "kl_weight": "0", "sft_weight": "1", "lora_r": "64", "optim": name, "output_dir": str(tmp_path),
    }  # fmt: skip
    assert main(["tune", *(word for key, value in flags.items() for word in (f"--{key}", value))]) == 0
    check_optimiser(trained[0], kind, paged)


@pytest.mark.slow
def test_a_run_in_4_bits_with_a_paged_optimiser(
    tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, Any]] = []
    original = loading.load_causal_lm

    def load(name: str, *args: Any, **kwargs: Any) -> Any:
        loaded.append((name, original(name, *args, **kwargs)))
        return loaded[-1][1]

    monkeypatch.setattr(loading, "load_causal_lm", load)
    # The shipped source is an adapter, so the source here is the base: the teacher of the second arm, too.
    content = recipe(tmp_path / "run", source_model=None, load_in_4bit=True)
    content["lora_r"] = 64
    content["stage2"] |= {"optim": "paged_adamw_8bit", "sae_dtype": "bfloat16"}
    content["arms"] = {
        "SAE-Tuning": {},
        "control - random SAE": {"control": "random_sae"},
        "zero": {"known": "zero_adapter"},
    }
    assert main(["run", "--config", str(write(tmp_path / "recipe.yaml", content))]) == 0
    assert len(loaded) > 4 and all(is_in_4bit(model) for _, model in loaded)
    # Stage I's comes first; then the whole model, for the cross-entropy.
    assert [len(decoder_layers(model)[1]) for _, model in loaded[:2]] == [3, 4]
    for trainer in trained:
        if isinstance(trainer, SAETuningTrainer):
            check_optimiser(trainer, "AdamW", True)
            assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert sum(isinstance(trainer, SAETuningTrainer) for trainer in trained) == 2
    stage1 = json.loads(next((tmp_path / "run").rglob("stage1.json")).read_text())
    assert math.isfinite(stage1["quality"]["eval_ce_recovered/layers.2"])
    for path in (tmp_path / "run").rglob("adapter/adapter_model.safetensors"):
        adapter = load_file(path)
        moved = [float(tensor.abs().max()) for key, tensor in adapter.items() if "lora_B" in key]
        assert (max(moved) > 0) != ("zero" in str(path))
