"""The null of an edit: random latents that fire as often and add as much as those that are edited."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from ..errors import DataError
from ..sae.autoencoder import SAELensSAE, TopKSAE
from ..sae.totals import wide_dtype
from .batches import activation_batches
from .reading import active_latents, decoder_rows

# The largest ratio of two firing rates or norms that match.
_WITHIN = 2.0


@dataclass(frozen=True)
class Null:
    """What the same edit of random latents of matched firing rate and norm does.

    Args:
        mean (`float`): Mean effect.
        low, high (`float`): 2.5 and 97.5 percentiles.
        p_value (`float`): `(1 + number of them at least as extreme) / (1 + n)`.
        n (`int`): Random sets of latents.
    """

    mean: float
    low: float
    high: float
    p_value: float
    n: int

    @classmethod
    def of(cls, observed: float, effects: ArrayLike) -> "Null":
        """Compares an effect with those of the random sets, by absolute value."""
        drawn = np.asarray(effects, dtype=np.float64)
        low, high = np.quantile(drawn, (0.025, 0.975))
        # A tie counts, also where rounding parts it.
        extreme = int((np.abs(drawn) >= abs(observed) * (1 - 1e-9)).sum())
        return cls(float(drawn.mean()), float(low), float(high), (1 + extreme) / (1 + len(drawn)), len(drawn))


def matched_latents(
    rates: ArrayLike, norms: ArrayLike, latents: Sequence[int], *, count: int, seed: int
) -> NDArray[np.int64]:
    """Random sets of latents that fire as often and add as much as the given ones.

    Each latent is replaced by one of the `count` that are nearest to it in firing rate and norm (the larger of the two
    ratios), none further than a factor of 2 in either. So a single latent gets its nearest neighbours themselves.

    Args:
        rates (`array`):
            `[num_latents]`, share of tokens at which a latent is active.
        norms (`array`):
            `[num_latents]`, what it adds when active: its mean value times the norm of its decoder row.
        latents (sequence of `int`):
            The n latents to match; none of them is ever in a set.
        count (`int`):
            Number of sets.
        seed (`int`):
            Of the draws.

    Returns:
        `numpy.ndarray`: `[count, n]` int64, or fewer rows where there are not so many different sets.

    Raises:
        `DataError`: if a latent is never active, or there is not one set.
    """
    tested = np.asarray(latents, dtype=np.int64)
    sizes = np.stack([np.asarray(rates, dtype=np.float64), np.asarray(norms, dtype=np.float64)])
    silent = tested[(sizes[:, tested] <= 0).any(axis=0)]
    if len(silent):
        raise DataError(f"Latents {silent.tolist()} are never active here, so none is like them: leave them out.")
    others = np.setdiff1d(np.flatnonzero((sizes > 0).all(axis=0)), tested)
    pools = []
    for latent in tested:
        apart = np.abs(np.log(sizes[:, others] / sizes[:, [latent]])).max(axis=0)
        nearest = np.argsort(apart, kind="stable")[:count]
        pools.append(others[nearest[apart[nearest] <= np.log(_WITHIN)]])
    rng = np.random.default_rng(seed)
    sets: dict[tuple[int, ...], list[int]] = {}
    for _ in range(100 * count):
        drawn: list[int] = []
        for pool in pools:
            free = pool[~np.isin(pool, drawn)]
            drawn += [int(rng.choice(free))] if len(free) else []
        if len(drawn) == len(tested):
            sets.setdefault(tuple(sorted(drawn)), drawn)
        if len(sets) == count:
            break
    if not sets:
        lonely = [int(latent) for latent, pool in zip(tested, pools, strict=True) if not len(pool)]
        raise DataError(
            f"No other latents fire as often and add as much as {lonely or tested.tolist()}, within a factor of "
            f"{_WITHIN:g}: test other latents, or fewer at once."
        )
    return np.array(list(sets.values()), dtype=np.int64)


@torch.no_grad()
def latent_statistics(
    model: nn.Module,
    hookpoint: int | str,
    sae: TopKSAE | SAELensSAE,
    rows: Iterable[Mapping[str, Any]],
    *,
    excluded_token_ids: Sequence[int] = (),
    batch_size: int = 8,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How often each latent fires, and how strongly.

    Args:
        model (`torch.nn.Module`), hookpoint (`int` or `str`), sae ([`TopKSAE`] or [`SAELensSAE`]):
            As in [`~resa_hf.features.causal.edited`].
        rows (iterable of mappings):
            Rows with `input_ids`, and `attention_mask` if padded.
        excluded_token_ids (sequence of `int`, *optional*, defaults to `()`):
            Tokens that do not count.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows a forward.

    Returns:
        `tuple[numpy.ndarray, numpy.ndarray]`: both `[num_latents]` float64; the share of counted tokens (no padding)
        at which a latent is active, and its mean value there (0 if there are none).
    """
    device = next(model.parameters()).device
    firings, sums = torch.zeros(2, sae.num_latents, dtype=wide_dtype(device), device=device)
    tokens = 0
    for batch in activation_batches(
        model, hookpoint, rows, excluded_token_ids=excluded_token_ids, batch_size=batch_size
    ):
        x = batch.x[batch.counted.flatten()]
        values, indices = (part.flatten() for part in active_latents(sae, x))
        firings.index_add_(0, indices, (values > 0).to(firings.dtype))
        sums.index_add_(0, indices, values.to(sums.dtype))
        tokens += len(x)
    means = sums / firings.clamp(min=1)
    return (firings / max(tokens, 1)).cpu().double().numpy(), means.cpu().double().numpy()


def decoder_norms(sae: TopKSAE | SAELensSAE) -> NDArray[np.float64]:
    """`[num_latents]` float64: the norm of what one unit of each latent adds."""
    parts = torch.arange(sae.num_latents).split(4096)
    norms = torch.cat([decoder_rows(sae, part).norm(dim=1) for part in parts])
    return norms.cpu().double().numpy()
