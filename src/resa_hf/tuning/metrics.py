"""What Stage II logs, gathered on the device without waiting for it, and read at logging time."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..guards import check_divergence
from ..hookpoints import decoder_layers
from ..sae.totals import wide_dtype
from .insertion import fvu_of
from .sharded import whole

QUANTILES = (0.5, 0.9, 0.99)


class StepMetrics:
    """Sums since the last log.

    Attributes:
        fvu_sums (`list[torch.Tensor]`): of `Insertion.measuring`.
        gradients (`dict[str, torch.Tensor]`): of `gradient_norms`.
    """

    def __init__(self) -> None:
        self.fvu_sums: list[torch.Tensor] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self._sums: list[torch.Tensor] = []
        self._quantiles: list[torch.Tensor] = []
        self._initial: list[torch.Tensor] = []

    def add(self, divergence: torch.Tensor, entropy: torch.Tensor, inputs: dict[str, Any], first_step: bool) -> None:
        """Adds one micro-batch: per-token losses in nats, each `[counted]` or empty.

        The KL of the first step, before the adapter has moved, is logged once more as `initial_kl`.

        Raises:
            `TrainingError`: if it is exactly zero there.
        """
        if first_step:
            check_divergence(divergence)
        mask = inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
        tokens = 0 if "blank" in inputs else tokens
        sums = [divergence.sum(), entropy.sum(), max(divergence.numel(), entropy.numel()), tokens]
        device = divergence.device
        # `full` makes a number on the device; one that is copied there is waited for.
        made = [x if isinstance(x, Tensor) else torch.full((), float(x), device=device) for x in sums]
        self._sums.append(torch.stack([x.to(wide_dtype(device)) for x in made]))
        if first_step:
            kl_count = torch.full((), float(divergence.numel()), dtype=self._sums[-1].dtype, device=device)
            self._initial.append(torch.stack([self._sums[-1][0], kl_count]))
        self._quantiles.append(_quantiles(divergence))

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes since the last call, which must be made by every process."""
        if not self._sums:
            return {}
        kl, entropy, count, tokens = accelerator.reduce(torch.stack(self._sums).sum(0)).tolist()
        values = {"tokens": tokens}
        # Means of the micro-batches' quantiles: close to the quantiles, without keeping every token. Every process
        # takes part in each reduction, also one whose batches had nothing to count.
        *quantiles, measured = accelerator.reduce(torch.stack(self._quantiles).sum(0)).tolist()
        if measured:
            values["kl"] = kl / max(count, 1)
            names = [f"kl_p{round(q * 100)}" for q in QUANTILES]
            values |= {name: value / measured for name, value in zip(names, quantiles, strict=True)}
        if self._initial:
            initial_kl, initial_count = accelerator.reduce(torch.stack(self._initial).sum(0)).tolist()
            if initial_count:
                values["initial_kl"] = initial_kl / initial_count
        if entropy:
            values["cross_entropy"] = entropy / max(count, 1)
        if self.fvu_sums:
            values["splice_fvu"] = fvu_of(accelerator.reduce(torch.stack(self.fvu_sums).sum(0)))
        values |= {name: norm.item() for name, norm in self.gradients.items()}
        self.fvu_sums, self.gradients, self._sums, self._quantiles, self._initial = [], {}, [], [], []
        return values

    def tokens(self, accelerator: Accelerator) -> int:
        """Those of all processes since the last log; every process must ask."""
        return int(accelerator.reduce(torch.stack(self._sums).sum(0))[-1]) if self._sums else 0


def _quantiles(values: torch.Tensor) -> torch.Tensor:
    """The quantiles and a 1, or zeros if there are no values."""
    if not values.numel():
        return torch.zeros(len(QUANTILES) + 1, device=values.device)
    # torch.quantile refuses more than 2^24 values; a sort does not.
    ordered = values.float().sort().values
    picked = [ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in QUANTILES]
    return torch.stack([*picked, torch.ones_like(picked[0])])


def gradient_norms(model: nn.Module, last_below: int) -> dict[str, torch.Tensor]:
    """Norms of the accumulated gradient, before clipping, at or below decoder layer `last_below` and above it."""
    _, layers = decoder_layers(model)
    below = {parameter for layer in list(layers)[: last_below + 1] for parameter in layer.parameters()}
    grads: dict[str, list[torch.Tensor]] = {"grad_norm_below": [], "grad_norm_above": []}
    for parameter in model.parameters():
        if parameter.grad is not None:
            grads["grad_norm_below" if parameter in below else "grad_norm_above"].append(parameter.grad)
    return {name: whole(torch.nn.utils.get_total_norm(tensors)) for name, tensors in grads.items()}
