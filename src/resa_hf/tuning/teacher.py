"""The forward without gradient: whose states teach, and where the student may start from those at the hookpoint."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..hookpoints import backbone, capture, splice
from ..modes import AdapterSwitch, evaluating
from .config import SAETuningConfig
from .fit import PlacedSAE
from .insertion import Insertion
from .teacher_cache import TeacherCache


class TeacherStates(NamedTuple):
    """
    Args:
        last (`torch.Tensor`): what the LM head reads, `[batch, tokens, d_model]`.
        at_hookpoint (`torch.Tensor` or `None`): `[batch, tokens, d_model]`, if the student may start from it.
    """

    last: Tensor
    at_hookpoint: Tensor | None


class Teacher:
    """
    The teacher of `kl_reference`.

    Args:
        args ([`SAETuningConfig`]): the settings.
        student (`torch.nn.Module`): the model that trains, with its adapter.
        source ([`~transformers.PreTrainedModel`] or `None`): the teacher, if it is another model than the student.
        insertion ([`Insertion`] or `None`), placed (`PlacedSAE` or `None`): the SAE and where it stands.
        open_cache (callable or `None`):
            From states of a batch to the [`TeacherCache`] that holds such; called once, at the first batch.
    """

    def __init__(
        self,
        args: SAETuningConfig,
        student: nn.Module,
        source: nn.Module | None,
        insertion: Insertion | None,
        placed: PlacedSAE | None,
        open_cache: Callable[[list[Tensor]], TeacherCache] | None = None,
    ) -> None:
        self._args, self._source, self._insertion, self._placed = args, source, insertion, placed
        self._adapters = AdapterSwitch(student)
        self._open_cache = open_cache
        self._cache: TeacherCache | None = None

    @torch.no_grad()
    def states(self, model: nn.Module, batch: dict[str, Any], rows: list[str] | None) -> TeacherStates:
        """
        The teacher's states of a batch.

        Args:
            model (`torch.nn.Module`): the student.
            batch (`dict[str, Any]`): what the backbone takes.
            rows (`list[str]` or `None`): the [`row_key`] of each row, where the cache may be asked.
        """
        if self._open_cache is None or rows is None:
            return self._run(model, batch)
        device, length = batch["input_ids"].device, batch["input_ids"].shape[1]
        if self._cache is not None and (stored := self._cache.read(rows, length)) is not None:
            last, *others = (state.to(device, non_blocking=True) for state in stored)
            return TeacherStates(last, others[0] if others else None)
        made = self._run(model, batch)
        states = [state for state in made if state is not None]
        if self._cache is None:
            self._cache = self._open_cache(states)
        self._cache.write(rows, states)
        return made

    def _run(self, model: nn.Module, batch: dict[str, Any]) -> TeacherStates:
        teacher = self._source if self._source is not None else model
        with ExitStack() as stack:
            stack.enter_context(evaluating(teacher))
            if self._insertion is not None and self._placed is not None:
                if self._args.sae_in == "teacher":
                    stack.enter_context(splice(teacher, self._placed.hookpoint, self._insertion))
                else:
                    stack.enter_context(self._insertion.off())
            if self._args.kl_reference == "base":
                stack.enter_context(self._adapters.off())
            if self._placed is None or not may_share_prefix(self._args, self._placed):
                return TeacherStates(backbone(teacher)(**batch).last_hidden_state, None)
            activations = stack.enter_context(capture(teacher, [self._placed.hookpoint]))
            return TeacherStates(backbone(teacher)(**batch).last_hidden_state, activations[self._placed.hookpoint])


def may_share_prefix(args: SAETuningConfig, placed: PlacedSAE | None) -> bool:
    """Whether the settings let teacher and student share the layers up to the hookpoint; the model may still not."""
    return (
        placed is not None
        and placed.hands_tensor_through
        and args.share_prefix == "auto"
        and args.sae_gradient == "stop"
        and args.sae_in == "student"
        and args.kl_reference == "base"
    )
