"""Predicted and measured peak memory of both stages, each as real training steps in a fresh process.

    python -m benchmarks memory --preset r1-distill-1.5b --load_in_4bit

Weights are random, in the preset's shapes, and are loaded as `resa-hf` loads them. On CUDA the peak is what torch has
allocated, without the context of about 0.5 GB; on the CPU what the process held above its imports.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from .measure import hardware, in_fresh_process, peak_memory, resident, table
from .presets import PRESETS

GIB = 2**30
STEPS = 2  # the optimiser's states are there from the first step's end on
SHARD = 2**30  # numbers


@dataclass(frozen=True)
class Case:
    """One stage with its settings; every field comes from a flag."""

    stage: int
    folder: str
    hookpoint: int
    latents: int
    tokens: int
    sequences: int
    dtype: str
    load_in_4bit: bool
    sae_dtype: str
    sae_gradient: str
    optim: str
    lora_r: int
    gradient_checkpointing: bool


def write_random(config: Any, folder: Path, dtype: torch.dtype) -> None:
    """A checkpoint with random weights, of which one shard at most is held at a time."""
    from resa_hf.models import load_skeleton

    config.architectures, config.dtype = ["Qwen2ForCausalLM"], dtype
    config.save_pretrained(folder)
    shapes = {name: tensor.shape for name, tensor in load_skeleton(str(folder)).named_parameters()}
    block = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    shards: list[dict[str, torch.Tensor]] = [{}]
    places: dict[str, str] = {}
    for name, shape in shapes.items():
        if sum(map(torch.Tensor.numel, shards[-1].values())) + shape.numel() > SHARD and shards[-1]:
            save_file(shards[-1], folder / f"model-{len(shards)}.safetensors", metadata={"format": "pt"})
            shards[-1].clear()
            shards.append({})
        repeats = -(-shape.numel() // len(block))
        norm = torch.ones(shape, dtype=dtype) if "norm" in name else None
        shards[-1][name] = norm if norm is not None else block.repeat(repeats)[: shape.numel()].view(shape).clone()
        places[name] = f"model-{len(shards)}.safetensors"
    save_file(shards[-1], folder / f"model-{len(shards)}.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def measure(case: Case) -> dict[str, Any]:
    """What is predicted and what is measured of one stage, in bytes. For a fresh process."""
    from resa_hf.models import load_skeleton
    from resa_hf.quantization import adapter_in_float32

    make = _stage1 if case.stage == 1 else _stage2
    # All that is imported on first use is there before anything is counted.
    with tempfile.TemporaryDirectory() as folder:
        tiny = replace(PRESETS["cpu"], hidden_size=64, layers=2, intermediate_size=64, vocabulary=64)
        write_random(tiny.config(), Path(folder), getattr(torch, case.dtype))
        make(replace(case, folder=folder, hookpoint=0, latents=64, tokens=8, sequences=1)).train()
    before = 0 if torch.cuda.is_available() else resident()
    trainer = make(case)
    adapter_in_float32(trainer.model)
    peak = peak_memory(trainer.train, before)
    return {"predicted": _predict(case, trainer.args, load_skeleton(case.folder)), "measured": peak}


def _predict(case: Case, args: Any, meta: Any) -> dict[str, float]:
    from resa_hf.arguments import LoraArguments
    from resa_hf.commands.memory import stage1_parts, stage2_parts

    dtype = getattr(torch, case.dtype)
    if case.stage == 1:
        return stage1_parts(meta, dtype, args, case.load_in_4bit)
    spliced: dict[str, Any] = {"latents": case.latents, "hookpoint": case.hookpoint}
    return stage2_parts(meta, dtype, LoraArguments(lora_r=case.lora_r), args, **spliced, in_4bit=case.load_in_4bit)


def _rows(case: Case, vocabulary: int) -> Any:
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    count = STEPS * (case.sequences if case.stage == 1 else 1)
    return Dataset.from_dict(
        {"input_ids": torch.randint(vocabulary, (count, case.tokens), generator=generator).tolist()}
    )


def _settings(case: Case) -> dict[str, Any]:
    return {
        "output_dir": f"{case.folder}/out", "max_steps": STEPS, "max_length": case.tokens, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1000,
    }  # fmt: skip


def _stage1(case: Case) -> Any:
    from resa_hf.models import load_causal_lm
    from resa_hf.sae.config import SAETrainingConfig
    from resa_hf.sae.trainer import SAETrainer

    hookpoints = [f"layers.{case.hookpoint}"]
    args = SAETrainingConfig(
        **_settings(case), hookpoints=hookpoints, num_latents=case.latents, per_device_train_batch_size=case.sequences
    )
    load = partial(load_causal_lm, case.folder, dtype=case.dtype, load_in_4bit=case.load_in_4bit)
    model: nn.Module = load(hookpoints=hookpoints)
    return SAETrainer(model, args, _rows(case, model.config.vocab_size))


def _stage2(case: Case) -> Any:
    from resa_hf.arguments import LoraArguments
    from resa_hf.models import load_causal_lm
    from resa_hf.sae.autoencoder import TopKSAE
    from resa_hf.sae.checkpoint import save_sae
    from resa_hf.tiny.tokenizer import build_tokenizer
    from resa_hf.tuning.config import SAETuningConfig
    from resa_hf.tuning.trainer import SAETuningTrainer

    model = load_causal_lm(case.folder, dtype=case.dtype, load_in_4bit=case.load_in_4bit)
    sae = f"{case.folder}/sae"
    save_sae(TopKSAE(model.config.hidden_size, case.latents, hookpoint=f"layers.{case.hookpoint}"), sae)
    args = SAETuningConfig(
        **_settings(case), sae=sae, sae_dtype=case.sae_dtype, sae_gradient=case.sae_gradient, optim=case.optim,
        packing=False, per_device_train_batch_size=1, gradient_checkpointing=case.gradient_checkpointing,
    )  # fmt: skip
    return SAETuningTrainer(
        model, args, _rows(case, model.config.vocab_size), processing_class=build_tokenizer(),
        peft_config=LoraArguments(lora_r=case.lora_r).lora_config(),
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    for name in ("hidden_size", "layers", "intermediate_size", "vocabulary", "hookpoint", "latents", "tokens"):
        parser.add_argument(f"--{name}", type=int, help="another number than the preset's")
    parser.add_argument("--sequences", type=int, help="of Stage I's batch; Stage II has one")
    parser.add_argument("--load_in_4bit", action="store_true")
    parser.add_argument("--sae_dtype", choices=("auto", "bfloat16"), default="auto")
    parser.add_argument("--sae_gradient", choices=("flow", "stop"), default="flow")
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--lora_r", type=int, default=32)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    return parser


def main(argv: Sequence[str]) -> None:
    args = vars(_parser().parse_args(argv))
    shape = PRESETS[args.pop("preset")]
    changed = {name: args.pop(name) for name in asdict(shape).keys() & args.keys()}
    shape = replace(shape, **{name: value for name, value in changed.items() if value is not None})
    # glibc keeps what is freed for itself, and the peak would be that of the fragments.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_random(shape.config(), Path(folder), shape.dtype)
        for stage in args.pop("stages"):
            case = Case(
                **args, stage=stage, folder=folder, hookpoint=shape.hookpoint, latents=shape.latents,
                tokens=shape.tokens, sequences=shape.sequences, dtype=str(shape.dtype).removeprefix("torch."),
            )  # fmt: skip
            found = in_fresh_process("benchmarks.memory", json.dumps(asdict(case)))
            predicted = sum(found["predicted"].values())
            parts = " + ".join(f"{name} {size / GIB:.2f}" for name, size in found["predicted"].items() if size)
            sizes = [f"{size / GIB:.2f}" for size in (predicted, found["measured"])]
            rows.append([f"Stage {'I' * stage}", *sizes, f"{predicted / found['measured']:.2f}", parts])
    print(hardware())
    print(table(["", "predicted GiB", "measured GiB", "ratio", "predicted parts"], rows))


if __name__ == "__main__":
    # What the fresh process runs.
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
