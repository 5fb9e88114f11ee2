"""What is known of a batch while it is still on the host: asking the device would make it wait at every step."""

from collections.abc import Callable
from typing import Any

from .teacher_cache import row_key


class HostCollator:
    """
    Adds to what a collator returns the positions that count, and which rows they are.

    `counted` `[n]`, int64: positions in `[batch * (tokens - 1)]` whose next token has a label other than -100. `rows`,
    one `str` a row: its [`row_key`], if asked for.

    Args:
        collator (callable): from examples to a batch with `labels`.
        keys (`bool`): whether to add `rows`.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]], keys: bool) -> None:
        self._collator, self._keys = collator, keys

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        rows = {"rows": [row_key(example["input_ids"]) for example in examples]} if self._keys else {}
        batch = self._collator(examples)
        counted = (batch["labels"][:, 1:] != -100).flatten().nonzero().squeeze(1)
        return {**batch, **rows, "counted": counted}
