"""The frozen source model: it turns token ids into the activations that SAEs are trained on."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..hookpoints import capture
from ..modes import evaluating


class SourceBatch(NamedTuple):
    """
    The activations of one batch.

    Args:
        activations (`dict[str, torch.Tensor]`):
            Hookpoint to activations, shape [batch * tokens, d_in], dtype of the source model.
        counted (`torch.Tensor`):
            1 for tokens that count, 0 for padding and excluded special tokens; shape [batch * tokens], float32.
        weights (`dict[str, torch.Tensor]`):
            Hookpoint to the same, with tokens of outlying norm at 0 too.
    """

    activations: dict[str, Tensor]
    counted: Tensor
    weights: dict[str, Tensor]


class ActivationSource:
    """
    Runs a model up to its deepest hookpoint, without gradients and in evaluation mode; the model stays as it is.

    Args:
        model (`torch.nn.Module`):
            The source model.
        hookpoints (sequence of `str`):
            Canonical hookpoints.
        excluded_token_ids (sequence of `int`, *optional*, defaults to `()`):
            Tokens that do not count.
        max_norm_ratio (`float`, *optional*):
            Tokens do not count whose norm is above so many times the median norm of the counted ones in the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        hookpoints: Sequence[str],
        excluded_token_ids: Sequence[int] = (),
        max_norm_ratio: float | None = None,
    ) -> None:
        self.model = model
        self.hookpoints = list(hookpoints)
        self._max_norm_ratio = max_norm_ratio
        device = next(model.parameters()).device
        self._excluded = torch.tensor(list(excluded_token_ids), dtype=torch.long, device=device)

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any], autocast: AbstractContextManager[None]) -> SourceBatch:
        """
        The activations of a batch.

        Args:
            inputs (`dict[str, Any]`): `input_ids`, and `attention_mask` if padded, shape [batch, tokens]; and
                whatever else the model takes.
            autocast (context manager): the precision to run in.
        """
        capturing = capture(self.model, self.hookpoints, stop_after_last=True)
        with evaluating(self.model), autocast, capturing as hooked:
            self.model(**inputs)
        activations = {hookpoint: hooked[hookpoint].flatten(0, 1) for hookpoint in self.hookpoints}
        ids = inputs["input_ids"].flatten()
        counted = torch.ones_like(ids, dtype=torch.float32)
        if "attention_mask" in inputs:
            counted *= inputs["attention_mask"].flatten()
        if len(self._excluded):
            counted *= ~torch.isin(ids, self._excluded)
        weights = {hookpoint: self._without_outliers(x, counted) for hookpoint, x in activations.items()}
        return SourceBatch(activations, counted, weights)

    def _without_outliers(self, x: Tensor, counted: Tensor) -> Tensor:
        if self._max_norm_ratio is None:
            return counted
        norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
        median = norm.masked_fill(counted == 0, math.nan).nanmedian()
        return counted * (norm <= self._max_norm_ratio * median)
