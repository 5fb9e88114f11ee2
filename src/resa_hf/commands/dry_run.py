"""`--dry_run`: the resolved settings, what would be loaded, and the memory that it would take. Nothing is run."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

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
    predicted = [_stage1_memory(run, stage1)] if stage1 is not None else []
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
        loaded, predicted = _loaded(model, data, stage.initial_sae), _stage1_memory(model, stage)
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
        "model": _size(meta, dtype),
        "adapter": _adapter_size(meta, lora),
        # Of completions as long as they may be: those of a batch, and their logits with the gradient.
        "activations": completions * length * text.num_hidden_layers * _kept_a_token(meta, args) * dtype.itemsize,
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
    model = _size(meta, dtype)
    predicted = [_line("answers", model=model, cache=cache)]
    if args.adapters or args.controls:
        # Of `check_adapter`.
        copy = _size(meta, torch.promote_types(dtype, torch.float32))
        predicted.append(_line("check of an adapter", model=model, float32_copy=copy))
    return "\n\n".join([resolved, loaded, "Predicted memory, at most:\n" + "\n".join(predicted)])


def describe_features(args: FeatureArguments) -> str:
    """What `resa-hf features` would do."""
    resolved = json.dumps(vars(args), indent=2, default=str)
    meta, dtype = _shape(args)
    # Of 8 texts (`measure_effect`), untouched and edited.
    logits = 2 * 8 * args.max_length * meta.config.get_text_config().vocab_size * dtype.itemsize
    predicted = _line("one SAE at a time, and", model=_size(meta, dtype), logits=logits)
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


def _stage1_memory(model: ModelArguments, args: SAETrainingConfig) -> str:
    meta, dtype = _shape(model)
    width = meta.config.get_text_config().hidden_size
    latents = args.num_latents or (args.expansion_factor or 32) * width
    # Weights, gradients and two buffers of the optimiser, all float32.
    saes = 2 * latents * width * 4 * 4 * len(args.hookpoints)
    tokens = args.per_device_train_batch_size * args.max_length
    # One hookpoint's latents at a time, and some hidden states of the layer that runs.
    activations = tokens * (latents * 4 + 16 * width * dtype.itemsize)
    return _line("Stage I", model=_size(meta, dtype), saes=saes, activations=activations)


def _stage2_memory(
    model: ModelArguments, lora: LoraArguments, args: SAETuningConfig, stage1: SAETrainingConfig | None, teacher: bool
) -> str:
    meta, dtype = _shape(model)
    text = meta.config.get_text_config()
    adapter = _adapter_size(meta, lora)
    tokens = args.per_device_train_batch_size * (args.max_length or 2048)
    activations = tokens * text.num_hidden_layers * _kept_a_token(meta, args) * dtype.itemsize
    latents = (stage1.num_latents or (stage1.expansion_factor or 32) * text.hidden_size) if stage1 is not None else 0
    size = _size(meta, dtype)
    parts = {"source": size if teacher else 0, "sae": 2 * latents * text.hidden_size * 4}
    line = _line("Stage II", model=size, **parts, adapter=adapter, activations=activations)
    return line if stage1 is not None or args.sae is None else f"{line}, and the SAE's own size"


def _kept_a_token(meta: PreTrainedModel, args: SAETuningConfig | RLConfig) -> int:
    """Numbers that a layer keeps for the backward: about 16 widths and 3 MLP widths; with checkpointing one width."""
    text = meta.config.get_text_config()
    wide = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return text.hidden_size if args.gradient_checkpointing else 16 * text.hidden_size + 3 * wide


def _adapter_size(meta: PreTrainedModel, lora: LoraArguments) -> int:
    """Weights, gradients and two moments, in float32."""
    wanted = lora.lora_target_modules
    linears = [m for n, m in meta.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and "lm_head" not in n]
    if wanted is not None:
        named = dict(meta.named_modules())
        linears = [module for name, module in named.items() if name.rpartition(".")[2] in wanted]
    return lora.lora_r * sum(sum(module.weight.shape) for module in linears) * 4 * 4


def _size(model: torch.nn.Module, dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def _line(stage: str, **parts: float) -> str:
    listed = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    return f"  {stage}: {sum(parts.values()) / GIB:.2f} GiB = {listed}"
