"""Decoding a batch of completions on Transformers' KV cache.

`generate` reads the prompt again for each sample of it, computes all rows until the longest has ended, and copies the
whole cache at each step. Here samples of one prompt share its prefill, rows that have ended are dropped, and the cache
has room to grow into.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..errors import AnswerError
from ..not_finite import cause_of_logits

Draw = Callable[[Tensor, list[int], int], Tensor]

_NOTHING = -1  # the token drawn from logits that are not finite


def decode(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], draw: Draw, *, ends: set[int], limit: int
) -> Iterator[tuple[int, list[int]]]:
    """Yields each row's number and its new tokens, in the order in which they end.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A bare causal LM in evaluation mode.
        prompts (sequence of `tuple[int, ...]`):
            Token ids, one row each.
        draw (`Callable`):
            `draw(logits, rows, count)` returns the next tokens, `[rows]` int64, given logits `[rows, vocabulary]`, the
            numbers of the rows and how many new tokens they have.
        ends (`set[int]`):
            Tokens that end a completion. They belong to it.
        limit (`int`):
            New tokens of a row at most.

    Raises:
        `AnswerError`: where logits are not finite.
    """
    found: list[list[int]] = [[] for _ in prompts]
    for step in decode_steps(model, prompts, draw, ends=ends, limit=limit):
        for row, token in step:
            found[row].append(token)
            if token in ends or len(found[row]) == limit:
                yield row, found[row]


def decode_steps(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], draw: Draw, *, ends: set[int], limit: int
) -> Iterator[list[tuple[int, int]]]:
    """Yields the tokens of each step, `(row, token)` for every row that has not ended.

    The model runs when the next step is asked for, and is left alone in between: others may use it then.

    Args:
        model ([`~transformers.PreTrainedModel`]), prompts (sequence of `tuple[int, ...]`), draw (`Callable`), ends
            (`set[int]`), limit (`int`):
            As in [`decode`].

    Raises:
        `AnswerError`: where logits are not finite.
    """
    cache, mask, logits = _prefill(model, prompts)
    position = mask.sum(1, keepdim=True) - 1
    rows = list(range(len(prompts)))
    for count in range(limit):
        # Told with the tokens, for which the device is waited for anyway.
        tokens = draw(logits, rows, count).masked_fill(~logits.amax(-1).isfinite(), _NOTHING)
        step = list(zip(rows, tokens.tolist(), strict=True))
        if any(token == _NOTHING for _, token in step):
            raise _not_finite(model, count)
        yield step
        going_on = [place for place, (_, token) in enumerate(step) if token not in ends]
        if not going_on or count + 1 == limit:
            return
        if len(going_on) < len(rows):
            rows = [rows[place] for place in going_on]
            kept = torch.tensor(going_on, device=mask.device)
            cache.reorder_cache(kept)  # type: ignore[arg-type]  # an int64 tensor
            tokens, mask, position = tokens[kept], mask[kept], position[kept]
        position = position + 1
        mask = pad(mask, (0, 1), value=1)
        logits = model(
            input_ids=tokens.unsqueeze(1),
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]


def _not_finite(model: PreTrainedModel, count: int) -> AnswerError:
    return AnswerError(
        f"{type(model).__name__} gave logits that are NaN or infinite after {count} new tokens, of which no token can "
        f"be drawn: {cause_of_logits(model)}. Look at the model or adapter, or set another dtype. Answers finished "
        "before are kept."
    )


def _prefill(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]]) -> tuple[DynamicCache, Tensor, Tensor]:
    """The cache and mask (`[rows, columns]` int64) of left-padded prompts, and the logits behind them."""
    unique = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    width = max(map(len, unique))
    # Nothing attends to the padding, so any token will do.
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in unique], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in unique], device=model.device)
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    copies = torch.tensor([unique[prompt] for prompt in prompts], device=model.device)
    if len(unique) < len(prompts):
        cache.reorder_cache(copies)  # type: ignore[arg-type]  # an int64 tensor
    return cache, mask[copies], logits[copies]


class _RoomyLayer(DynamicLayer):
    """A cache layer that writes a step's column into spare room, where `DynamicLayer` copies all columns anew."""

    room: tuple[Tensor, Tensor]  # keys and values, [rows, heads, columns and spare ones, head]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self.room = key_states[:, :, :0], value_states[:, :, :0]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        missing = end - self.room[0].shape[2]
        if missing > 0:
            spare = missing + max(64, end // 8)
            self.room = pad(self.room[0], (0, 0, 0, spare)), pad(self.room[1], (0, 0, 0, spare))
        for states, part in zip(self.room, new, strict=True):
            states[:, :, start:end] = part
        self.keys, self.values = self.room[0][:, :, :end], self.room[1][:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        end = self.get_seq_length()
        self.room = self.room[0][beam_idx], self.room[1][beam_idx]
        self.keys, self.values = self.room[0][:, :, :end], self.room[1][:, :, :end]
