"""What Stage II logs, gathered on the device without waiting for it, and read at logging time."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..hookpoints import decoder_layers
from ..sae.totals import wide_dtype
from .insertion import fvu_of

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
        """
        mask = inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
        sums = [divergence.sum(), entropy.sum(), max(divergence.numel(), entropy.numel()), tokens]
        device = divergence.device
        # `full` makes a number on the device; one that is copied there is waited for.
        made = [x if isinstance(x, Tensor) else torch.full((), float(x), device=device) for x in sums]
        self._sums.append(torch.stack([x.to(wide_dtype(device)) for x in made]))
        if first_step and divergence.numel():
            self._initial.append(self._sums[-1][[0, 2]])
        if divergence.numel():
            self._quantiles.append(_quantiles(divergence))

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes since the last call, which must be made by every process."""
        if not self._sums:
            return {}
        kl, entropy, count, tokens = accelerator.reduce(torch.stack(self._sums).sum(0)).tolist()
        values = {"tokens": tokens}
        if self._quantiles:
            values["kl"] = kl / max(count, 1)
            # Means of the micro-batches' quantiles: close to the quantiles, without keeping every token.
            quantiles = accelerator.reduce(torch.stack(self._quantiles).mean(0), reduction="mean").tolist()
            values |= {f"kl_p{round(q * 100)}": value for q, value in zip(QUANTILES, quantiles, strict=True)}
        if self._initial:
            initial_kl, initial_count = accelerator.reduce(torch.stack(self._initial).sum(0)).tolist()
            values["initial_kl"] = initial_kl / max(initial_count, 1)
        if entropy:
            values["cross_entropy"] = entropy / max(count, 1)
        if self.fvu_sums:
            values["splice_fvu"] = fvu_of(accelerator.reduce(torch.stack(self.fvu_sums).sum(0)))
        values |= {name: norm.item() for name, norm in self.gradients.items()}
        self.fvu_sums, self.gradients, self._sums, self._quantiles, self._initial = [], {}, [], [], []
        return values


def _quantiles(values: torch.Tensor) -> torch.Tensor:
    # torch.quantile refuses more than 2^24 values; a sort does not.
    ordered = values.float().sort().values
    return torch.stack([ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in QUANTILES])


def gradient_norms(model: nn.Module, last_below: int) -> dict[str, torch.Tensor]:
    """Norms of the accumulated gradient, before clipping, at or below decoder layer `last_below` and above it."""
    _, layers = decoder_layers(model)
    below = {parameter for layer in list(layers)[: last_below + 1] for parameter in layer.parameters()}
    grads: dict[str, list[torch.Tensor]] = {"grad_norm_below": [], "grad_norm_above": []}
    for parameter in model.parameters():
        if parameter.grad is not None:
            grads["grad_norm_below" if parameter in below else "grad_norm_above"].append(parameter.grad)
    return {name: torch.nn.utils.get_total_norm(tensors) for name, tensors in grads.items()}
