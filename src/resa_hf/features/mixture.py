"""Where along the layers the reasoning features, or the scores, sit: a Gaussian mixture over weighted layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import entropy, permutation_test, rankdata

from ..errors import DataError

Floats = NDArray[np.float64]

# A layer is 1 wide, so the density that stands for its probability must not pass 1. With a lower floor (a uniform
# layer has the variance 1/12), BIC rewards components that sit on single layers.
_VARIANCE_FLOOR = 1 / (2 * np.pi)
_MOST_COMPONENTS = 6
# EM ends when ten steps have gained less log-likelihood than this a unit of weight.
_TOLERANCE = 1e-6
_STEPS = 2000
_STEPS_AT_ONCE = 10
# Permutations refitted at a time, so that the work fits the cache.
_BATCH = 100


@dataclass(frozen=True)
class Mixture:
    """
    A Gaussian mixture over layers.

    Args:
        means (`tuple[float, ...]`):
            Mean layer of each component, ascending.
        sds (`tuple[float, ...]`):
            Standard deviations in layers, at least 0.4, the width of one layer (`1 / sqrt(2 pi)`).
        weights (`tuple[float, ...]`):
            Shares of the components; they sum to 1.
        log_likelihood (`float`):
            Sum over layers of weight times log density, in nats.
        bic (`float`):
            `-2 log_likelihood + (3 components - 1) log(sum of weights)`; lower is better. It is meant for counts,
            whose sum is the number of observations.
    """

    means: tuple[float, ...]
    sds: tuple[float, ...]
    weights: tuple[float, ...]
    log_likelihood: float
    bic: float

    def density(self, x: ArrayLike) -> Floats:
        """Density at layers `x`, shape [n] to [n]."""
        params = np.array([self.means, np.square(self.sds), self.weights])
        return _joint(np.asarray(x, dtype=np.float64), params).sum(axis=0)


def fit_mixture(
    layers: ArrayLike, weights: ArrayLike, components: int | None = None, *, seed: int = 0, restarts: int = 10
) -> Mixture:
    """
    Fits a Gaussian mixture to weighted layers by EM, from several starts, the likeliest of which stays.

    The paper [Resa](https://huggingface.co/papers/2506.09967) fits 3 components to the counts of reasoning
    features and to the scores.

    Args:
        layers (array of shape [n]):
            The layers.
        weights (array of shape [n]):
            Weight of each: its count of reasoning features, or its score. Not negative.
        components (`int`, *optional*):
            Number of components. `None`: that of lowest BIC from 1 to 6, and below the number of layers with weight.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the starts.
        restarts (`int`, *optional*, defaults to `10`):
            Number of starts.

    Raises:
        `DataError`: if layers and weights differ in length, a weight is negative or not finite, all are 0, or there
            are fewer layers with weight than components.
    """
    x, w = _checked(layers, weights)
    distinct = len(np.unique(x[w > 0]))
    if components is not None and not 1 <= components <= distinct:
        raise DataError(f"components is {components}; it must lie between 1 and the {distinct} layers with weight.")
    most = max(1, min(_MOST_COMPONENTS, distinct - 1))
    numbers = range(1, most + 1) if components is None else [components]
    fits = []
    for number in numbers:
        params, likelihoods = _fit(x, w[None], number, seed, restarts)
        means, variances, shares = params[:, 0, np.argsort(params[0, 0])]
        sds = np.sqrt(variances)
        likelihood = float(likelihoods[0])
        bic = -2 * likelihood + (3 * number - 1) * float(np.log(w.sum()))
        fits.append(Mixture(tuple(means.tolist()), tuple(sds.tolist()), tuple(shares.tolist()), likelihood, bic))
    return min(fits, key=lambda fit: fit.bic)


def _checked(layers: ArrayLike, weights: ArrayLike) -> tuple[Floats, Floats]:
    x, w = np.asarray(layers, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if x.ndim != 1 or x.shape != w.shape:
        raise DataError(f"There are layers of shape {x.shape} and weights of shape {w.shape}; wanted: one each.")
    if not (np.isfinite(x).all() and np.isfinite(w).all() and (w >= 0).all() and w.any()):
        raise DataError(f"Weights of layers must be finite, not negative and not all 0; they are {w.tolist()}.")
    return x, w


def _fit(x: Floats, weights: Floats, components: int, seed: int, restarts: int) -> tuple[Floats, Floats]:
    """
    EM for many sets of weights at once, shape [sets, n].

    Returns:
        Means, variances and shares, shape [3, sets, components], and log-likelihoods, shape [sets].
    """
    # The starts depend on the weights and the seed only, so that equal weights get equal fits.
    noise = np.random.default_rng(seed).gumbel(size=(restarts, len(x)))
    with np.errstate(divide="ignore"):
        keys = np.log(weights)[:, None] + noise
    # The largest of log weight plus Gumbel noise are layers drawn by weight, without replacement.
    starts = x[np.argsort(-keys, axis=-1)[..., :components]].reshape(-1, components)
    w = np.repeat(weights / weights.sum(axis=1, keepdims=True), restarts, axis=0)
    centre = w @ x
    spread = np.maximum(w @ x**2 - centre**2, _VARIANCE_FLOOR)[:, None] / components
    params = np.stack([starts, np.broadcast_to(spread, starts.shape), np.full(starts.shape, 1 / components)])
    likelihoods = np.full(len(w), -np.inf)
    running = np.arange(len(w))
    for _ in range(_STEPS // _STEPS_AT_ONCE):
        for _ in range(_STEPS_AT_ONCE):
            params[:, running] = _step(x, w[running], params[:, running])
        before = likelihoods[running]
        likelihoods[running] = _likelihood(x, w[running], params[:, running])
        running = running[likelihoods[running] - before > _TOLERANCE]
        if not len(running):
            break
    sets = np.arange(len(weights))
    best = likelihoods.reshape(-1, restarts).argmax(axis=1)
    chosen = params.reshape(3, -1, restarts, components)[:, sets, best]
    return chosen, likelihoods.reshape(-1, restarts)[sets, best] * weights.sum(axis=1)


def _joint(x: Floats, params: Floats) -> Floats:
    """Share times density of each component, shape [..., components, n]."""
    means, variances, shares = params[..., None]
    scaled: Floats = shares / np.sqrt(2 * np.pi * variances) * np.exp(-((x - means) ** 2) / (2 * variances))
    return scaled


def _step(x: Floats, w: Floats, params: Floats) -> Floats:
    joint = _joint(x, params)
    tiny = np.finfo(np.float64).tiny  # a layer without weight may have no density, a component no weight
    joint *= (w / np.maximum(joint.sum(axis=1), tiny))[:, None]
    shares = joint.sum(axis=2)
    means = joint @ x / np.maximum(shares, tiny)
    variances = joint @ x**2 / np.maximum(shares, tiny) - means**2
    return np.stack([means, np.maximum(variances, _VARIANCE_FLOOR), shares])


def _likelihood(x: Floats, w: Floats, params: Floats) -> Floats:
    density = np.maximum(_joint(x, params).sum(axis=1), np.finfo(np.float64).tiny)
    likelihood: Floats = (w * np.log(density)).sum(axis=1)
    return likelihood


def layer_entropy(weights: ArrayLike) -> float:
    """
    Shannon entropy, in nats, of the distribution over layers that the weights are in proportion to.

    Args:
        weights (array of shape [n]): counts or scores by layer, not negative, not all 0.
    """
    return float(entropy(np.asarray(weights, dtype=np.float64)))


def suggested_layers(mixture: Mixture, layers: Sequence[int]) -> list[int]:
    """
    Where to try an SAE: the layer nearest to the mean of each component, the heaviest component first.

    Args:
        mixture ([`Mixture`]): of the counts of reasoning features.
        layers (sequence of `int`): the layers that have an SAE.
    """
    order = np.argsort(mixture.weights)[::-1]
    return list(dict.fromkeys(min(layers, key=lambda layer: abs(layer - mixture.means[one])) for one in order))


@dataclass(frozen=True)
class Correlation:
    """
    A correlation over layers, and its p-value.

    Args:
        estimate (`float`):
            The correlation.
        p_value (`float`):
            Two-sided, under scores that do not depend on the layer: the scores are permuted over the layers.
        permutations (`int`):
            How many permutations stand behind the p-value.
    """

    estimate: float
    p_value: float
    permutations: int


def mixture_correlation(
    layers: ArrayLike,
    counts: ArrayLike,
    scores: ArrayLike,
    *,
    components: int | None = None,
    seed: int = 0,
    permutations: int = 1000,
) -> Correlation:
    """
    Pearson's correlation, over the layers, of the densities of two mixtures: of the counts and of the scores.

    Two smooth curves over few layers correlate by chance, hence the null: each permutation of the scores is fitted
    anew. If there are no more than `permutations` orders of the scores, each is tried once.

    Args:
        layers (array of shape [n]):
            The layers.
        counts (array of shape [n]):
            Reasoning features at each.
        scores (array of shape [n]):
            Score at each, not negative. What is common to all layers makes the curve flat; subtract it if it is known.
        components (`int`, *optional*):
            Components of both mixtures. `None`: the number that BIC chooses for the counts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the fits and of the permutations.
        permutations (`int`, *optional*, defaults to `1000`):
            Number of permutations.

    Raises:
        `DataError`: as [`fit_mixture`] does.
    """
    x, w = _checked(layers, scores)
    of_counts = fit_mixture(x, counts, components, seed=seed)
    number = len(of_counts.means)
    fit_mixture(x, w, number, restarts=1)

    def density(permuted: Floats) -> Floats:
        params, _ = _fit(x, permuted.reshape(-1, len(x)), number, seed, 10)
        return _joint(x, params).sum(axis=1).reshape(permuted.shape)

    return _permuted(of_counts.density(x), w, density, seed, permutations)


def count_correlation(
    counts: ArrayLike, scores: ArrayLike, *, seed: int = 0, permutations: int = 10_000
) -> Correlation:
    """
    Spearman's correlation of counts and scores over the layers.

    Args:
        counts (array of shape [n]):
            Reasoning features at each layer.
        scores (array of shape [n]):
            Score at each.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the permutations.
        permutations (`int`, *optional*, defaults to `10_000`):
            Number of permutations; each order once if there are no more.

    Raises:
        `DataError`: if there is not one score for each count.
    """
    if np.shape(counts) != np.shape(scores) or np.ndim(counts) != 1:
        raise DataError(f"Wanted one score for each count, not shapes {np.shape(scores)} and {np.shape(counts)}.")
    return _permuted(rankdata(counts), rankdata(scores), lambda ranks: ranks, seed, permutations)


def _permuted(
    reference: Floats, x: Floats, curve: Callable[[Floats], Floats], seed: int, permutations: int
) -> Correlation:
    """Pearson's correlation of `reference` and `curve(x)`, with x permuted under the null."""
    if np.ptp(reference) == 0 or np.ptp(x) == 0:
        raise DataError("All layers have the same count, or the same score: there is no correlation to measure.")
    centred = reference - reference.mean()

    def correlation(permuted: Any, axis: int) -> Any:
        curves = curve(permuted)
        curves = curves - curves.mean(axis=-1, keepdims=True)
        norms = np.linalg.norm(centred) * np.linalg.norm(curves, axis=-1)
        # Rounded, because equal orders, fitted in batches of other sizes, differ in their last bits.
        return np.round(curves @ centred / norms, 9)

    result = permutation_test(
        (x,),
        correlation,
        permutation_type="pairings",
        vectorized=True,
        n_resamples=permutations,
        batch=_BATCH,
        # Not the stream of the fits' starts: the orders must not depend on what is computed from them.
        rng=np.random.default_rng([seed, 1]),
    )
    return Correlation(float(result.statistic), float(result.pvalue), len(result.null_distribution))
