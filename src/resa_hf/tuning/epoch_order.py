"""An order of the prompts that depends on the epoch alone, so that a run can be resumed in any of them."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """
    TRL's sampler of prompts, begun anew in each epoch from its seed and the number of the epoch. TRL's own goes on
    with a generator that no checkpoint holds: resumed in the second epoch, it would repeat the first one's order.

    Args:
        sampler (`trl.trainer.utils.RepeatSampler`): with its `generator` (`None` if it does not shuffle) and `seed`.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch, the one that is resumed included."""
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)
