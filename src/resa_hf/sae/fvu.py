"""FVU and AuxK of an SAE on a batch, with the gradients made in the forward.

So the backward needs no activations: of several SAEs on one batch, only one at a time holds any in its own dtype. And
what encoder and decoder share, the sorted latents and the decoder's product, is made once.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .sparse import LatentBags, SparseProduct, select


class _Sums(NamedTuple):
    """Of a batch: number of counted tokens, their variance times that number, and one over it (0 if it is 0)."""

    tokens: Tensor
    variance: Tensor
    scale: Tensor


class FVULoss(torch.autograd.Function):
    """
    W_enc, b_enc, W_dec, b_dec, activations, weight, k, dead_mask, k_aux, auxk_alpha, whether gradients are wanted, and
    the number of processes that share the batch, to loss, squared error, variance, number of counted tokens and the
    active latents' values and indices.

    What they mean is said at [`~resa_hf.sae.objective.sae_step`]. The activations, of any floating dtype and shape
    [tokens, d_in], get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        x: Tensor,
        weight: Tensor,
        k: int,
        dead_mask: Tensor | None,
        k_aux: int,
        auxk_alpha: float,
        with_gradients: bool,
        processes: int,
    ) -> tuple[Tensor, ...]:
        rows = W_enc.t()
        # Padding may hold NaN, which a weight of zero does not undo.
        centred = (x - b_dec).masked_fill_((weight == 0).unsqueeze(-1), 0)
        sums = _sums(centred, weight, processes)
        found = select(centred, rows, b_enc, k, dead_mask, k_aux)
        decoded = SparseProduct(found.indices, found.values, W_dec)
        residual = decoded.product.sub_(centred)  # x~ - x
        squared_error = _weighted_squares(residual, weight)
        loss = squared_error * sums.scale
        # Gradient of the loss with respect to a residual, over that residual.
        slope = 2 * sums.scale * weight
        parts = [_Part(found.values, found.indices, decoded, slope)]
        if dead_mask is not None:
            dead = SparseProduct(found.aux_indices, found.aux_values, W_dec)
            rest = dead.product.add_(residual)
            factor = auxk_alpha * (dead_mask.sum() / k_aux).clamp(max=1)
            loss = loss + factor * sums.scale * _weighted_squares(rest, weight)
            parts.append(_Part(found.aux_values, found.aux_indices, dead, factor * slope))
        ctx.gradients = _gradients(parts, centred, rows) if with_gradients else None
        others = (squared_error, sums.variance, sums.tokens, found.values, found.indices)
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("The gradients of an SAE's loss can be had once only: do the forward again.")
        # Let go of here, they become the parameters' gradients without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        return *(gradient.mul_(grads[0]) for gradient in gradients), *[None] * 8


class _Part(NamedTuple):
    """
    A sum of decoder rows that the loss depends on.

    Args:
        values, indices (`torch.Tensor`): its latents, shape [tokens, k].
        decoded ([`SparseProduct`]): `decoded.product` holds the residual that this sum is part of.
        slope (`torch.Tensor`): gradient of the loss with respect to the residual, over the residual, shape [tokens].
    """

    values: Tensor
    indices: Tensor
    decoded: SparseProduct
    slope: Tensor


def _gradients(parts: list[_Part], centred: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of W_enc, b_enc, W_dec and b_dec. Only the first part contains b_dec."""
    sums: list[Tensor] = []
    for number, (values, indices, decoded, slope) in enumerate(parts):
        grad = decoded.product.mul_(slope.unsqueeze(-1))
        grad_values = decoded.entry_gradient(grad).mul_(values > 0)
        bags = LatentBags(indices, len(rows))
        found = [
            bags.product(grad_values, centred),
            bags.product(grad_values, grad_values.new_ones(len(values), 1)).squeeze(1),
            bags.product(values, grad),
        ]
        if number == 0:
            sums = [*found, grad.sum(dim=0)]
        else:
            for total, more in zip(sums, found, strict=False):
                total += more
    # The gradient of the centred activations, summed over tokens, is one product of a vector and a matrix.
    sums[3] -= sums[1] @ rows
    return sums[0].t(), sums[1], sums[2], sums[3]


def _sums(centred: Tensor, weight: Tensor, processes: int) -> _Sums:
    tokens = weight.sum()
    mean = (weight @ centred) / tokens.clamp(min=1)
    variance = _weighted_squares(centred - mean, weight)
    if processes > 1:
        variance = _share_of_variance(mean, tokens, variance, processes)
    # Zero for a batch without a counted token, or with only one: there is nothing to explain.
    scale = torch.where(variance > 0, 1 / variance.clamp(min=torch.finfo(centred.dtype).tiny), 0)
    return _Sums(tokens, variance, scale)


def _share_of_variance(mean: Tensor, tokens: Tensor, variance: Tensor, processes: int) -> Tensor:
    """
    Of the variance around the mean of all processes' tokens, the same share for each: the mean of the processes'
    losses over it, which is what DDP minimises, is the FVU of the tokens of all.
    """
    mine = torch.cat([torch.stack([tokens, variance]), mean])
    every = [torch.empty_like(mine) for _ in range(processes)]
    dist.all_gather(every, mine)
    counts, variances, means = (torch.stack(every)[:, part] for part in (0, 1, slice(2, None)))
    overall = counts @ means / counts.sum().clamp(min=1)
    between = counts @ (means - overall).square().sum(dim=-1)
    return (variances.sum() + between) / processes


def _weighted_squares(x: Tensor, weight: Tensor) -> Tensor:
    """Sum over rows of weight times squared norm, without a second matrix."""
    return weight @ torch.linalg.vector_norm(x, dim=-1).square()
