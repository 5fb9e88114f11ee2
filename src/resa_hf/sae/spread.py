"""SAEs spread over processes: each holds and trains those of some hookpoints, on the activations of all.

What travels is activations, `d_in` numbers a token and hookpoint. With an SAE on every process it is gradients, as
many as the SAE has weights: for 65,536 latents of width 1,536 four times as much as 32,768 tokens in float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .source import SourceBatch

T = TypeVar("T")


class HookpointShare:
    """
    Which hookpoints' SAEs this process holds, and how it gets what the others have. Without `spread` it holds all, and
    nothing travels here.

    Args:
        hookpoints (sequence of `str`): all, in the order of the settings.
        spread (`bool`): whether they are spread.
        index, count (`int`): which process this is, of how many.

    Raises:
        `ValueError`: if there are fewer hookpoints than processes to spread them over.
    """

    def __init__(self, hookpoints: Sequence[str], spread: bool, index: int, count: int) -> None:
        self.hookpoints = list(hookpoints)
        self._index, self._count = (index, count) if spread else (0, 1)
        if len(self.hookpoints) < self._count:
            raise ValueError(
                f"spread_hookpoints: {count} processes would share {len(self.hookpoints)} hookpoints. Name more, take "
                "fewer processes, or leave it out."
            )

    @property
    def spread(self) -> bool:
        """Whether other processes hold other SAEs."""
        return self._count > 1

    @property
    def mine(self) -> list[str]:
        """The hookpoints of this process."""
        return self.hookpoints[self._index :: self._count]

    def to_owners(self, batch: SourceBatch) -> SourceBatch:
        """This process' hookpoints with the tokens of all processes; `counted` stays that of its own."""
        if not self.spread:
            return batch
        tokens = torch.tensor(len(batch.counted), device=batch.counted.device)
        every = [torch.empty_like(tokens) for _ in range(self._count)]
        dist.all_gather(every, tokens)
        longest = int(torch.stack(every).max())
        activations, weights = {}, {}
        for number, hookpoint in enumerate(self.hookpoints):
            owner = number % self._count
            x, weight = (_gather(part[hookpoint], longest, owner) for part in (batch.activations, batch.weights))
            if owner == self._index:
                activations[hookpoint], weights[hookpoint] = x, weight
        return SourceBatch(activations, batch.counted, weights)

    def of_all(self, mine: Mapping[str, T]) -> dict[str, T]:
        """By hookpoint what each process has of its own; small things, which every process gets."""
        if not self.spread:
            return dict(mine)
        every: list[Any] = [None] * self._count
        dist.all_gather_object(every, dict(mine))
        return self._ordered(every)

    def whole_optimizer(self, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """
        On the first process the state of an optimiser that holds all SAEs, on the others `None`.

        Args:
            state (`Mapping`): `state_dict()` of this process' optimiser, with a group for each hookpoint, empty where
                another process holds the SAE.
        """
        groups = dict(zip(self.hookpoints, _groups(state), strict=True))
        mine = {hookpoint: groups[hookpoint] for hookpoint in self.mine}
        every: list[Any] | None = [None] * self._count if self._index == 0 else None
        dist.gather_object(mine, every, dst=0)
        return None if every is None else _state_of(list(self._ordered(every).values()))

    def own_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Of such a state, as `Optimizer.register_load_state_dict_pre_hook` hands it over, this process' part."""
        held = [len(group["params"]) for group in optimizer.param_groups]
        if held == [len(group["params"]) for group in state["param_groups"]]:
            return state
        return _state_of([(own, kept[:number]) for (own, kept), number in zip(_groups(state), held, strict=True)])

    def _ordered(self, every: Sequence[Mapping[str, T]]) -> dict[str, T]:
        return {hookpoint: every[number % self._count][hookpoint] for number, hookpoint in enumerate(self.hookpoints)}


def _gather(x: Tensor, length: int, owner: int) -> Tensor:
    """Rows of all processes, each filled up to `length` with zeros (so of weight 0), at the process `owner`."""
    x = nn.functional.pad(x, (0, 0) * (x.dim() - 1) + (0, length - len(x))).contiguous()
    mine = dist.get_rank() == owner
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())] if mine else None
    dist.gather(x, parts, dst=owner)
    return torch.cat(parts) if parts is not None else x


def _groups(state: Mapping[str, Any]) -> list[tuple[dict[str, Any], list[Any]]]:
    """Of an optimiser's state each group's settings, and what it keeps of the group's parameters, on the CPU."""
    return [
        (
            {key: value for key, value in group.items() if key != "params"},
            [_on_cpu(state["state"].get(number, {})) for number in group["params"]],
        )
        for group in state["param_groups"]
    ]


def _on_cpu(kept: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in kept.items()}


def _state_of(groups: Sequence[tuple[dict[str, Any], list[Any]]]) -> dict[str, Any]:
    state: dict[int, Any] = {}
    param_groups = []
    number = 0
    for settings, kept in groups:
        numbers = list(range(number, number + len(kept)))
        number += len(kept)
        state |= {at: one for at, one in zip(numbers, kept, strict=True) if one}
        param_groups.append({**settings, "params": numbers})
    return {"state": state, "param_groups": param_groups}


class Unreduced(nn.Module):
    """A model that is trained as it is: in the place where DDP would add up the gradients of all processes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.module(*args, **kwargs)
