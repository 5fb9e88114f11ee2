"""The encoder and decoder of a TopK SAE with gradients that touch active latents only.

A dense implementation multiplies [tokens, num_latents] matrices six times a step, though only k entries of a row are
non-zero. Here one dense product remains, the encoder's forward; everything else gathers rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of the pre-activations held at a time. On an accelerator 256 MiB in float32: those of 32,768 tokens on
# 65,536 latents would take 8.6 GB. On a CPU 8 MiB: what fits the cache need not be read back.
_MAX_ELEMENTS = 2**26
_MAX_ELEMENTS_CPU = 2**21
# A product of fewer rows with the encoder would spend its time on reading the encoder.
_MIN_ROWS = 256


def weighted_row_sum(indices: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """
    Product of a sparse matrix, given by its non-zero entries, with a dense one.

    Args:
        indices (`torch.Tensor`): column of each entry, shape [tokens, k], int64.
        values (`torch.Tensor`): entries, shape [tokens, k].
        rows (`torch.Tensor`): dense matrix, shape [num_latents, d].

    Returns:
        `torch.Tensor`: shape [tokens, d], dtype of `rows`.
    """
    return F.embedding_bag(indices, rows, per_sample_weights=values.to(rows.dtype), mode="sum")


def row_products(indices: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    """
    The entries at `indices` of `x @ rows.T`, without the others.

    Args:
        indices (`torch.Tensor`): column of each entry, shape [tokens, k], int64.
        rows (`torch.Tensor`): dense matrix, shape [num_latents, d].
        x (`torch.Tensor`): dense matrix, shape [tokens, d].

    Returns:
        `torch.Tensor`: shape [tokens, k], dtype of `rows`.
    """
    # This is what the gradient of the weights of an embedding bag is; its kernel needs no [tokens, k, d] tensor.
    with torch.enable_grad():
        weights = torch.zeros(indices.shape, dtype=rows.dtype, device=rows.device, requires_grad=True)
        bags = F.embedding_bag(indices, rows.detach(), per_sample_weights=weights, mode="sum")
    return torch.autograd.grad(bags, weights, x.to(rows.dtype))[0]


class LatentBags:
    """
    The tokens of each latent: the transpose of the sparse matrix of [`weighted_row_sum`].

    Args:
        indices (`torch.Tensor`): column of each entry, shape [tokens, k], int64.
        num_latents (`int`): number of columns.
    """

    def __init__(self, indices: Tensor, num_latents: int) -> None:
        # Entries sorted by latent make each latent one bag of tokens. Unlike index_add_, this has one order of
        # summation, so it is deterministic on every device; and searchsorted, unlike bincount, waits for no device.
        latents, self._order = indices.reshape(-1).sort(stable=True)
        self._tokens = self._order.div(indices.shape[1], rounding_mode="floor")
        self._starts = torch.searchsorted(latents, torch.arange(num_latents, device=indices.device))

    def product(self, values: Tensor, x: Tensor) -> Tensor:
        """
        Product of the transposed sparse matrix with a dense one.

        Args:
            values (`torch.Tensor`): entries, shape [tokens, k].
            x (`torch.Tensor`): dense matrix, shape [tokens, d].

        Returns:
            `torch.Tensor`: shape [num_latents, d], dtype of `x`.
        """
        weights = values.reshape(-1)[self._order].to(x.dtype)
        return F.embedding_bag(self._tokens, x, self._starts, mode="sum", per_sample_weights=weights)


class TopKEncode(torch.autograd.Function):
    """
    ReLU and TopK of `(x - b_dec) @ rows.T + b_enc`, and, for AuxK, the largest of the dead latents.

    `rows` is the encoder with one latent a row, shape [num_latents, d_in]. Returns values and indices of the k largest
    latents, shape [tokens, k], then of the `k_aux` largest dead ones, shape [tokens, k_aux] (empty without a
    `dead_mask`). Living latents that fill up the second selection, where fewer than `k_aux` are dead, have value zero.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b_dec: Tensor, rows: Tensor, b_enc: Tensor, k: int, dead_mask: Tensor | None, k_aux: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        centred = x - b_dec
        tokens = x.shape[0]
        k_aux = 0 if dead_mask is None else k_aux
        values, aux_values = x.new_empty(tokens, k), x.new_empty(tokens, k_aux)
        indices = torch.empty(tokens, k, dtype=torch.long, device=x.device)
        aux_indices = torch.empty(tokens, k_aux, dtype=torch.long, device=x.device)
        elements = _MAX_ELEMENTS_CPU if x.device.type == "cpu" else _MAX_ELEMENTS
        chunk = max(_MIN_ROWS, elements // rows.shape[0])
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            pre = torch.addmm(b_enc, centred[part], rows.t())
            values[part], indices[part] = pre.topk(k, dim=-1, sorted=False)
            if dead_mask is not None:
                pre.masked_fill_(~dead_mask, -torch.inf)
                aux_values[part], aux_indices[part] = pre.topk(k_aux, dim=-1, sorted=False)
        values.relu_()
        aux_values.relu_()
        ctx.save_for_backward(centred, rows, values, indices, aux_values, aux_indices)
        ctx.mark_non_differentiable(indices, aux_indices)
        return values, indices, aux_values, aux_indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        centred, rows, values, indices, aux_values, aux_indices = ctx.saved_tensors
        needs_x, needs_b_dec, needs_rows, needs_b_enc = ctx.needs_input_grad[:4]
        indices = torch.cat([indices, aux_indices], dim=1)
        grad = torch.cat([grads[0] * (values > 0), grads[2] * (aux_values > 0)], dim=1)
        grad_x = grad_b_dec = grad_rows = grad_b_enc = None
        if needs_x:
            grad_x = weighted_row_sum(indices, grad, rows)
        if needs_b_dec or needs_rows or needs_b_enc:
            bags = LatentBags(indices, rows.shape[0])
            grad_rows = bags.product(grad, centred) if needs_rows else None
            grad_b_enc = bags.product(grad, grad.new_ones(len(grad), 1)).squeeze(1)
            # The gradient of x, summed over tokens, is one product of a vector and a matrix.
            grad_b_dec = -(grad_b_enc @ rows) if needs_b_dec else None
        return grad_x, grad_b_dec, grad_rows, grad_b_enc, None, None, None


class SparseDecode(torch.autograd.Function):
    """`z @ W_dec` for latents given as values and indices, both of shape [tokens, k]; W_dec is [num_latents, d_in]."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec)
        return weighted_row_sum(indices, values, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, W_dec = ctx.saved_tensors
        grad_values = row_products(indices, W_dec, grads[0].contiguous()) if ctx.needs_input_grad[0] else None
        grad_W_dec = None
        if ctx.needs_input_grad[2]:
            grad_W_dec = LatentBags(indices, W_dec.shape[0]).product(values, grads[0].contiguous())
        return grad_values, None, grad_W_dec
