"""The encoder and decoder of a TopK SAE with gradients that touch active latents only.

A dense implementation multiplies [tokens, num_latents] matrices six times a step, though only k entries of a row are
non-zero. Here one dense product remains, the encoder's forward; everything else gathers rows.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .topk import largest

# Elements of the pre-activations held at a time. On an accelerator 256 MiB in float32: those of 32,768 tokens on
# 65,536 latents would take 8.6 GB. On a CPU 16 MiB: what fits the cache need not be read back.
_MAX_ELEMENTS = 2**26
_MAX_ELEMENTS_CPU = 2**22
# A product of fewer rows with the encoder would spend its time on reading the encoder.
_MIN_ROWS = 256


def encoder_rows(tokens: int, num_latents: int, device: torch.device) -> int:
    """Tokens whose pre-activations, `num_latents` each, are held at a time."""
    elements = _MAX_ELEMENTS_CPU if device.type == "cpu" else _MAX_ELEMENTS
    return min(max(_MIN_ROWS, elements // num_latents), tokens)


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
    zeros = torch.zeros(indices.shape, dtype=rows.dtype, device=rows.device)
    return SparseProduct(indices, zeros, rows).entry_gradient(x.to(rows.dtype))


class SparseProduct:
    """
    [`weighted_row_sum`], and what its entries mean for it.

    Args:
        indices (`torch.Tensor`): column of each entry, shape [tokens, k], int64.
        values (`torch.Tensor`): entries, shape [tokens, k].
        rows (`torch.Tensor`): dense matrix, shape [num_latents, d].
    """

    def __init__(self, indices: Tensor, values: Tensor, rows: Tensor) -> None:
        with torch.enable_grad():
            self._entries = values.detach().to(rows.dtype).requires_grad_()
            self._bags = F.embedding_bag(indices, rows.detach(), per_sample_weights=self._entries, mode="sum")

    @property
    def product(self) -> Tensor:
        """The product, shape [tokens, d]. It may be changed in place."""
        return self._bags.detach()

    def entry_gradient(self, grad: Tensor) -> Tensor:
        """
        The gradient of the entries, shape [tokens, k], from that of the product, shape [tokens, d]. Once only.

        The kernel for the gradient of an embedding bag's weights needs no [tokens, k, d] tensor.
        """
        return torch.autograd.grad(self._bags, self._entries, grad)[0]


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
        # The 32 bits of an int sort in half the time.
        latents, self._order = indices.reshape(-1).int().sort(stable=True)
        self._tokens = self._order.div(indices.shape[1], rounding_mode="floor")
        first = torch.arange(num_latents, dtype=torch.int32, device=indices.device)
        self._starts = torch.searchsorted(latents, first)

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


class Selected(NamedTuple):
    """
    The latents that [`select`] chose.

    Args:
        values (`torch.Tensor`): of the k largest, shape [tokens, k].
        indices (`torch.Tensor`): which they are, int64, shape [tokens, k].
        aux_values (`torch.Tensor`): of the `k_aux` largest dead ones, shape [tokens, k_aux].
        aux_indices (`torch.Tensor`): which they are, int64, shape [tokens, k_aux].
    """

    values: Tensor
    indices: Tensor
    aux_values: Tensor
    aux_indices: Tensor


def select(
    centred: Tensor, rows: Tensor, b_enc: Tensor, k: int, dead_mask: Tensor | None = None, k_aux: int = 0
) -> Selected:
    """
    ReLU and TopK of `centred @ rows.T + b_enc`, and, for AuxK, the largest of the dead latents.

    Living latents that fill up the second selection, where fewer than `k_aux` are dead, have value zero. Runs without
    autograd only.

    Args:
        centred (`torch.Tensor`): activations less `b_dec`, shape [tokens, d_in].
        rows (`torch.Tensor`): the encoder with one latent a row, shape [num_latents, d_in].
        b_enc (`torch.Tensor`): shape [num_latents].
        k (`int`): number of active latents a token.
        dead_mask (`torch.Tensor`, *optional*): which latents are dead, bool, shape [num_latents].
        k_aux (`int`, *optional*, defaults to `0`): number of dead latents a token, if there is a `dead_mask`.
    """
    tokens, num_latents = len(centred), len(rows)
    k_aux = 0 if dead_mask is None else k_aux
    values, aux_values = centred.new_empty(tokens, k), centred.new_empty(tokens, k_aux)
    indices, aux_indices = (torch.empty_like(found, dtype=torch.long) for found in (values, aux_values))
    chunk = encoder_rows(tokens, num_latents, centred.device)
    # One buffer for all chunks: the system would clear the memory of each anew.
    buffer = centred.new_empty(chunk, num_latents)
    for start in range(0, tokens, chunk):
        part = slice(start, min(start + chunk, tokens))
        pre = torch.addmm(b_enc, centred[part], rows.t(), out=buffer[: part.stop - start])
        values[part], indices[part] = largest(pre, k)
        if dead_mask is not None:
            pre.masked_fill_(~dead_mask, -torch.inf)
            aux_values[part], aux_indices[part] = largest(pre, k_aux)
    return Selected(values.relu_(), indices, aux_values.relu_(), aux_indices)


class TopKEncode(torch.autograd.Function):
    """Values and indices of [`select`], with a gradient, from x, b_dec, rows, b_enc and k."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b_dec: Tensor, rows: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
        centred = x - b_dec
        values, indices, _, _ = select(centred, rows, b_enc, k)
        ctx.save_for_backward(centred, rows, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        centred, rows, values, indices = ctx.saved_tensors
        needs_x, needs_b_dec, needs_rows, needs_b_enc = ctx.needs_input_grad[:4]
        grad = grads[0] * (values > 0)
        grad_x = grad_b_dec = grad_rows = grad_b_enc = None
        if needs_x:
            grad_x = weighted_row_sum(indices, grad, rows)
        if needs_b_dec or needs_rows or needs_b_enc:
            bags = LatentBags(indices, rows.shape[0])
            grad_rows = bags.product(grad, centred) if needs_rows else None
            grad_b_enc = bags.product(grad, grad.new_ones(len(grad), 1)).squeeze(1)
            # The gradient of x, summed over tokens, is one product of a vector and a matrix.
            grad_b_dec = -(grad_b_enc @ rows) if needs_b_dec else None
        return grad_x, grad_b_dec, grad_rows, grad_b_enc, None


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
