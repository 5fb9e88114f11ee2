"""What Stage I minimises, for one SAE and for several on the same batch."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .autoencoder import TopKSAE
from .fvu import FVULoss


class SAEStep(NamedTuple):
    """
    The loss of one SAE on one batch, and what the logs need. All but `loss` are detached.

    Args:
        loss (`torch.Tensor`): FVU, plus `auxk_alpha` times the AuxK loss. Scalar.
        squared_error (`torch.Tensor`): sum over counted tokens of `||x - x~||^2`. Scalar.
        variance (`torch.Tensor`): sum over counted tokens of `||x - mean||^2`, mean of this batch. Scalar.
        tokens (`torch.Tensor`): number of counted tokens. Scalar.
        firings (`torch.Tensor`): number of counted tokens on which each latent is not zero. Shape [num_latents].
    """

    loss: Tensor
    squared_error: Tensor
    variance: Tensor
    tokens: Tensor
    firings: Tensor


def count_firings(values: Tensor, indices: Tensor, weight: Tensor, num_latents: int) -> Tensor:
    """Number of tokens of weight 1 on which each latent is not zero, shape [num_latents], float32."""
    fired = ((values > 0) * weight.unsqueeze(-1)).float().reshape(-1)
    return fired.new_zeros(num_latents).index_add_(0, indices.reshape(-1), fired)


def sae_step(
    sae: TopKSAE,
    x: Tensor,
    weight: Tensor,
    dead_mask: Tensor | None = None,
    auxk_alpha: float = 0.0,
    processes: int = 1,
) -> SAEStep:
    """
    FVU of a batch, `sum ||x - x~||^2 / sum ||x - mean||^2`, and the AuxK loss of the dead latents.

    FVU is sparsify's loss. AuxK is that of [Gao et al.](https://huggingface.co/papers/2406.04093), appendix A.2: dead
    latents reconstruct the residual without `b_dec`, `sum ||(x - x~) - W_dec z_dead||^2` over the same variance, the
    residual taken as constant; scaled down, as in sparsify, where fewer than `d_in // 2` latents are dead.

    Args:
        sae ([`TopKSAE`]): the SAE.
        x (`torch.Tensor`): activations, shape [tokens, d_in], any floating dtype. They get no gradient.
        weight (`torch.Tensor`): 1 for tokens that count, 0 for the others, shape [tokens], dtype of the SAE.
        dead_mask (`torch.Tensor`, *optional*): which latents are dead, bool, shape [num_latents]. Needed for AuxK.
        auxk_alpha (`float`, *optional*, defaults to `0.0`): weight of the AuxK loss.
        processes (`int`, *optional*, defaults to `1`): how many processes call this at the same time, each with its
            part of one batch. The mean of their losses is that of the batch, and so is the sum of their `variance`s.
    """
    alpha = auxk_alpha if dead_mask is not None else 0.0
    loss, squared_error, variance, tokens, values, indices = FVULoss.apply(
        sae.W_enc,
        sae.b_enc,
        sae.W_dec,
        sae.b_dec,
        x,
        weight,
        sae.k,
        dead_mask if alpha > 0 else None,
        sae.k_aux,
        alpha,
        torch.is_grad_enabled(),
        processes,
    )
    return SAEStep(loss, squared_error, variance, tokens, count_firings(values, indices, weight, sae.num_latents))


class SAEBank(nn.Module):
    """
    The SAEs of several hookpoints as one module, for the `Trainer` and for DDP. The source model is not part of it.

    Args:
        saes (`dict[str, TopKSAE]`):
            Hookpoint to SAE.
    """

    def __init__(self, saes: Mapping[str, TopKSAE]) -> None:
        super().__init__()
        # A ModuleDict takes no dots in its keys.
        self.hookpoints = list(saes)
        self.members = nn.ModuleList(saes.values())

    @property
    def saes(self) -> dict[str, TopKSAE]:
        """Hookpoint to SAE."""
        return dict(zip(self.hookpoints, self.members, strict=True))  # type: ignore[arg-type]

    def forward(
        self,
        activations: dict[str, Tensor],
        weights: dict[str, Tensor],
        dead_masks: dict[str, Tensor] | None = None,
        auxk_alpha: float = 0.0,
        processes: int = 1,
    ) -> dict[str, SAEStep]:
        """
        [`sae_step`] of each SAE. The losses share no parameter, so each SAE trains as if it were alone.

        Args:
            activations (`dict[str, torch.Tensor]`): hookpoint to activations, shape [tokens, d_in].
            weights (`dict[str, torch.Tensor]`): hookpoint to weights, shape [tokens].
            dead_masks (`dict[str, torch.Tensor]`, *optional*): hookpoint to dead latents, shape [num_latents].
            auxk_alpha (`float`, *optional*, defaults to `0.0`): weight of the AuxK loss.
            processes (`int`, *optional*, defaults to `1`): as in [`sae_step`].
        """
        steps = {}
        for hookpoint, sae in self.saes.items():
            dead_mask = None if dead_masks is None else dead_masks[hookpoint]
            x = activations[hookpoint]
            with torch.autocast(x.device.type, enabled=False):
                steps[hookpoint] = sae_step(sae, x, weights[hookpoint], dead_mask, auxk_alpha, processes)
        return steps
