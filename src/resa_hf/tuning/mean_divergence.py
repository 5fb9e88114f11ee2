"""The divergence between two forwards, on rows of tokens."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..sae.dataset import padded_batches
from ..sae.totals import wide_dtype
from .loss import LMHead, token_divergence

States = Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def mean_divergence(
    rows: Iterable[Mapping[str, Any]],
    batch_size: int,
    states: States,
    heads: tuple[LMHead, LMHead],
    beta: float = 0.0,
    temperature: float = 1.0,
) -> tuple[float, int]:
    """The mean divergence at all positions but each row's last one. Holds one batch at a time.

    Args:
        rows (iterable of mappings):
            With `input_ids`, of any lengths.
        batch_size (`int`):
            Rows at once.
        states (`Callable`):
            From a batch, as the models take it, to the last hidden states of student and teacher, each `[batch,
            tokens, d_model]`.
        heads (`tuple[LMHead, LMHead]`):
            The student's and the teacher's.
        beta (`float`, *optional*, defaults to `0.0`), temperature (`float`, *optional*, defaults to `1.0`):
            As in [`token_divergence`].

    Returns:
        `tuple[float, int]`: the mean, in nats, and the positions that it is the mean of.
    """
    total, tokens = 0.0, 0
    for batch in padded_batches(rows, batch_size, heads[0].weight.device):
        counted = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[:, 1:].bool()
        student, teacher = (hidden[:, :-1][counted] for hidden in states(batch))
        divergence = token_divergence(student, teacher, *heads, beta, temperature)
        total += divergence.sum(dtype=wide_dtype(divergence.device)).item()
        tokens += divergence.numel()
    return total / max(tokens, 1), tokens
