"""The optimiser of Stage I."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from .tiles import tiles


class ScheduleFreeSignum(torch.optim.Optimizer):
    """
    Sign descent with an average of its iterates instead of a learning-rate schedule.

    What the released Resa code calls Signum (sparsify's `signum`): the schedule-free method of
    [The Road Less Scheduled](https://huggingface.co/papers/2405.15682) around sign descent. Gradients are taken at
    `y = (1 - momentum) z + momentum x`; then `z = z - lr sign(g)`, and `x` is the average of all `z` so far, weighted
    by `lr^2`. Parameters hold `y` while training; [`~ScheduleFreeSignum.use_average`] puts `x`, the result, in its
    place. Both are kept, so switching there and back changes no bit.

    Signum with an average of gradients is no substitute here. The sign of an average stays after the gradient is gone,
    so it goes on moving latents that no longer fire; at sparsify's learning rates that diverges.

    Args:
        params (iterable of `torch.Tensor` or of `dict`):
            Parameters, or groups of them.
        lr (`float`):
            Length of a step of `z` in every coordinate.
        momentum (`float`, *optional*, defaults to `0.95`):
            How far `y` lies from the latest iterate towards the average; at least 0 and below 1.

    Raises:
        `ValueError`: if `lr` is negative or `momentum` out of range.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, momentum: float = 0.95) -> None:
        if lr < 0:
            raise ValueError(f"lr must not be negative, but is {lr}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, but is {momentum}.")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_sum": 0.0})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. Coordinates without a gradient keep their `z`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if all(parameter.grad is None for parameter in group["params"]):
                continue  # no step, which must not count in the average
            weight = group["lr"] ** 2
            group["weight_sum"] += weight
            share = weight / group["weight_sum"] if weight else 0.0
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["z"] = parameter.clone()
                    state["x"] = parameter.clone()
                for y, grad, z, x in tiles(parameter, parameter.grad, state["z"], state["x"]):
                    z.add_(grad.sign(), alpha=-group["lr"])
                    x.lerp_(z, share)
                    torch.lerp(x, z, 1 - group["momentum"], out=y)
        return loss

    @torch.no_grad()
    def use_average(self) -> None:
        """Puts the average of the iterates, `x`, into the parameters: to evaluate or to save."""
        for parameter, state in self.state.items():
            parameter.copy_(state["x"])

    @torch.no_grad()
    def use_training_point(self) -> None:
        """Puts `y`, where gradients are taken, into the parameters: to go on training."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.state:
                    state = self.state[parameter]
                    torch.lerp(state["x"], state["z"], 1 - group["momentum"], out=parameter)
