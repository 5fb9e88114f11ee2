"""Rows shared out among processes so that each is read once an epoch, also where they do not divide evenly.

accelerate fills the last round of batches up with rows from the start of the epoch, which would count twice.
"""

import math
from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader


class EachRowOnce(BatchSamplerShard):
    """
    accelerate's shard, but for the last round of batches: it ends where the rows do. Every process gets as many
    batches as the others, since all reduce gradients together; one that no rows are left for gets an empty one.
    """

    def __iter__(self) -> Iterator[list[int]]:
        number = -1
        for number, batch in enumerate(self.batch_sampler):
            if number % self.num_processes == self.process_index:
                yield batch
        last = number % self.num_processes
        if number >= 0 and last < self.process_index:
            yield []

    def __len__(self) -> int:
        return math.ceil(len(self.batch_sampler) / self.num_processes)


class ShardedRows:
    """Mixed into a [`~transformers.Trainer`], whose collator must then know what to make of no rows at all."""

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        loader: DataLoader[Any] = super()._get_dataloader(*args, **kwargs)  # type: ignore[misc]
        shard = loader.batch_sampler
        if isinstance(shard, BatchSamplerShard) and not shard.drop_last and shard.num_processes > 1:
            # Once made, a loader takes no other sampler.
            shard.__class__ = EachRowOnce
        return loader
