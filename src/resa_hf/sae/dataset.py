"""Token ids for Stage I, from tokenised rows or from text."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..text import tokenize_and_pack

logger = logging.getLogger(__name__)


def prepare_dataset(dataset: Any, processing_class: PreTrainedTokenizerBase | None, max_length: int, name: str) -> Any:
    """
    The dataset with a column `input_ids`: as it is, or packed from its column `text`.

    Args:
        dataset (`datasets.Dataset` or `torch.utils.data.Dataset`):
            Rows with `input_ids` (and `attention_mask`, if padded), or with `text`. Only a `datasets.Dataset` is
            looked into; others are taken at their word.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer; needed for text.
        max_length (`int`):
            Tokens a chunk of text.
        name (`str`):
            What to call the dataset in errors.

    Raises:
        `DataError`: if it is empty, has neither column, or its text does not fill one chunk.
        `ValueError`: if text comes without a tokenizer.
    """
    if not isinstance(dataset, datasets.Dataset):
        return dataset
    if len(dataset) == 0:
        raise DataError(f"{name} is empty: there is nothing to train an SAE on.")
    if "input_ids" in dataset.column_names:
        return dataset
    if "text" not in dataset.column_names:
        raise DataError(
            f"{name} has neither a column 'input_ids' nor a column 'text'; it has {', '.join(dataset.column_names)}."
        )
    if processing_class is None:
        raise ValueError(f"{name} holds text, so SAETrainer needs the tokenizer: give processing_class.")
    packed, report = tokenize_and_pack(dataset, processing_class, max_length)
    logger.info("%s: %s", name, report.describe())
    return packed


def make_collator(pad_token_id: int) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
    """
    Batches rows: pads them on the right to the longest, and gives an `attention_mask` only if something is padded.

    Without a mask, models skip the mask's check, which waits for the device. No rows, which a process gets that none
    are left for, become one token that does not count.

    Args:
        pad_token_id (`int`): what to fill up `input_ids` with; any token will do, since it is masked.
    """

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not rows:
            return {
                "input_ids": torch.full((1, 1), pad_token_id),
                "attention_mask": torch.zeros(1, 1, dtype=torch.long),
            }
        ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
        masks = [
            torch.as_tensor(row["attention_mask"], dtype=torch.long)
            if "attention_mask" in row
            else torch.ones_like(one)
            for row, one in zip(rows, ids, strict=True)
        ]
        batch = {"input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_token_id)}
        mask = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True, padding_value=0)
        if not bool(mask.all()):
            batch["attention_mask"] = mask
        return batch

    return collate


def padded_batches(
    rows: Iterable[Mapping[str, Any]], batch_size: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """
    Rows as a model takes them, batch by batch: one batch is held at a time, so that they may be a stream.

    Args:
        rows (iterable of mappings): with `input_ids`, and `attention_mask` if padded.
        batch_size (`int`): rows a batch.
        device (`torch.device`): where the batches go.

    Yields:
        `dict[str, torch.Tensor]`: as [`make_collator`] gives it.
    """
    collate, remaining = make_collator(0), iter(rows)
    while batch := list(islice(remaining, batch_size)):
        yield {key: tensor.to(device) for key, tensor in collate(batch).items()}
