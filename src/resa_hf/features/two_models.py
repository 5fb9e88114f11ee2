"""One SAE read on two models: which of its latents mean the same on both?"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..evaluation.statistics import Interval
from ..sae.autoencoder import SAELensSAE, TopKSAE
from .firings import paired_correlations, read_firings
from .nulls import check_draws, compare

# Latents that fire about as often that take a latent's place in the null.
_ALIKE = 20


@dataclass(frozen=True)
class TwoReadings:
    """
    How an SAE's latents on one model go with the same latents on another.

    Args:
        latents (`numpy.ndarray`): shape [n], int64.
        correlation (`numpy.ndarray`): Pearson's, of each latent on both models; shape [n], float64.
        fvu (`tuple[float, float]`): fraction of variance unexplained on either model, over the same tokens.
        threshold (`float`): the 95th percentile of the correlations in the null's draws.
        share ([`Interval`]): of latents above the threshold: those that survive; with Wilson's interval over latents.
        null_share (`tuple[float, float]`): between which a draw's share lies with probability 95%, or
            `(nulls - 1) / (nulls + 1)` with fewer than 39 draws.
    """

    latents: NDArray[np.int64]
    correlation: NDArray[np.float64]
    fvu: tuple[float, float]
    threshold: float
    share: Interval
    null_share: tuple[float, float]


def read_on_two(
    model_a: nn.Module,
    model_b: nn.Module,
    hookpoint: int | str,
    sae: TopKSAE | SAELensSAE,
    rows: Iterable[Mapping[str, Any]],
    *,
    excluded_token_ids: Sequence[int],
    latents: Sequence[int] | None = None,
    batch_size: int = 8,
    nulls: int = 39,
    seed: int = 0,
) -> TwoReadings:
    """
    Reads one SAE on two models at the same tokens, and correlates each latent with itself.

    The null correlates it with another latent on the second model, one that fires about as often there (one of the
    20 or so nearest). On an unrelated model, too, latents go with the tokens, so that they correlate somewhat; that is
    in this null, and would not be in one of shuffled tokens.

    Args:
        model_a, model_b (`torch.nn.Module`): the causal LMs, with one tokenizer and of one width, on the SAE's device.
        hookpoint (`int` or `str`): where the SAE reads on both.
        sae ([`TopKSAE`] or [`SAELensSAE`]): the SAE.
        rows (iterable of mappings): with `input_ids`, and `attention_mask` if padded.
        excluded_token_ids (sequence of `int`): tokens that do not count: `tokenizer.all_special_ids`, or `()`.
        latents (sequence of `int`, *optional*): which. `None` means those that fire on the first model. One that never
            fires on one of the two has correlation 0.
        batch_size (`int`, *optional*, defaults to `8`): rows a forward.
        nulls (`int`, *optional*, defaults to `39`): draws of the null.
        seed (`int`, *optional*, defaults to `0`): equal seeds give equal nulls.

    Raises:
        `DataError`: if fewer than 2 tokens count.
        `HookpointError`: if the hookpoint is unknown.
        `IncompatibleSAEError`: if a model has another width than the SAE.
        `ValueError`: for fewer than 2 latents, one that the SAE does not have, or fewer than 2 draws.
    """
    read = partial(
        read_firings, sae=sae, rows=list(rows), excluded_token_ids=excluded_token_ids, batch_size=batch_size
    )
    one, other = (read(model, hookpoint) for model in (model_a, model_b))
    chosen = one.chosen(latents)
    check_draws(len(chosen), nulls)
    pool = np.union1d(chosen, np.flatnonzero(one.counts + other.counts))
    drawn = np.stack(
        [
            paired_correlations(one.latents[:, chosen], other.latents[:, partners])
            for partners in _partners(chosen, pool, other.counts, nulls, np.random.default_rng(seed))
        ]
    )
    correlation = paired_correlations(one.latents[:, chosen], other.latents[:, chosen])
    threshold, share, null_share = compare(correlation, drawn)
    return TwoReadings(chosen, correlation, (one.fvu, other.fvu), threshold, share, null_share)


def _partners(
    chosen: NDArray[np.int64], pool: NDArray[np.int64], counts: NDArray[np.int64], draws: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """For each draw and each chosen latent another one of the pool whose count is among the nearest."""
    order = pool[np.argsort(counts[pool], kind="stable")]
    place = np.argsort(order)[np.searchsorted(np.sort(order), chosen)]
    width = min(_ALIKE, len(order) - 1)
    start = np.clip(place - width // 2, 0, len(order) - 1 - width)
    for _ in range(draws):
        partner = start + rng.integers(width, size=len(chosen))
        yield order[partner + (partner >= place)]  # never itself
