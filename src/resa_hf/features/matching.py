"""Are the latents of one SAE found again in another one? Each answer comes with a matched null."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ..errors import IncompatibleSAEError
from ..evaluation.statistics import Interval
from ..sae.autoencoder import SAELensSAE, TopKSAE
from .firings import check_latents, correlations, read_firings
from .nulls import check_draws, compare, random_directions, random_firings
from .reading import decoder_rows

MOST_LATENTS = 4096


@dataclass(frozen=True)
class Matching:
    """
    Latents of two SAEs, paired one to one so that the sum of similarities is largest, and what chance would give.

    Args:
        first, second (`numpy.ndarray`): latents of each SAE, shape [pairs], int64.
        similarity (`numpy.ndarray`): cosine or correlation of each pair, shape [pairs], float64.
        null_similarity (`numpy.ndarray`): the same of the null's draws, shape [nulls, pairs], float64.
        threshold (`float`): the 95th percentile of `null_similarity`.
        share ([`Interval`]): of pairs above the threshold, with Wilson's interval over pairs.
        null_share (`tuple[float, float]`): between which the share of a null's draw lies with probability 95%, or
            `(nulls - 1) / (nulls + 1)` with fewer than 39 draws.
        kind (`str`): `"decoder"` or `"activation"`.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    similarity: NDArray[np.float64]
    null_similarity: NDArray[np.float64]
    threshold: float
    share: Interval
    null_share: tuple[float, float]
    kind: Literal["decoder", "activation"]


def match_decoders(
    first: TopKSAE | SAELensSAE,
    second: TopKSAE | SAELensSAE,
    *,
    latents: Sequence[int] | None = None,
    candidates: Sequence[int] | None = None,
    nulls: int = 39,
    seed: int = 0,
) -> Matching:
    """
    Pairs latents by the cosine of their decoder rows (Hungarian algorithm, `scipy.optimize.linear_sum_assignment`).

    For SAEs of the same activations, or of models that share their basis, such as a base and its finetunes. The null
    pairs the first SAE's rows with random directions that have the mean and covariance of the second's.

    Args:
        first, second ([`TopKSAE`] or [`SAELensSAE`]):
            The SAEs, of one width.
        latents, candidates (sequence of `int`, *optional*):
            Latents of the first, and of the second. `None` means all, also dead ones, which say nothing. One of the
            two must hold 4,096 at most: give those that fire most often. At 4,096 x 4,096 a draw takes about 1.5 s.
        nulls (`int`, *optional*, defaults to `39`):
            Draws of the null.
        seed (`int`, *optional*, defaults to `0`):
            Equal seeds give equal nulls.

    Returns:
        [`Matching`]: as many pairs as the smaller of the two has latents.

    Raises:
        `IncompatibleSAEError`: if the SAEs differ in width.
        `ValueError`: for fewer than 2 or too many latents, a latent that an SAE does not have, or fewer than 2 draws.
    """
    if first.d_in != second.d_in:
        raise IncompatibleSAEError(
            f"The SAEs read activations of width {first.d_in} and {second.d_in}: their decoders have no cosine. "
            "Match them by activations."
        )
    chosen = _all_latents(first, latents), _all_latents(second, candidates)
    _check(*chosen, nulls)
    rows, others = _unit_rows(first, chosen[0]), _unit_rows(second, chosen[1])
    draws = random_directions(others, nulls, np.random.default_rng(seed))
    return _matching("decoder", *chosen, rows @ others.T, (rows @ _unit(draw).T for draw in draws))


def match_activations(
    model_a: nn.Module,
    sae_a: TopKSAE | SAELensSAE,
    model_b: nn.Module,
    sae_b: TopKSAE | SAELensSAE,
    rows: Iterable[Mapping[str, Any]],
    *,
    hookpoints: tuple[int | str, int | str],
    excluded_token_ids: Sequence[int],
    latents: Sequence[int] | None = None,
    candidates: Sequence[int] | None = None,
    batch_size: int = 8,
    nulls: int = 39,
    seed: int = 0,
) -> Matching:
    """
    Pairs latents by the Pearson correlation of their activations on the same tokens (Hungarian algorithm).

    For any two SAEs whose models share a tokenizer. The null pairs the first SAE's latents with random ones that read
    the second model at the same tokens: directions with the mean and covariance of the second's encoder, each with the
    bias at which it fires as often as one of the second's latents. Shuffled tokens would be too weak a null: two
    random SAEs on one model match in most of their latents by that.

    Args:
        model_a, model_b (`torch.nn.Module`): the causal LMs; they may be the same.
        sae_a, sae_b ([`TopKSAE`] or [`SAELensSAE`]): their SAEs, each on its model's device.
        rows (iterable of mappings): with `input_ids`, and `attention_mask` if padded. For the null,
            `8 * candidates + 4 * d_in` bytes are held for each token that counts.
        hookpoints (`tuple`): where each SAE reads.
        excluded_token_ids (sequence of `int`): tokens that do not count: `tokenizer.all_special_ids`, or `()`.
        latents, candidates (sequence of `int`, *optional*): latents of the first, and of the second. `None` means
            those that fire at all, the 4,096 that fire most often at most. Those given that never fire have
            correlation 0.
        batch_size (`int`, *optional*, defaults to `8`): rows a forward.
        nulls (`int`, *optional*, defaults to `39`): draws of the null.
        seed (`int`, *optional*, defaults to `0`): equal seeds give equal nulls.

    Returns:
        [`Matching`]: as many pairs as the smaller of the two has latents.

    Raises:
        `DataError`: if fewer than 2 tokens count.
        `HookpointError`: if a hookpoint is unknown.
        `ValueError`: as for [`match_decoders`].
    """
    read = partial(read_firings, rows=list(rows), excluded_token_ids=excluded_token_ids, batch_size=batch_size)
    one = read(model_a, hookpoints[0], sae_a)
    other = read(model_b, hookpoints[1], sae_b, keep_activations=True)
    chosen = one.chosen(latents, MOST_LATENTS), other.chosen(candidates, MOST_LATENTS)
    _check(*chosen, nulls)
    first, second = one.latents[:, chosen[0]], other.latents[:, chosen[1]]
    encoder = sae_b.W_enc if isinstance(sae_b, TopKSAE) else sae_b.sae.W_enc
    directions = random_directions(_as_array(encoder.T[chosen[1]]), nulls, np.random.default_rng(seed))
    x = other.x - _as_array(sae_b.b_dec if isinstance(sae_b, TopKSAE) else sae_b.sae.b_dec)
    counts = other.counts[chosen[1]]
    null = (correlations(first, random_firings(x, other.least, draw, counts)) for draw in directions)
    return _matching("activation", *chosen, correlations(first, second), null)


def _matching(
    kind: Literal["decoder", "activation"],
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    similarities: NDArray[Any],
    null: Iterable[NDArray[Any]],
) -> Matching:
    """Pairs `similarities` [first, second], and each of the null's, which have the same shape."""
    pairs = linear_sum_assignment(similarities, maximize=True)
    similarity = similarities[pairs].astype(np.float64)
    drawn = np.stack([draw[linear_sum_assignment(draw, maximize=True)] for draw in null]).astype(np.float64)
    threshold, share, null_share = compare(similarity, drawn)
    return Matching(first[pairs[0]], second[pairs[1]], similarity, drawn, threshold, share, null_share, kind)


def _unit_rows(sae: TopKSAE | SAELensSAE, latents: NDArray[np.int64]) -> NDArray[np.float32]:
    return _unit(_as_array(decoder_rows(sae, torch.from_numpy(latents))))


def _all_latents(sae: TopKSAE | SAELensSAE, latents: Sequence[int] | None) -> NDArray[np.int64]:
    return np.arange(sae.num_latents) if latents is None else check_latents(latents, sae.num_latents)


def _check(first: NDArray[np.int64], second: NDArray[np.int64], nulls: int) -> None:
    fewer = min(len(first), len(second))
    if fewer > MOST_LATENTS:
        raise ValueError(
            f"{len(first):,} latents and {len(second):,} candidates are too many to pair: give at most "
            f"{MOST_LATENTS:,} of one, such as those that fire most often."
        )
    check_draws(fewer, nulls)


def _as_array(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().cpu().float().numpy()


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of norm 1; a row of zeros stays."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
