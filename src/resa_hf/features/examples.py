"""What a latent fires on, and which tokens it speaks for."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..hookpoints import decoder_layers, splice
from ..modes import evaluating
from ..sae.autoencoder import SAELensSAE, TopKSAE
from .batches import ActivationBatch, activation_batches
from .firings import check_latents
from .reading import Active, active_latents, decoder_rows


@dataclass(frozen=True)
class Example:
    """
    The place in a row where a latent is largest, and the tokens around it.

    Args:
        row (`int`): the row's number, from 0.
        position (`int`): the token's number in the row's `input_ids`, from 0; of equal ones the first.
        value (`float`): the latent there.
        tokens (`tuple[int, ...]`): token ids from `context` before it to `context` behind it, without padding.
        values (`tuple[float, ...]`): the latent at each; 0 where it is not active, or the token does not count.
    """

    row: int
    position: int
    value: float
    tokens: tuple[int, ...]
    values: tuple[float, ...]


@torch.no_grad()
def top_examples(
    model: nn.Module,
    hookpoint: int | str,
    sae: TopKSAE | SAELensSAE,
    rows: Iterable[Mapping[str, Any]],
    latents: Sequence[int],
    *,
    excluded_token_ids: Sequence[int],
    count: int = 10,
    context: int = 10,
    batch_size: int = 8,
) -> dict[int, list[Example]]:
    """
    The rows on which each latent is largest, from a stream: memory holds one batch and the examples kept so far.

    A row gives a latent one example at most, at its peak; of equal ones the earlier row comes first.

    Args:
        model (`torch.nn.Module`):
            The causal LM.
        hookpoint (`int` or `str`):
            Where the SAE reads, in any spelling.
        sae ([`TopKSAE`] or [`SAELensSAE`]):
            The SAE, on the model's device.
        rows (iterable of mappings):
            With `input_ids`, and `attention_mask` if padded. Read once, so that a `datasets.IterableDataset` will do.
        latents (sequence of `int`):
            Which latents.
        excluded_token_ids (sequence of `int`):
            Tokens at which nothing counts: `tokenizer.all_special_ids`, or `()` for all tokens to count. Padding never
            does.
        count (`int`, *optional*, defaults to `10`):
            Examples of each latent, at most.
        context (`int`, *optional*, defaults to `10`):
            Tokens before and behind the peak.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows a forward.

    Returns:
        `dict[int, list[Example]]`: each latent's examples, largest first; fewer than `count`, or none, where it is
        active in fewer rows.

    Raises:
        `HookpointError`: if the hookpoint is unknown.
        `IncompatibleSAEError`: if the SAE has another width than the activations.
        `ValueError`: for a latent that the SAE does not have, or a `count` below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1.")
    best = _Best(check_latents(latents, sae.num_latents), sae, count, context)
    for batch in activation_batches(
        model, hookpoint, rows, excluded_token_ids=excluded_token_ids, batch_size=batch_size
    ):
        best.add(_counted(active_latents(sae, batch.x), batch), batch)
    return best.examples()


class _Best:
    """The largest examples of each latent so far."""

    def __init__(self, latents: NDArray[np.int64], sae: TopKSAE | SAELensSAE, count: int, context: int) -> None:
        self._latents, self._count, self._context, self._rows = latents.tolist(), count, context, 0
        parameter, number = next(sae.parameters()), len(latents)
        self._slots = torch.full((sae.num_latents,), number, device=parameter.device)  # where a latent stands
        self._slots[self._latents] = torch.arange(number, device=parameter.device)
        self._floors = parameter.new_zeros(number)  # what a row has to exceed
        # Heaps with the example to drop next in front: the smallest, and of equal ones the latest.
        self._heaps: list[list[tuple[float, int, Example]]] = [[] for _ in self._latents]

    def add(self, active: Active, batch: ActivationBatch) -> None:
        peaks = active.values.new_zeros(len(batch.input_ids), len(self._latents) + 1)
        peaks.scatter_reduce_(1, self._slots[active.indices].flatten(1), active.values.flatten(1), "amax")
        for row, slot in (peaks[:, :-1] > self._floors).nonzero().tolist():
            heap = self._heaps[slot]
            if len(heap) == self._count and float(peaks[row, slot]) <= heap[0][0]:
                continue  # an earlier row of this batch has raised the floor
            example = _example(active, batch, self._latents[slot], row, self._rows + row, self._context)
            push = heapq.heappush if len(heap) < self._count else heapq.heapreplace
            push(heap, (example.value, -example.row, example))
            self._floors[slot] = heap[0][0] if len(heap) == self._count else 0.0
        self._rows += len(batch.input_ids)

    def examples(self) -> dict[int, list[Example]]:
        return {
            latent: [example for *_, example in sorted(heap, reverse=True)]
            for latent, heap in zip(self._latents, self._heaps, strict=True)
        }


def _counted(active: Active, batch: ActivationBatch) -> Active:
    """With [batch, tokens, k] in place of [batch * tokens, k], and 0 at tokens that do not count."""
    values, indices = (tensor.unflatten(0, batch.input_ids.shape) for tensor in active)
    return Active(values.masked_fill(~batch.counted.unsqueeze(-1), 0), indices)


def _example(active: Active, batch: ActivationBatch, latent: int, row: int, number: int, context: int) -> Example:
    curve: Tensor = active.values[row].masked_fill(active.indices[row] != latent, 0).sum(dim=-1)
    position = int(curve.argmax())
    around = slice(max(0, position - context), position + context + 1)
    attended = batch.attended[row, around]
    tokens, values = batch.input_ids[row, around][attended], curve[around][attended]
    return Example(number, position, float(curve[position]), tuple(tokens.tolist()), tuple(values.tolist()))


@torch.no_grad()
def nearest_tokens(
    model: nn.Module,
    sae: TopKSAE | SAELensSAE,
    latent: int,
    tokenizer: PreTrainedTokenizerBase,
    count: int = 8,
) -> list[tuple[str, float]]:
    """
    The tokens that a latent speaks for, by its decoder row: the logit lens of
    [nostalgebraist](https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens) on one
    direction.

    The row takes the place of the last decoder layer's output and goes through the model's own final norm and LM head;
    what a row of zeros gives is subtracted, so that the biases of norm and head do not count. The norm's weight does
    count (as in TransformerLens, which folds it into the head), and its scaling makes the row's length count for
    nothing. What layers between the hookpoint and the head would do to the row is left out, so it says least of early
    layers.

    Args:
        model (`torch.nn.Module`):
            The causal LM.
        sae ([`TopKSAE`] or [`SAELensSAE`]):
            An SAE of the residual stream, or of what is added to it.
        latent (`int`):
            Which latent.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        count (`int`, *optional*, defaults to `8`):
            How many tokens.

    Returns:
        `list[tuple[str, float]]`: tokens as text, and the logit that the row gives them; largest first.

    Raises:
        `IncompatibleSAEError`: if the decoder is not as wide as the residual stream.
    """
    row = decoder_rows(sae, [latent])[0]
    both = torch.stack([row, torch.zeros_like(row)])[None]
    path, layers = decoder_layers(model)
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    with evaluating(model), splice(model, f"{path}.{len(layers) - 1}", lambda x: both.to(x)):
        of_row, of_zeros = model(input_ids=ids, use_cache=False).logits[0].float()
    # Heads are often padded past the tokenizer's last token.
    top = (of_row - of_zeros)[: len(tokenizer)].topk(count)
    texts = tokenizer.batch_decode(top.indices[:, None])
    return list(zip(texts, top.values.tolist(), strict=True))
