"""`--dry_run`: the resolved settings, what would be loaded, and the memory that it would take. Nothing is run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..arguments import DataArguments, ModelArguments
from ..experiment.report import as_plain
from ..experiment.settings import RunSettings
from ..models import local_name
from ..sae.config import SAETrainingConfig
from ..tuning.config import SAETuningConfig

GIB = 2**30


def take_dry_run(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Takes `--dry_run` out of the flags, and tells whether it was there."""
    rest = [word for word in argv if word not in ("--dry_run", "--dry-run")]
    return rest, len(rest) < len(argv)


def describe_run(settings: RunSettings) -> str:
    """What `resa-hf run` would do."""
    run = settings.run
    stage1 = SAETrainingConfig(**settings.stage1, output_dir="unused") if settings.sae_sources else None
    stage2 = SAETuningConfig(**settings.stage2, output_dir="unused")
    trained = [arm.name for arm in settings.arms if arm.known is None]
    jobs = (
        f"{len(settings.sae_sources) * len(run.seeds)} SAE trainings; "
        f"{len(trained)} trained arms x {len(run.seeds)} seeds"
        + (
            f", {len(settings.learning_rates)} learning rates to choose among"
            if len(settings.learning_rates) > 1
            else ""
        )
        + f"; answers of {len(settings.arms) + 1} arms to {run.held_out} questions."
    )
    resolved = json.dumps(as_plain(settings), indent=2, default=str)
    return f"{resolved}\n\n{jobs}\n\n{_loaded(run, run)}\n\n{_memory(run, stage1, stage2)}"


def describe_stage(
    model: ModelArguments,
    data: DataArguments,
    stage1: SAETrainingConfig | None = None,
    stage2: SAETuningConfig | None = None,
) -> str:
    """What `resa-hf train-sae` or `resa-hf tune` would do."""
    config = stage1 if stage1 is not None else stage2
    assert config is not None, "one stage is given"
    resolved = json.dumps({**vars(model), **vars(data), **config.to_dict()}, indent=2, default=str)
    return f"{resolved}\n\n{_loaded(model, data)}\n\n{_memory(model, stage1, stage2)}"


def _loaded(model: ModelArguments, data: DataArguments) -> str:
    folder = local_name(model.model_name_or_path)
    where = "a folder" if Path(folder).is_dir() else "the Hub"
    return f"Would load: model {model.model_name_or_path} from {where}; data {data.dataset}."


def _memory(model: ModelArguments, stage1: SAETrainingConfig | None, stage2: SAETuningConfig | None) -> str:
    """Predicted peak memory of the device, by part; activations without gradient checkpointing."""
    config: Any = AutoConfig.from_pretrained(local_name(model.model_name_or_path), revision=model.model_revision)
    text = config.get_text_config()
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in meta.parameters())
    dtype = config.dtype if model.dtype == "auto" else getattr(torch, model.dtype)
    width, weights = text.hidden_size, parameters * (dtype or torch.float32).itemsize
    lines = [f"Predicted memory, {parameters / 1e6:,.1f} M parameters in {dtype}:"]
    if stage1 is not None:
        latents = stage1.num_latents or (stage1.expansion_factor or 32) * width
        # Weights, gradients and two buffers of the optimiser, all float32.
        sae = 2 * latents * width * 4 * 4 * max(len(stage1.hookpoints), 1)
        tokens = stage1.per_device_train_batch_size * stage1.max_length
        made = tokens * latents * 4
        lines.append(_line("Stage I", model=weights, saes=sae, activations=made + 8 * tokens * width * dtype.itemsize))
    if stage2 is not None:
        targets = sum(m.in_features + m.out_features for n, m in _linears(meta) if "lm_head" not in n)
        adapter = 32 * targets * 16  # rank 32: weights, gradients and two moments in float32
        tokens = stage2.per_device_train_batch_size * (stage2.max_length or 2048)
        # About 16 widths and 3 MLP widths a layer and token are kept for the backward.
        kept = tokens * text.num_hidden_layers * (16 * width + 3 * text.intermediate_size) * dtype.itemsize
        source = weights if stage2.kl_reference == "source" else 0
        spliced = 2 * (stage1.num_latents or 32 * width) * width * 4 if stage1 is not None else 0
        lines.append(_line("Stage II", model=weights, source=source, sae=spliced, adapter=adapter, activations=kept))
    return "\n".join(lines)


def _linears(model: torch.nn.Module) -> list[tuple[str, torch.nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def _line(stage: str, **parts: float) -> str:
    listed = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    return f"  {stage}: {sum(parts.values()) / GIB:.2f} GiB = {listed}"
