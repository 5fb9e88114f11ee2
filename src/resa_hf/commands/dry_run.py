"""`--dry_run`: the resolved settings, what would be loaded, and the memory that it would take. Nothing is run."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..arguments import DataArguments, LoraArguments, ModelArguments, SourceArguments
from ..evaluation.arguments import EvaluateArguments
from ..experiment.report import as_plain
from ..experiment.settings import RunSettings
from ..experiment.sweep import Sweep, sweep_tasks
from ..features.arguments import FeatureArguments
from ..models import load_skeleton
from ..rl.config import RLConfig
from ..sae.config import SAETrainingConfig
from ..tuning.config import SAETuningConfig
from .memory import (
    activations_size,
    adapter_size,
    cross_entropy_parts,
    latents_of,
    model_size,
    stage1_parts,
    stage2_parts,
)

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
    trained = [arm.name for arm in settings.arms if arm.is_trained]
    candidates = len(settings.candidates)
    jobs = (
        f"{len(settings.sae_sources) * len(run.seeds)} SAE trainings; "
        f"{len(trained)} trained arms x {len(run.seeds)} seeds"
        + (f", {candidates} learning rates and checkpoints to choose among" if candidates > 1 else "")
        + "".join(f"; text sampled from the {text} x {len(run.seeds)} seeds" for text in settings.texts)
        + f"; answers of {len(settings.arms) + 1} arms to {run.held_out} questions."
    )
    resolved = json.dumps(as_plain(settings), indent=2, default=str)
    loaded = _loaded(run, run, run.source_model or run.source_adapter, run.sae)
    teacher = any({**vars(stage2), **arm.tuning}["kl_reference"] == "source" for arm in settings.arms)
    predicted = _stage1_memory(run, stage1) if stage1 is not None else []
    predicted.append(_stage2_memory(run, run, stage2, stage1, teacher))
    return "\n\n".join([resolved, jobs, loaded, "Predicted memory of one job:\n" + "\n".join(predicted)])


def describe_sweep(sweep: Sweep) -> str:
    """What `resa-hf sweep` would do: the first point in full, and what the others have with it in common."""
    lines = []
    for point in sweep.points:
        run = point.settings.run
        loaded = _loaded(run, run, run.source_model or run.source_adapter, run.sae)
        lines.append(f"  {point.root.name}: {loaded} Shares {point.stage1} and {point.base}.")
    jobs = {task.name for task in sweep_tasks(sweep.points)} - {point.root.name for point in sweep.points}
    shared = f"Made once, in {sweep.points[0].shared}: {', '.join(sorted(jobs))}."
    points = f"{len(sweep.points)} points, of which the first is told above:\n" + "\n".join(lines)
    return "\n\n".join([describe_run(sweep.points[0].settings), points, shared])


def describe_stage(
    model: ModelArguments,
    data: DataArguments,
    settings: dict[str, Any],
    stage: SAETrainingConfig | tuple[SAETuningConfig, LoraArguments, SourceArguments],
) -> str:
    """What `resa-hf train-sae` or `resa-hf tune` would do."""
    resolved = json.dumps({**vars(model), **vars(data), **settings}, indent=2, default=str)
    if isinstance(stage, SAETrainingConfig):
        loaded, predicted = _loaded(model, data, stage.initial_sae), "\n".join(_stage1_memory(model, stage))
    else:
        args, lora, source = stage
        loaded = _loaded(model, data, source.source_model or source.source_adapter, args.sae)
        predicted = _stage2_memory(model, lora, args, None, args.kl_reference == "source")
    return "\n\n".join([resolved, loaded, f"Predicted memory:\n{predicted}"])


def describe_rl(
    model: ModelArguments, lora: LoraArguments, data: DataArguments, args: RLConfig, settings: dict[str, Any]
) -> str:
    """What `resa-hf train-rl` would do."""
    resolved = json.dumps(settings, indent=2, default=str)
    meta, dtype = _shape(model)
    text = meta.config.get_text_config()
    new = args.max_completion_length or 0
    completions, length = args.per_device_train_batch_size, args.max_prompt_length + new
    parts = {
        "model": model_size(meta, dtype, model.load_in_4bit),
        "adapter": adapter_size(meta, lora, str(args.optim)),
        # Of completions as long as they may be: those of a batch, and their logits with the gradient.
        "activations": activations_size(meta, dtype, lora, args, completions * length),
        "logits": 2 * completions * new * text.vocab_size * 4,
    }
    told = f"Predicted memory, if every completion is as long as it may be:\n{_line('RL', **parts)}"
    more = f"the cache of {args.generation_batch_size} completions that are generated at once"
    if args.use_vllm:
        more = f"vLLM's {args.vllm_gpu_memory_utilization:.0%} of the GPU"
    return "\n\n".join([resolved, _loaded(model, data), f"{told}, and {more}."])


def describe_evaluation(args: EvaluateArguments) -> str:
    """What `resa-hf evaluate` would do."""
    resolved = json.dumps(vars(args), indent=2, default=str)
    names = [args.model_name_or_path, args.model_adapter, *args.adapters, *args.controls, *args.tasks]
    loaded = f"Would load: {', '.join(name for name in [*names, *args.check_overlap] if name)}."
    if args.server is not None:
        return "\n\n".join([resolved, loaded, f"Answers come from the server at {args.server}."])
    meta, dtype = _shape(args)
    text = meta.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # Keys and values, if every completion reaches the limit.
    cache = 2 * text.num_hidden_layers * heads * width * args.batch_size * args.max_new_tokens * dtype.itemsize
    size = model_size(meta, dtype, args.load_in_4bit)
    predicted = [_line("answers", model=size, cache=cache)]
    if args.adapters or args.controls:
        # Of `check_adapter`.
        copy = model_size(meta, torch.promote_types(dtype, torch.float32), args.load_in_4bit)
        predicted.append(_line("check of an adapter", model=size, float32_copy=copy))
    return "\n\n".join([resolved, loaded, "Predicted memory, at most:\n" + "\n".join(predicted)])


def describe_features(args: FeatureArguments) -> str:
    """What `resa-hf features` would do."""
    resolved = json.dumps(vars(args), indent=2, default=str)
    meta, dtype = _shape(args)
    # Of 8 texts (`measure_effect`), untouched and edited.
    logits = 2 * 8 * args.max_length * meta.config.get_text_config().vocab_size * dtype.itemsize
    predicted = _line("one SAE at a time, and", model=model_size(meta, dtype, args.load_in_4bit), logits=logits)
    loaded = _loaded(args, args, args.saes, args.other_model, args.other_adapter, args.other_saes)
    return "\n\n".join([resolved, loaded, f"Predicted memory:\n{predicted}"])


def _loaded(model: ModelArguments, data: DataArguments, *others: str | None) -> str:
    names = [model.model_name_or_path, model.model_adapter, *others, data.dataset]
    return f"Would load: {', '.join(name for name in names if name)}."


def _shape(model: ModelArguments) -> tuple[PreTrainedModel, torch.dtype]:
    """The model without its weights, and the dtype that they would have."""
    meta = load_skeleton(model.model_name_or_path, revision=model.model_revision)
    stored: Any = meta.config.dtype or torch.float32
    return meta, stored if model.dtype == "auto" else getattr(torch, model.dtype)


def _stage1_memory(model: ModelArguments, args: SAETrainingConfig) -> list[str]:
    meta, dtype = _shape(model)
    return [
        _line("Stage I", **stage1_parts(meta, dtype, args, model.load_in_4bit)),
        _line("Stage I, cross-entropy", **cross_entropy_parts(meta, dtype, args, model.load_in_4bit)),
    ]


def _stage2_memory(
    model: ModelArguments, lora: LoraArguments, args: SAETuningConfig, stage1: SAETrainingConfig | None, teacher: bool
) -> str:
    meta, dtype = _shape(model)
    spliced: dict[str, Any] = {}
    if stage1 is not None:
        spliced = {"latents": latents_of(meta, stage1), "hookpoint": stage1.hookpoints[0]}
    parts = stage2_parts(meta, dtype, lora, args, **spliced, teacher=teacher, in_4bit=model.load_in_4bit)
    line = _line("Stage II", **parts)
    return line if stage1 is not None or args.sae is None else f"{line}, and the SAE's own size"


def _line(stage: str, **parts: float) -> str:
    listed = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    return f"  {stage}: {sum(parts.values()) / GIB:.2f} GiB = {listed}"
