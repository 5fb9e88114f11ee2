"""Tokenised rows through a model, batch by batch, to the activations that an SAE reads."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..hookpoints import resolve_hookpoint
from ..sae.dataset import padded_batches
from ..sae.source import ActivationSource


class ActivationBatch(NamedTuple):
    """
    The activations of some rows, padded to the longest.

    Args:
        input_ids (`torch.Tensor`): shape [batch, tokens], int64.
        attended (`torch.Tensor`): False for padding; shape [batch, tokens], bool.
        counted (`torch.Tensor`): False for padding and excluded tokens; shape [batch, tokens], bool.
        x (`torch.Tensor`): shape [batch * tokens, d_in], dtype of the model. Of padding it may be anything, also NaN.
    """

    input_ids: Tensor
    attended: Tensor
    counted: Tensor
    x: Tensor


def activation_batches(
    model: nn.Module,
    hookpoint: int | str,
    rows: Iterable[Mapping[str, Any]],
    *,
    excluded_token_ids: Sequence[int],
    batch_size: int,
) -> Iterator[ActivationBatch]:
    """
    Runs a model over rows up to a hookpoint, without gradients and in evaluation mode. Holds one batch at a time.

    Args:
        model (`torch.nn.Module`): the causal LM.
        hookpoint (`int` or `str`): in any spelling.
        rows (iterable of mappings): with `input_ids`, and `attention_mask` if padded; may be a stream.
        excluded_token_ids (sequence of `int`): tokens that do not count.
        batch_size (`int`): rows a forward.

    Raises:
        `HookpointError`: if the hookpoint is unknown.
    """
    name = resolve_hookpoint(model, hookpoint)
    source = ActivationSource(model, [name], excluded_token_ids)
    for inputs in padded_batches(rows, batch_size, next(model.parameters()).device):
        ids = inputs["input_ids"]
        found = source(inputs, nullcontext())
        attended = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        yield ActivationBatch(ids, attended, found.counted.view_as(ids).bool(), found.activations[name])
