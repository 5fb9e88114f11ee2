"""What is watched while a stage trains, so that what cannot end well is told at once, and not when it is over."""

import json
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow.compute as pc
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer

from .errors import DataError, TrainingError
from .late_flag import LateFlag
from .not_finite import broken_weight

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

IN_A_ROW = 5  # steps whose gradient was not finite, after which training stops
SETTLED = 100  # steps from which on an SAE must be better than the mean activation


class Guarded(_Base):
    """
    A mixin for a [`~transformers.Trainer`] that leaves out steps whose gradient is not finite, and watches the logs.

    On the CPU such a step changes nothing. On an accelerator, which would have to be waited for, its gradient is set
    to zero, so that an optimiser with a memory still moves by it, and the step is counted when the next one is queued.
    Steps left out are logged as `skipped_steps`. Under `fp16`, the gradient scaler does its own work instead.

    Raises:
        `DataError`: if a row of tokens has one that the model does not know.
        `TrainingError`: after five such steps in a row, whose last batch is saved then; or if no latent of an SAE
            fires any more.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.skipped_steps = self._in_a_row = 0
        self._batches: list[Any] = []
        self._batches_before: list[Any] = []
        self._step_of_batches = -1
        self._late = LateFlag()
        self._warned: set[str] = set()
        super().__init__(*args, **kwargs)
        if isinstance(self.model, PreTrainedModel | PeftModel):
            check_token_ids(self.train_dataset, self.model)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self._step_of_batches != self.state.global_step:
            self._step_of_batches = self.state.global_step
            # The flag of an accelerator is read a step later.
            self._batches_before, self._batches = self._batches, []
        self._batches.append(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Between the clipping, which has made the norm of all gradients, and the optimiser's step.
        norm = self._norm_of_all(super()._get_grad_norm(model, grad_norm))
        if self.accelerator.scaler is not None or norm is None:
            return norm
        if isinstance(norm, Tensor) and norm.device.type != "cpu":
            self._skip_unseen(model, norm)
        else:
            self._skip_seen(model, norm)
        return norm

    def _modules(self) -> list[nn.Module]:
        """What training reads; overridden where that is more than the model."""
        return [self.model]  # type: ignore[list-item]  # a module, once the trainer is made

    def _norm_of_all(self, norm: Any) -> Any:
        """Overridden where processes hold gradients that the others do not: all must leave out the same steps."""
        return norm

    def _skip_seen(self, model: nn.Module, norm: Tensor | float) -> None:
        skipped = not math.isfinite(norm)
        self._count(skipped, self._batches)
        if skipped:
            for parameter in model.parameters():
                parameter.grad = None  # for which no optimiser does anything

    def _skip_unseen(self, model: nn.Module, norm: Tensor) -> None:
        """Without asking the device, which tells of the step before."""
        self._count(self._late.take(), self._batches_before)
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        skipped = ~whole.isfinite()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(skipped, 0)
        self._late.put(skipped)

    def _count(self, skipped: bool, batches: list[Any]) -> None:
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        self.skipped_steps += skipped
        if self._in_a_row >= IN_A_ROW:
            place = Path(str(self.args.output_dir)) / f"batch-not-finite-{self.args.process_index}.safetensors"
            _save_batches(batches, place)
            rate = max(group["lr"] for group in self.optimizer.param_groups)  # type: ignore[union-attr]
            advice = (
                f"Lower learning_rate (now {rate:.3g}), set max_grad_norm, or look at the data; bf16 "
                "or fp16 may overflow where float32 does not."
            )
            if broken := broken_weight(self._modules()):
                advice = f"The cause: {broken}."
            raise TrainingError(
                f"The gradient was not finite in {IN_A_ROW} steps in a row, up to step {self.state.global_step + 1}; "
                f"none of them was taken. The last batch is in {place}. {advice} A rerun goes on from the last "
                "checkpoint."
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.skipped_steps and ("loss" in logs or "train_runtime" in logs):
            logs["skipped_steps"] = self.skipped_steps
        super().log(logs, *args, **kwargs)
        if "loss" in logs:
            self._watch(logs)

    def _watch(self, logs: dict[str, float]) -> None:
        for name, value in logs.items():
            kind, _, hookpoint = name.partition("/")
            if kind == "dead_share" and value >= 1:
                raise TrainingError(
                    f"No latent of the SAE at {hookpoint} has fired in the last dead_after_tokens tokens, at step "
                    f"{self.state.global_step}: it would not learn any more. Lower learning_rate, set auxk_alpha "
                    "(1/32 is usual), or exclude special tokens."
                )
            settled = self.state.global_step >= min(SETTLED, self.state.max_steps)
            watched = (kind == "fvu" and settled) or (kind == "splice_fvu" and self._reconstructs)
            if watched and value > 1 and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"{name} is {value:.2f} at step {self.state.global_step}: above 1, the SAE reconstructs worse "
                    "than the mean activation would. Is it of this model and hookpoint? In Stage I: lower the rate.",
                    stacklevel=2,
                )

    @property
    def _reconstructs(self) -> bool:
        """Whether what is spliced in is there to reconstruct; some controls are not."""
        return vars(self.args).get("control") is None


def _save_batches(batches: list[Any], place: Path) -> None:
    """Tensors as they are; what is no tensor, such as rows of text, in the file's metadata."""
    tensors: dict[str, Tensor] = {}
    texts: dict[str, str] = {}
    for number, batch in enumerate(batches):
        for name, value in batch.items() if isinstance(batch, dict) else [("rows", batch)]:
            if isinstance(value, Tensor):
                tensors[f"{number}/{name}"] = value.detach().cpu().contiguous()
            else:
                texts[f"{number}/{name}"] = json.dumps(value, default=str)
    place.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, place, metadata=texts)


def check_finite(trainer: Trainer) -> None:
    """
    Called before a checkpoint is written, so that no run is ever resumed from a broken one.

    Args:
        trainer ([`~transformers.Trainer`]): of what is trained.

    Raises:
        `TrainingError`: on every process, if a trained weight of any of them is not finite.
    """
    weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}  # type: ignore[union-attr]
    local = {name: p.to_local() if isinstance(p, DTensor) else p.detach() for name, p in weights.items()}
    flags = [value.isfinite().all() for value in local.values()]
    broken = (~torch.stack(flags)).float() if flags else torch.zeros(1)
    # One number: processes may hold different weights, and different numbers of them.
    total = int(trainer.accelerator.reduce(broken.sum().to(trainer.args.device), reduction="sum"))
    if total:
        named = [name for name, bad in zip(local, broken.tolist(), strict=False) if bad] or ["on another process"]
        raise TrainingError(
            f"{total} trained weights are not finite at step {trainer.state.global_step} (the first: "
            f"{named[0]}). No checkpoint was written; a rerun goes on from the one before. Lower learning_rate."
        )


def check_divergence(divergence: Tensor) -> None:
    """
    Called with Stage II's first batch, when the adapter has not moved yet.

    Args:
        divergence (`torch.Tensor`): KL of each counted token, shape [counted].

    Raises:
        `TrainingError`: if all are zero.
    """
    if divergence.numel() and not divergence.any():
        raise TrainingError(
            "The divergence between teacher and student is exactly zero at the first step, so that there is nothing "
            "to learn: the SAE is not in the student's path, or gives its input back. Look at the hookpoint, at "
            "sae_in and at kl_reference; or set kl_weight: 0 with sft_weight for plain fine-tuning."
        )


def check_token_ids(dataset: Any, model: nn.Module, name: str = "train_dataset") -> None:
    """
    Compares rows of tokens with the model that is to read them.

    Args:
        dataset (`datasets.Dataset`): rows with `input_ids`; anything else is not looked at.
        model (`torch.nn.Module`): a transformers model, plain or PEFT-wrapped.
        name (`str`, *optional*, defaults to `"train_dataset"`): what the message calls the rows.

    Raises:
        `DataError`: if there is a token that the model has no embedding of.
    """
    if not isinstance(dataset, datasets.Dataset) or "input_ids" not in dataset.column_names:
        return
    parts = dataset.with_format("arrow", columns=["input_ids"]).iter(1000)
    largest = max((pc.max(pc.list_flatten(part["input_ids"])).as_py() or 0 for part in parts), default=0)
    check_token_id(largest, model, name)


def check_token_id(largest: int, model: nn.Module, name: str) -> None:
    """
    As [`check_token_ids`], of which this is the comparison.

    Args:
        largest (`int`): of the tokens that the model is to read.
        model (`torch.nn.Module`): a transformers model, plain or PEFT-wrapped.
        name (`str`): what the message calls the text.

    Raises:
        `DataError`: if the model has no embedding of it.
    """
    bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # Of the weight, ZeRO-3 leaves nothing to count; and a few models have more rows than vocab_size, such as mllama.
    known = bare.get_input_embeddings().weight.shape[0] or bare.config.get_text_config().vocab_size
    if largest >= known:
        raise DataError(
            f"{name} has the token {largest}, but the model has embeddings of {known:,} tokens (0 to {known - 1}): "
            "the tokenizer is not this model's. Take the one from the model's own folder, or resize its embeddings."
        )


def unmoved(model: nn.Module) -> str | None:
    """
    Args:
        model (`torch.nn.Module`): after its training.

    Returns:
        `str` or `None`: a warning if it has a LoRA adapter that does nothing.
    """
    outputs = [p for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    if not outputs or any(bool(p.any()) for p in outputs):
        return None
    return (
        "The adapter has not moved: it does nothing. Its gradient was zero throughout, as with sae_gradient: stop "
        "where all adapters lie at or below the hookpoint, or learning_rate was 0 or too low for its dtype."
    )
