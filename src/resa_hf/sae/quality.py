"""How good an SAE is: what it leaves unexplained, and what that costs the model that it is spliced into."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError, HookpointError
from ..hookpoints import resolve_hookpoint, splice
from ..modes import evaluating
from .autoencoder import SAELensSAE, TopKSAE
from .dataset import padded_batches
from .source import ActivationSource
from .totals import ReconstructionTotals


@torch.no_grad()
def sae_quality(
    model: nn.Module,
    sae: TopKSAE | SAELensSAE,
    dataset: Sequence[Mapping[str, Any]],
    hookpoint: int | str | None = None,
    *,
    batch_size: int = 8,
    ablation: Literal["mean", "zero"] = "mean",
    excluded_token_ids: Sequence[int] = (),
) -> dict[str, float]:
    """
    FVU, L0, dead share and cross-entropy recovered of an SAE, exact over a dataset.

    Cross-entropy recovered is `(ablated - spliced) / (ablated - clean)`: 1 if splicing the SAE in costs nothing, 0 if
    it is as bad as putting a constant there; it may be negative. The model and the SAE stay as they are.

    Args:
        model (`torch.nn.Module`):
            The causal LM.
        sae ([`TopKSAE`] or [`SAELensSAE`]):
            The SAE, on the model's device.
        dataset (`datasets.Dataset` or sequence of mappings):
            Rows with `input_ids`, and `attention_mask` if padded.
        hookpoint (`int` or `str`, *optional*):
            Where to splice it in. `None` means the SAE's own hookpoint.
        batch_size (`int`, *optional*, defaults to `8`): rows a forward.
        ablation (`str`, *optional*, defaults to `"mean"`):
            The constant: `"mean"`, the mean activation over the dataset, or `"zero"`.
        excluded_token_ids (sequence of `int`, *optional*, defaults to `()`):
            Tokens, such as special ones, that FVU, L0 and dead share do not count, and that no splicing changes.

    Returns:
        `dict[str, float]`: `fvu`, `l0`, `dead_share` (latents that never fired), `tokens` (counted ones); `ce_clean`,
        `ce_spliced`, `ce_ablated` (nats a token, all next tokens), `ce_recovered`.

    Raises:
        `DataError`: if the dataset is empty, or no token in it has a next token.
        `HookpointError`: if the hookpoint is unknown, or none is given and the SAE does not know its own.
        `ValueError`: if `ablation` is neither of the two.
    """
    if ablation not in ("mean", "zero"):
        raise ValueError(f"ablation must be 'mean' or 'zero', not {ablation!r}.")
    if len(dataset) == 0:
        raise DataError("The dataset is empty: there is nothing to measure an SAE on.")
    name = _hookpoint(model, sae, hookpoint)
    totals = _totals(model, sae, name, _batches(model, dataset, batch_size), excluded_token_ids)
    constant = totals.mean() if ablation == "mean" else torch.zeros_like(totals.mean())
    excluded = torch.tensor(list(excluded_token_ids), dtype=torch.long, device=constant.device)
    changes: dict[str, Callable[[Tensor], Tensor] | None] = {
        "ce_clean": None,
        "ce_spliced": sae,
        "ce_ablated": lambda x: constant.to(x.dtype).expand_as(x),
    }
    entropies = {
        key: _cross_entropy(model, name, change, excluded, _batches(model, dataset, batch_size))
        for key, change in changes.items()
    }
    gap = entropies["ce_ablated"] - entropies["ce_clean"]
    recovered = (entropies["ce_ablated"] - entropies["ce_spliced"]) / gap if gap else float("nan")
    return {**totals.result(), **entropies, "ce_recovered": recovered}


def _hookpoint(model: nn.Module, sae: TopKSAE | SAELensSAE, hookpoint: int | str | None) -> str:
    wanted = sae.hookpoint if hookpoint is None else hookpoint
    if wanted is None:
        raise HookpointError("The SAE does not say where it was trained: give hookpoint.")
    return resolve_hookpoint(model, wanted)


def _totals(
    model: nn.Module,
    sae: TopKSAE | SAELensSAE,
    hookpoint: str,
    batches: Iterable[dict[str, Tensor]],
    excluded_token_ids: Sequence[int],
) -> ReconstructionTotals:
    source, totals = ActivationSource(model, [hookpoint], excluded_token_ids), ReconstructionTotals(sae)
    for inputs in batches:
        batch = source(inputs, nullcontext())
        totals.update(batch.activations[hookpoint], batch.weights[hookpoint])
    return totals


def _batches(model: nn.Module, dataset: Sequence[Mapping[str, Any]], batch_size: int) -> Iterable[dict[str, Tensor]]:
    rows = (dataset[index] for index in range(len(dataset)))
    return padded_batches(rows, batch_size, next(model.parameters()).device)


def _cross_entropy(
    model: nn.Module,
    hookpoint: str,
    change: Callable[[Tensor], Tensor] | None,
    excluded: Tensor,
    batches: Iterable[dict[str, Tensor]],
) -> float:
    """Mean cross-entropy of the next token, with the activations at the hookpoint changed."""
    total, count = 0.0, 0
    for inputs in batches:
        keep = torch.isin(inputs["input_ids"], excluded).unsqueeze(-1)
        splicing = splice(model, hookpoint, _except(change, keep)) if change is not None else nullcontext()
        with evaluating(model), splicing:
            logits = model(**inputs, use_cache=False).logits
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)[:, 1:]
        logits = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        total += F.cross_entropy(logits, labels.flatten(), reduction="sum").item()
        count += int((labels != -100).sum())
    if not count:
        raise DataError("No token of the dataset has a next token: there is no cross-entropy to measure.")
    return total / count


def _except(change: Callable[[Tensor], Tensor], keep: Tensor) -> Callable[[Tensor], Tensor]:
    """The change, but for the positions to keep."""
    return lambda x: torch.where(keep, x, change(x).to(x.dtype))
