"""Out of memory, told in settings to change and their numbers."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from .errors import MemoryFullError, TrainingError
from .full_memory import is_out_of_memory, what_was_asked
from .quantization import is_in_4bit

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from .evaluation.engine import Sampling


@contextlib.contextmanager
def memory_explained(trainer: "Trainer") -> Iterator[None]:
    """
    Tells what would take less memory, where the block runs out of it.

    Args:
        trainer ([`~transformers.Trainer`]): trains in the block.

    Raises:
        `TrainingError`: with the settings to change.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        changes = "".join(f"\n  {change}" for change in less_memory(trainer.args, _in_4bit(trainer)))
        raise TrainingError(
            f"Out of memory at step {trainer.state.global_step + 1}{_held(trainer.args.device)}: "
            f"{what_was_asked(error)}.\n"
            f"What takes less, by effect:{changes}\n`--dry_run` predicts the memory of each setting. A rerun goes on "
            "from the last checkpoint, in another --output_dir where settings differ."
        ) from error


@contextlib.contextmanager
def answers_explained(sampling: "Sampling", in_4bit: bool) -> Iterator[None]:
    """
    Tells what would take less memory, where the block, which generates a batch of answers, runs out of it.

    Args:
        sampling ([`~resa_hf.evaluation.engine.Sampling`]): its settings.
        in_4bit (`bool`): whether the model is loaded in 4 bits already.

    Raises:
        `MemoryFullError`: with the settings to change.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        batch, limit = sampling.batch_size, sampling.max_new_tokens
        changes = [f"batch_size: {batch // 2} (now {batch}), the same answers but for rounding"] if batch > 1 else []
        changes += [] if in_4bit else ["load_in_4bit: true (now false)"]
        changes += [f"max_new_tokens: {limit // 2} (now {limit}), shorter answers"] if limit > 256 else []
        listed = "".join(f"\n  {change}" for change in changes)
        raise MemoryFullError(
            f"Out of memory while answering: {what_was_asked(error)}.\nWhat takes less, by effect:{listed}\n"
            "Finished batches are kept; a rerun goes on from there, in another folder where settings differ."
        ) from error


def less_memory(args: "TrainingArguments", in_4bit: bool) -> list[str]:
    """
    Settings that take less memory than these, in the order of what they cost.

    Args:
        args ([`~transformers.TrainingArguments`]): of either stage or of RL.
        in_4bit (`bool`): whether the model is loaded in 4 bits already.
    """
    given: dict[str, Any] = vars(args)
    changes = []
    batch, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if batch > 1:
        changes.append(
            f"per_device_train_batch_size: {batch // 2} (now {batch}) with gradient_accumulation_steps: {2 * steps} "
            f"(now {steps}), which is the same training"
        )
    # Stage I keeps nothing of the source for a backward.
    if not args.gradient_checkpointing and "hookpoints" not in given:
        changes.append("gradient_checkpointing: true (now false), a third more time")
    if not in_4bit:
        changes.append("load_in_4bit: true (now false), a quarter of a bfloat16 model's size")
    for name in ("max_length", "max_completion_length"):
        if (length := given.get(name)) and length > 256:
            changes.append(f"{name}: {length // 2} (now {length}), other training")
    if (latents := given.get("num_latents")) and latents > 1024:
        changes.append(f"num_latents: {latents // 2} (now {latents}), a smaller SAE")
    if len(hookpoints := given.get("hookpoints") or []) > 1:
        changes.append(f"hookpoints: one at a time (now {len(hookpoints)})")
    return changes


def _in_4bit(trainer: "Trainer") -> bool:
    source: Any = vars(trainer).get("source")  # Stage I's model is its SAEs
    model: Any = trainer.model if source is None else source.model
    return is_in_4bit(model)


def _held(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    _, total = torch.cuda.mem_get_info(device)
    return f" ({torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB were in use at most, of {total / 2**30:.1f})"
