"""The nulls of matching: latents that share with an SAE's only what chance and the data's shape give.

Two SAEs of one model read the same activations, most of whose variance lies in few directions. Their latents are
therefore alike without having learned anything in common: pairs of two random SAEs correlate as much, far above what
shuffled tokens would give. So a null has to keep the tokens, the covariance, and how often latents fire.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_array

from ..evaluation.statistics import Interval, accuracy_interval


def check_draws(latents: int, draws: int) -> None:
    """Raises a `ValueError` if there are too few latents for a share, or draws for an interval."""
    if latents < 2:
        raise ValueError(f"{latents} latents to match; a share needs at least 2.")
    if draws < 2:
        raise ValueError(f"nulls is {draws}; an interval needs at least 2 draws, and one of 95% takes 39.")


def compare(
    similarity: NDArray[np.float64], drawn: NDArray[np.floating[Any]]
) -> tuple[float, Interval, tuple[float, float]]:
    """
    How similarities compare with a null's.

    Args:
        similarity (`numpy.ndarray`): shape [pairs].
        drawn (`numpy.ndarray`): the null's, shape [draws, pairs].

    Returns:
        The threshold, the 95th percentile of all of `drawn`; the share of `similarity` above it, with Wilson's
        interval over pairs; and the ends between which a draw's share lies with probability 95%, or
        `(draws - 1) / (draws + 1)` with fewer than 39 draws. Where tokens are so few that many of the null's
        similarities are equal, fewer than 5% of it lie above the threshold, and both ends may be below 5%: then the
        share tells nothing.
    """
    threshold = float(np.quantile(drawn, 0.95))
    # Where the ends of an interval for a further, exchangeable draw lie: hence neither interpolated nor centred.
    low, high = np.quantile((drawn > threshold).mean(axis=1), [0.025, 0.975], method="weibull")
    return threshold, accuracy_interval(similarity > threshold), (float(low), float(high))


def random_directions(
    rows: NDArray[np.float32], draws: int, rng: np.random.Generator
) -> Iterator[NDArray[np.float32]]:
    """
    Random directions with the mean and covariance of given ones.

    Each row's coordinates along the principal axes, from the mean, with random signs: the axes and how much of a row
    lies in each stay, in which direction it points does not. Gaussian directions of that covariance are too weak a
    null where few axes hold most of the variance, for a row that lies mostly in one of them lies little in the others.

    Args:
        rows (`numpy.ndarray`): shape [n, d_in], float32.
        draws (`int`): how many.
        rng (`numpy.random.Generator`): the source of randomness; it is advanced.

    Yields:
        `numpy.ndarray`: shape [n, d_in], float32.
    """
    mean = rows.mean(axis=0)
    centred = rows - mean
    axes = np.linalg.eigh(centred.T @ centred)[1]
    coordinates, signs = centred @ axes, np.array([-1, 1], dtype=rows.dtype)
    for _ in range(draws):
        yield mean + coordinates * rng.choice(signs, coordinates.shape) @ axes.T


def random_firings(
    x: NDArray[np.float32],
    least: NDArray[np.float32],
    directions: NDArray[np.float32],
    counts: NDArray[np.int64],
) -> csc_array:
    """
    Latents that read given directions of the activations, and fire exactly as often as those of an SAE.

    A latent is active where its product with the activation exceeds the SAE's least active latent of that token by
    more than its bias. The bias makes the number of tokens right; the directions that would fire most without one take
    the largest numbers.

    Args:
        x (`numpy.ndarray`): activations minus the SAE's `b_dec`, shape [tokens, d_in], float32.
        least (`numpy.ndarray`): the SAE's smallest active latent of each token, shape [tokens], float32.
        directions (`numpy.ndarray`): shape [n, d_in], float32.
        counts (`numpy.ndarray`): at how many tokens the latents fire, in any order; shape [n], int64.

    Returns:
        `scipy.sparse.csc_array`: shape [tokens, n], float64. Two of [n, tokens] in float32 are held meanwhile.
    """
    products = directions @ x.T
    excess = products - least
    # Where none exceeds the least active latent, the nearest comes first.
    order = np.lexsort((excess.mean(axis=1), (excess > 0).sum(axis=1)))
    wanted = np.empty_like(counts)
    wanted[order] = np.sort(counts)
    values, active = [], []
    last = len(x) - 1
    for product, over, count in zip(products, excess, wanted.tolist(), strict=True):
        ranked = np.argpartition(-over, min(count, last))
        active.append(ranked[:count])
        values.append((product - over[ranked[min(count, last)]])[ranked[:count]])
    starts = np.concatenate([[0], np.cumsum(wanted)])
    return csc_array(
        (np.concatenate(values).astype(np.float64), np.concatenate(active), starts), (len(x), len(wanted))
    )
