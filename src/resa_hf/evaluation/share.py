"""One process' part of what several answer together."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from ..precision import runnable_device

T = TypeVar("T")
# A process that has short answers waits for one that has long ones; torch's 10 or 30 minutes are made for gradients.
_PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Share:
    """
    One of several processes, each with the whole model, that answer each its part and then hold all answers.

    Args:
        process (`int`, *optional*, defaults to `0`): its number.
        processes (`int`, *optional*, defaults to `1`): how many there are.
    """

    process: int = 0
    processes: int = 1

    @classmethod
    def launched(cls) -> "Share":
        """This process' share where torchrun or `accelerate launch` has started it beside others; else the whole."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        state = PartialState(cpu=runnable_device().type == "cpu", timeout=_PATIENCE)
        return cls(state.process_index, state.num_processes)

    @classmethod
    def of_training(cls, args: TrainingArguments) -> "Share":
        """This process' share where a trainer's settings have found the others."""
        return cls(args.process_index, args.world_size)

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.process == 0

    def part(self, work: Sequence[T]) -> list[T]:
        """Its part: every so-maniest, so that work in the order of its size is shared out evenly."""
        return list(work[self.process :: self.processes])

    def of_first(self, value: T) -> T:
        """What the first process has, in all of them."""
        if self.processes == 1:
            return value
        told: list[Any] = [value]
        torch.distributed.broadcast_object_list(told, src=0)
        found: T = told[0]
        return found

    def of_all(self, found: dict[Any, T]) -> dict[Any, T]:
        """What all processes have found, in all of them."""
        if self.processes == 1:
            return found
        every: list[Any] = [None] * self.processes
        torch.distributed.all_gather_object(every, found)
        return {key: value for part in every for key, value in part.items()}
