"""Rows of tokens whose prompts are marked, so that Stage II can leave them out of its loss."""

from collections.abc import Iterable

import datasets
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..text import encode_prompt


def mark_responses(
    rows: datasets.Dataset, prompts: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> datasets.Dataset:
    """Adds the column `completion_mask`, as TRL's `completion_only_loss` reads it: 0 on a prompt, 1 behind it.

    Args:
        rows (`datasets.Dataset`):
            One document a row, in the column `input_ids`.
        prompts (iterable of `str`):
            That of each row, in the rows' order, and perhaps others between them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The rows'.

    Raises:
        `DataError`: for a row that begins with none of the prompts that are left.
    """
    left = (encode_prompt(prompt, tokenizer) for prompt in prompts)
    masks = []
    for number, ids in enumerate(rows["input_ids"], start=1):
        prompt = next((prompt for prompt in left if ids[: len(prompt)] == prompt), None)
        if prompt is None:
            raise DataError(
                f"completion_only_loss: row {number} does not begin with the tokens of its prompt: it is longer than "
                "max_length, or the tokenizer joins the prompt's end with what follows. Raise max_length, or leave "
                "completion_only_loss out."
            )
        masks.append([0] * len(prompt) + [1] * (len(ids) - len(prompt)))
    return rows.add_column("completion_mask", masks)
