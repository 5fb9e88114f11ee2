"""All latents of an SAE on all tokens of some rows, as a sparse matrix, and how two such matrices correlate."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.sparse import csc_array
from torch import nn

from ..errors import DataError
from ..sae.autoencoder import SAELensSAE, TopKSAE
from ..sae.totals import ReconstructionTotals
from .batches import activation_batches
from .reading import active_latents


@dataclass(frozen=True)
class Firings:
    """
    What an SAE reads in the counted tokens of some rows.

    Args:
        latents (`scipy.sparse.csc_array`): shape [tokens, num_latents], float64.
        fvu (`float`): fraction of variance unexplained.
        least (`numpy.ndarray`): the smallest active latent of each token, 0 where none is; shape [tokens], float32.
        x (`numpy.ndarray`): the activations, shape [tokens, d_in], float32; [0, d_in] if they are not kept.
    """

    latents: csc_array
    fvu: float
    least: NDArray[np.float32]
    x: NDArray[np.float32]

    @property
    def counts(self) -> NDArray[np.int64]:
        """At how many tokens each latent is active, shape [num_latents]."""
        return np.diff(self.latents.indptr).astype(np.int64)

    def chosen(self, latents: Sequence[int] | None, most: int | None = None) -> NDArray[np.int64]:
        """The given latents, checked; without any those that fire, the `most` that fire most often at most."""
        if latents is not None:
            return check_latents(latents, self.latents.shape[1])
        often = np.argsort(-self.counts, kind="stable")[:most]
        return np.sort(often[self.counts[often] > 0])


@torch.no_grad()
def read_firings(
    model: nn.Module,
    hookpoint: int | str,
    sae: TopKSAE | SAELensSAE,
    rows: Iterable[Mapping[str, Any]],
    *,
    excluded_token_ids: Sequence[int],
    batch_size: int,
    keep_activations: bool = False,
) -> Firings:
    """
    Reads an SAE on a model. Holds about 12 bytes for each active latent of each token.

    Args:
        model, hookpoint, rows, excluded_token_ids, batch_size: as for [`activation_batches`].
        sae ([`TopKSAE`] or [`SAELensSAE`]): the SAE, on the model's device.
        keep_activations (`bool`, *optional*, defaults to `False`): whether to keep the activations, too.

    Raises:
        `DataError`: if fewer than 2 tokens count.
    """
    totals = ReconstructionTotals(sae)
    values, latents, numbers, least = [], [], [], []
    kept = [torch.empty(0, sae.d_in)]
    tokens = 0
    for batch in activation_batches(
        model, hookpoint, rows, excluded_token_ids=excluded_token_ids, batch_size=batch_size
    ):
        x = batch.x[batch.counted.flatten()]
        if not len(x):
            continue
        active = active_latents(sae, x)
        totals.update(x, torch.ones(len(x), device=x.device))
        token, entry = active.values.nonzero(as_tuple=True)
        values.append(active.values[token, entry].cpu().double())
        latents.append(active.indices[token, entry].cpu())
        numbers.append(token.cpu() + tokens)
        some = active.values.masked_fill(active.values <= 0, torch.inf)
        smallest = F.pad(some, (0, 1), value=torch.inf).amin(dim=1)  # of none, too
        least.append(smallest.masked_fill(smallest.isinf(), 0).float().cpu())
        kept += [x.float().cpu()] if keep_activations else []
        tokens += len(x)
    if tokens < 2:
        raise DataError(
            f"{tokens} token of the rows counts; a correlation needs at least 2, and says little under 1,000."
        )
    entries = (torch.cat(values).numpy(), (torch.cat(numbers).numpy(), torch.cat(latents).numpy()))
    matrix = csc_array(entries, shape=(tokens, sae.num_latents))
    return Firings(matrix, totals.result()["fvu"], torch.cat(least).numpy(), torch.cat(kept).numpy())


def check_latents(latents: Sequence[int], num_latents: int) -> NDArray[np.int64]:
    """The latents without repetitions; a `ValueError` names one that an SAE of so many does not have."""
    chosen = np.array(list(dict.fromkeys(latents)), dtype=np.int64)
    wrong = chosen[(chosen < 0) | (chosen >= num_latents)]
    if len(wrong):
        raise ValueError(f"The SAE has latents 0 to {num_latents - 1}, but no latent {wrong[0]}.")
    return chosen


def correlations(first: csc_array, second: csc_array) -> NDArray[np.float64]:
    """Pearson's, of each column with each: [tokens, n] and [tokens, m] to [n, m]; 0 where a column is constant."""
    return _pearson((first.T @ second).toarray(), first, second, np.outer)


def paired_correlations(first: csc_array, second: csc_array) -> NDArray[np.float64]:
    """Pearson's, of each column with its counterpart: two of shape [tokens, n] to [n]; 0 where one is constant."""
    return _pearson(first.multiply(second).sum(axis=0), first, second, np.multiply)


def _pearson(products: Any, first: csc_array, second: csc_array, combine: np.ufunc | Any) -> NDArray[np.float64]:
    tokens = first.shape[0]
    means = [matrix.mean(axis=0) for matrix in (first, second)]
    squares = [matrix.power(2).mean(axis=0) for matrix in (first, second)]
    variances = [square - mean**2 for square, mean in zip(squares, means, strict=True)]
    # A constant column's variance is rounding.
    deviations = [np.sqrt(np.where(v > 1e-12 * s, v, np.inf)) for v, s in zip(variances, squares, strict=True)]
    found = (products / tokens - combine(*means)) / combine(*deviations)
    return np.clip(found, -1, 1)
