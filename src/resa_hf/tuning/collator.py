"""What is known of a batch while it is still on the host: asking the device would make it wait at every step."""

from collections.abc import Callable
from typing import Any

import torch

from .teacher_cache import row_key


def with_blank(collator: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
    """The collator, with one token that counts nowhere for a process that no examples are left for in a round."""

    def collate(examples: list[Any]) -> dict[str, Any]:
        if examples:
            return collator(examples)
        ids = torch.zeros(1, 1, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}

    return collate


class HostCollator:
    """
    Adds to what a collator returns the positions that count, and which rows they are.

    `counted` `[n]`, int64: positions in `[batch * (tokens - 1)]` whose next token has a label other than -100. `rows`,
    one `str` a row: its [`row_key`], if asked for. `blank` where there are no examples ([`with_blank`]).

    Args:
        collator (callable): from examples to a batch with `labels`.
        keys (`bool`): whether to add `rows`.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]], keys: bool) -> None:
        self._collator, self._keys = collator, keys

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        if not examples:
            rows["blank"] = True
        elif self._keys:
            rows["rows"] = [row_key(example["input_ids"]) for example in examples]
        batch = self._collator(examples)
        counted = (batch["labels"][:, 1:] != -100).flatten().nonzero().squeeze(1)
        return {**batch, **rows, "counted": counted}
