"""Training that SIGTERM ends after a step, with a checkpoint."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .late_flag import LateFlag
from .preemption import Preempted, preemption_handler


class SaveWhenPreempted(TrainerCallback):
    """
    Ends training after the step in which SIGTERM came, with a checkpoint; with several processes, after the next one.

    After the last step there is nothing left to resume, and the run goes on to save its result.

    Args:
        trainer ([`~transformers.Trainer`]): asks the other processes, if there are any.
        every (`int`, *optional*, defaults to `1`): steps after whose multiples a checkpoint can be resumed exactly.
    """

    def __init__(self, trainer: Trainer, every: int = 1) -> None:
        self._trainer, self._every = trainer, every
        self._anywhere, self._due = LateFlag(), False
        self.stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        handler = preemption_handler()
        here = handler is not None and handler.received
        self._due |= here if args.world_size == 1 else self._agreed(here)
        if self._due and state.global_step % self._every == 0 and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def _agreed(self, here: bool) -> bool:
        """Whether SIGTERM had come to any process a step ago; one that stopped alone would let the others wait."""
        agreed = self._anywhere.take()
        flag = torch.full((), float(here), device=self._trainer.args.device)
        total: torch.Tensor = self._trainer.accelerator.reduce(flag, reduction="sum")
        self._anywhere.put(total > 0)
        return agreed


@contextlib.contextmanager
def saved_when_preempted(trainer: Trainer, every: int = 1) -> Iterator[None]:
    """While the block trains, SIGTERM waits for the end of a step and its checkpoint.

    Args:
        trainer ([`~transformers.Trainer`]): its `train` is called in the block.
        every (`int`, *optional*, defaults to `1`): as in [`SaveWhenPreempted`].

    Raises:
        `Preempted`: after the block, if training was ended so.
    """
    callback = SaveWhenPreempted(trainer, every)
    trainer.add_callback(callback)
    handler = preemption_handler()
    try:
        with handler.held() if handler is not None else contextlib.nullcontext():
            yield
    finally:
        trainer.remove_callback(callback)
    if callback.stopped:
        raise Preempted
