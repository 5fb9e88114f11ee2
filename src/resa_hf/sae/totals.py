"""Statistics of an SAE: exact over a whole dataset, and of the steps since the last log."""

import torch
from torch import Tensor

from .autoencoder import SAELensSAE, TopKSAE
from .objective import SAEStep, count_firings


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype for long sums: float64, but on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


class ReconstructionTotals:
    """
    FVU, L0 and dead share of an SAE over all tokens it is given: a ratio of sums, not a mean over batches.

    Args:
        sae ([`TopKSAE`] or [`SAELensSAE`]):
            The SAE.
    """

    def __init__(self, sae: TopKSAE | SAELensSAE) -> None:
        self._sae = sae
        parameter = next(sae.parameters())
        self._dtype = wide_dtype(parameter.device)
        # Variance is taken around a fixed point, near the mean if one is known: far from it, rounding would eat it.
        self._origin = torch.zeros(sae.d_in, dtype=self._dtype, device=parameter.device)
        if isinstance(sae, TopKSAE):
            self._origin += sae.b_dec.detach()
        self.sums = self._origin.new_zeros(4)  # squared error, squared distance to the origin, active latents, tokens
        self.shift = torch.zeros_like(self._origin)
        self.firings = torch.zeros(sae.num_latents, device=parameter.device)

    @torch.no_grad()
    def update(self, x: Tensor, weight: Tensor) -> None:
        """
        Adds tokens.

        Args:
            x (`torch.Tensor`): activations, shape [tokens, d_in].
            weight (`torch.Tensor`): 1 for tokens that count, 0 for the others, shape [tokens].
        """
        x = x.masked_fill((weight == 0).unsqueeze(-1), 0)  # padding may hold NaN, which a weight of zero does not undo
        if isinstance(self._sae, TopKSAE):
            x = x.to(self._sae.W_dec.dtype)
            values, indices = self._sae.encode_sparse(x)
            reconstruction = self._sae.decode_sparse(values, indices)
            firings = count_firings(values, indices, weight, self._sae.num_latents)
        else:
            x = x.to(self._sae.sae.dtype)
            latents = self._sae.encode(x)
            reconstruction = self._sae.decode(latents)
            firings = weight.to(latents.dtype) @ (latents != 0).to(latents.dtype)
        wide, weight = x.to(self._dtype) - self._origin, weight.to(self._dtype)
        squared_error = weight @ (x - reconstruction).to(self._dtype).square().sum(dim=-1)
        self.sums += torch.stack(
            [squared_error, weight @ wide.square().sum(dim=-1), firings.sum().to(self._dtype), weight.sum()]
        )
        self.shift += weight @ wide
        self.firings += firings

    def mean(self) -> Tensor:
        """Mean activation of the counted tokens, shape [d_in]."""
        return self._origin + self.shift / self.sums[3].clamp(min=1)

    def result(self) -> dict[str, float]:
        """`fvu`, `l0` (active latents a token), `dead_share` (of latents that never fired here), `tokens`."""
        squared_error, distance, active, tokens = self.sums.tolist()
        variance = distance - float(self.shift.square().sum()) / max(tokens, 1)
        return {
            "fvu": squared_error / variance if variance > 0 else float("nan"),
            "l0": active / max(tokens, 1),
            "dead_share": int((self.firings == 0).sum()) / len(self.firings),
            "tokens": tokens,
        }


class TrainingProgress:
    """
    What Stage I knows of its own course: tokens since each latent last fired, tokens seen, sums for the next log.

    Everything stays on the device until a log or a checkpoint asks for it.

    Args:
        saes (`dict[str, TopKSAE]`):
            Hookpoint to SAE.
    """

    def __init__(self, saes: dict[str, TopKSAE]) -> None:
        device = next(iter(saes.values())).W_dec.device
        self.tokens_seen = torch.zeros((), dtype=torch.long, device=device)
        self.since_fired = {
            hookpoint: torch.zeros(sae.num_latents, dtype=torch.long, device=device) for hookpoint, sae in saes.items()
        }
        self._window = torch.zeros(len(saes), 4, dtype=wide_dtype(device), device=device)

    def update(self, steps: dict[str, SAEStep]) -> None:
        """Adds one batch, whose `firings` and `tokens` are already sums over all processes."""
        for row, (hookpoint, step) in enumerate(steps.items()):
            since = self.since_fired[hookpoint] + step.tokens.long()
            self.since_fired[hookpoint] = torch.where(step.firings > 0, 0, since)
            sums = [step.squared_error, step.variance, step.firings.sum(), step.tokens]
            self._window[row] += torch.stack(sums).to(self._window.dtype)

    def dead_masks(self, dead_after_tokens: int) -> dict[str, Tensor]:
        """Hookpoint to the latents that have not fired for more than so many tokens, bool, shape [num_latents]."""
        return {hookpoint: since > dead_after_tokens for hookpoint, since in self.since_fired.items()}

    def take_window(self) -> Tensor:
        """Sums since the last call: squared error, variance, active latents, tokens; shape [hookpoints, 4]."""
        window = self._window.clone()
        self._window.zero_()
        return window

    def tensors(self, since_fired: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What a checkpoint has to keep; `since_fired` is that of all processes, where each has some of the SAEs."""
        every = self.since_fired if since_fired is None else since_fired
        kept = {f"since_fired/{hookpoint}": since.cpu() for hookpoint, since in every.items()}
        return {"tokens_seen": self.tokens_seen.cpu(), **kept}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """
        Takes up what [`~TrainingProgress.tensors`] gave.

        Raises:
            `KeyError`: if it is of other hookpoints.
            `ValueError`: if it is of other SAEs.
        """
        for name, own in self.tensors().items():
            given = tensors[name]
            if (given.shape, given.dtype) != (own.shape, own.dtype):
                there, here = (f"{list(one.shape)} of {one.dtype}" for one in (given, own))
                raise ValueError(f"{name} is {there}, and that of this run {here}")
        self.tokens_seen.copy_(tensors["tokens_seen"])
        for hookpoint, since in self.since_fired.items():
            since.copy_(tensors[f"since_fired/{hookpoint}"])
