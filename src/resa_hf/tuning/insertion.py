"""What is spliced into the model in Stage II: the SAE or a control, its gradient, the positions it skips, its FVU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..sae.totals import wide_dtype


class Insertion(nn.Module):
    """A frozen module at the hookpoint, with the switches of one training step.

    Args:
        module (`torch.nn.Module`):
            Maps `[..., d_in]` to `[..., d_in]`: an SAE or what stands in for it. It is never changed.
        stop_gradient (`bool`):
            Cut the gradient between the module and what lies below the hookpoint.
    """

    def __init__(self, module: nn.Module, stop_gradient: bool) -> None:
        super().__init__()
        self.module = module
        self.stop_gradient = stop_gradient
        self._untouched: torch.Tensor | None = None  # [batch, tokens], True where a position passes untouched
        self._off = False
        self._measured: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    @contextmanager
    def off(self) -> Iterator[None]:
        """Passes everything untouched inside the block."""
        self._off = True
        try:
            yield
        finally:
            self._off = False

    @contextmanager
    def measuring(self, counted: torch.Tensor, sums: list[torch.Tensor]) -> Iterator[None]:
        """Appends the next forward's sums for `fvu_of` to `sums`, over the positions `counted` `[batch, tokens]`."""
        self._measured = (counted, sums)
        try:
            yield
        finally:
            self._measured = None

    def set_untouched(self, positions: torch.Tensor | None) -> None:
        """Positions `[batch, tokens]` (bool) that pass untouched from now on; `None` for none."""
        self._untouched = positions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens, d_in]` -> the same shape and dtype."""
        if self._off:
            return x
        if self.stop_gradient:
            x = x.detach()
        y = self.module(x).to(x.dtype)
        if self._untouched is not None:
            y = torch.where(self._untouched.unsqueeze(-1), x, y)
        if self._measured is not None:
            counted, sums = self._measured
            sums.append(fvu_sums(x.detach(), y.detach(), counted))
            self._measured = None  # gradient checkpointing may run this again in the backward
        if self.stop_gradient and torch.is_grad_enabled():
            # Reentrant gradient checkpointing gives no gradient at all above a state that does not ask for one.
            y = y.detach().requires_grad_()
        return y


def fvu_sums(x: torch.Tensor, y: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """`[d_in + 3]`: squared error, sum of squares, number of positions, sum of x; additive over batches.

    Args:
        x, y (`torch.Tensor`): activations and what they are replaced by, `[batch, tokens, d_in]`.
        counted (`torch.Tensor`): the positions to count, `[batch, tokens]`, bool.
    """
    wide = wide_dtype(x.device)
    # Not picked out by `counted`: the device would have to tell the host how many they are.
    x, y = (z.to(wide).masked_fill(~counted.unsqueeze(-1), 0).flatten(0, -2) for z in (x, y))
    scalars = torch.stack([(x - y).square().sum(), x.square().sum(), counted.sum().to(wide)])
    return torch.cat([scalars, x.sum(0)])


def fvu_of(sums: torch.Tensor) -> float:
    """Fraction of variance unexplained from added-up `fvu_sums`."""
    error, squares, count = sums[:3].tolist()
    variance = squares - float(sums[3:].square().sum()) / max(count, 1)
    return error / variance if variance > 0 else float("nan")
