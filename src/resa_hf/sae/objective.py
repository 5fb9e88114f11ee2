"""What Stage I minimises, for one SAE and for several on the same batch."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .autoencoder import TopKSAE


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
    sae: TopKSAE, x: Tensor, weight: Tensor, dead_mask: Tensor | None = None, auxk_alpha: float = 0.0
) -> SAEStep:
    """
    FVU of a batch, `sum ||x - x~||^2 / sum ||x - mean||^2`, and the AuxK loss of the dead latents.

    FVU is sparsify's loss. AuxK is that of [Gao et al.](https://huggingface.co/papers/2406.04093), appendix A.2: dead
    latents reconstruct the residual without `b_dec`, `sum ||(x - x~) - W_dec z_dead||^2` over the same variance, the
    residual taken as constant; scaled down, as in sparsify, where fewer than `d_in // 2` latents are dead.

    Args:
        sae ([`TopKSAE`]): the SAE.
        x (`torch.Tensor`): activations, shape [tokens, d_in].
        weight (`torch.Tensor`): 1 for tokens that count, 0 for the others, shape [tokens], dtype of the SAE.
        dead_mask (`torch.Tensor`, *optional*): which latents are dead, bool, shape [num_latents]. Needed for AuxK.
        auxk_alpha (`float`, *optional*, defaults to `0.0`): weight of the AuxK loss.
    """
    # Padding may hold NaN, which a weight of zero does not undo.
    x = x.to(sae.W_dec.dtype).masked_fill((weight == 0).unsqueeze(-1), 0)
    if dead_mask is not None and auxk_alpha > 0:
        values, indices, dead_values, dead_indices = sae.encode_with_dead(x, dead_mask)
    else:
        values, indices = sae.encode_sparse(x)
    error = x - sae.decode_sparse(values, indices)
    tokens = weight.sum()
    mean = (weight @ x) / tokens.clamp(min=1)
    variance = weight @ (x - mean).square().sum(dim=-1)
    # Zero for a batch without a counted token, or with only one: there is nothing to explain.
    scale = torch.where(variance > 0, 1 / variance.clamp(min=torch.finfo(x.dtype).tiny), 0)
    squared_error = weight @ error.square().sum(dim=-1)
    loss = squared_error * scale
    if dead_mask is not None and auxk_alpha > 0:
        rest = error.detach() - sae.decode_sparse(dead_values, dead_indices, bias=False)
        few = (dead_mask.sum() / dead_values.shape[-1]).clamp(max=1)
        loss = loss + auxk_alpha * few * scale * (weight @ rest.square().sum(dim=-1))
    with torch.no_grad():
        firings = count_firings(values, indices, weight, sae.num_latents)
    return SAEStep(loss, squared_error.detach(), variance, tokens, firings)


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
    ) -> dict[str, SAEStep]:
        """
        [`sae_step`] of each SAE. The losses share no parameter, so each SAE trains as if it were alone.

        Args:
            activations (`dict[str, torch.Tensor]`): hookpoint to activations, shape [tokens, d_in].
            weights (`dict[str, torch.Tensor]`): hookpoint to weights, shape [tokens].
            dead_masks (`dict[str, torch.Tensor]`, *optional*): hookpoint to dead latents, shape [num_latents].
            auxk_alpha (`float`, *optional*, defaults to `0.0`): weight of the AuxK loss.
        """
        steps = {}
        for hookpoint, sae in self.saes.items():
            dead_mask = None if dead_masks is None else dead_masks[hookpoint]
            x = activations[hookpoint]
            with torch.autocast(x.device.type, enabled=False):
                steps[hookpoint] = sae_step(sae, x, weights[hookpoint], dead_mask, auxk_alpha)
        return steps
