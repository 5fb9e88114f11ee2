"""Reading an SAE: which latents are active on activations, and what each of them adds to the reconstruction."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import IncompatibleSAEError
from ..sae.autoencoder import SAELensSAE, TopKSAE

# Rows of a dense [rows, num_latents] tensor held at a time.
_ROWS = 256


class Active(NamedTuple):
    """
    The active latents of each token, in no particular order.

    Args:
        values (`torch.Tensor`):
            Shape [tokens, k], dtype of the SAE; 0 where an entry is not active.
        indices (`torch.Tensor`):
            The latents, shape [tokens, k], int64.
    """

    values: Tensor
    indices: Tensor


@torch.no_grad()
def active_latents(sae: TopKSAE | SAELensSAE, x: Tensor) -> Active:
    """
    The active latents of any SAE, without the dense tensor of all of them.

    Args:
        sae ([`TopKSAE`] or [`SAELensSAE`]):
            The SAE.
        x (`torch.Tensor`):
            Activations on the SAE's device, shape [tokens, d_in], any floating dtype.

    Returns:
        [`Active`]: k is the SAE's own for TopK, else the most latents that any token activates.

    Raises:
        `IncompatibleSAEError`: if the SAE has another width than the activations.
    """
    if x.shape[-1] != sae.d_in:
        raise IncompatibleSAEError(f"The SAE reads activations of width {sae.d_in}, not of width {x.shape[-1]}.")
    if isinstance(sae, TopKSAE):
        return Active(*sae.encode_sparse(x))
    chunks = [_largest(sae.encode(part)) for part in x.split(_ROWS)]
    k = max(values.shape[1] for values, _ in chunks)
    padded = [[F.pad(tensor, (0, k - tensor.shape[1])) for tensor in chunk] for chunk in chunks]
    return Active(*(torch.cat(parts) for parts in zip(*padded, strict=True)))


def _largest(latents: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of each row that are not 0; sae-lens' AbsTopK has negative ones."""
    indices = latents.abs().topk(int((latents != 0).sum(dim=1).max()), dim=1).indices
    return latents.gather(1, indices), indices


@torch.no_grad()
def decoder_rows(sae: TopKSAE | SAELensSAE, latents: Tensor | Sequence[int]) -> Tensor:
    """
    What one unit of each latent adds to the reconstruction.

    Args:
        sae ([`TopKSAE`] or [`SAELensSAE`]):
            The SAE.
        latents (`torch.Tensor` or sequence of `int`):
            Which latents, n of them.

    Returns:
        `torch.Tensor`: shape [n, d_in], dtype and device of the SAE.

    Raises:
        `IncompatibleSAEError`: if the SAE rescales its output by the norm of its input, so that one unit of a latent
            adds something else at each token.
    """
    parameter = next(sae.parameters())
    chosen = torch.as_tensor(latents, dtype=torch.long, device=parameter.device)
    if isinstance(sae, TopKSAE):
        return sae.W_dec[chosen]
    normalization = sae.sae.cfg.normalize_activations
    if normalization in ("constant_norm_rescale", "layer_norm"):
        raise IncompatibleSAEError(
            f"The SAE normalises each token (normalize_activations {normalization!r}), so that a latent adds "
            "something else at each. Use an SAE with normalize_activations 'none'."
        )
    # Some kinds scale their decoder, so its rows are asked for, not taken: sae-lens' TopK by its norms.
    bias = sae.decode(parameter.new_zeros(1, sae.num_latents))
    parts = chosen.split(_ROWS)
    return torch.cat([sae.decode(F.one_hot(part, sae.num_latents).to(parameter.dtype)) - bias for part in parts])
