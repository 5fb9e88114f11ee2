"""The mixture against scikit-learn, closed forms and known mixtures; the correlations against full enumeration."""

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest, spearmanr

from resa_hf.errors import DataError
from resa_hf.features.mixture import (
    count_correlation,
    fit_mixture,
    layer_entropy,
    mixture_correlation,
    suggested_layers,
)

Floats = NDArray[np.float64]

# Table 6 of the paper: reasoning features of Tina-STILL by layer, and the average score of the model tuned there.
LAYERS = np.arange(2, 28)
COUNTS = np.array([1, 4, 3, 2, 2, 3, 0, 3, 3, 1, 1, 3, 3, 3, 0, 3, 0, 5, 3, 0, 1, 2, 2, 1, 2, 2])
SCORES = np.array(
    [
        *(47.84, 46.48, 47.11, 48.05, 46.59, 46.04, 45.69, 47.13, 46.58, 48.12, 47.60, 47.28, 45.48),
        *(48.97, 46.67, 48.09, 49.42, 47.66, 45.83, 47.90, 46.70, 46.07, 46.38, 48.46, 45.84, 47.59),
    ]
)

# A mixture whose components overlap little: the nearest two are 4 of their standard deviations apart.
MEANS, SDS, SHARES = np.array([5.0, 14.0, 22.0]), np.array([1.5, 2.0, 1.5]), np.array([0.4, 0.35, 0.25])


def drawn_counts(size: int, seed: int, layers: NDArray[np.int64] = LAYERS) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    which = rng.choice(3, size, p=SHARES)
    nearest = np.rint(rng.normal(MEANS[which], SDS[which])).astype(int)
    return np.array([(nearest == layer).sum() for layer in layers])


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_that_of_scikit_learn_on_repeated_layers(seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.mixture", reason="scikit-learn comes with the extra `eval`")
    counts = drawn_counts(300, seed)
    repeated = np.repeat(LAYERS, counts)[:, None].astype(float)
    theirs = sklearn.GaussianMixture(3, n_init=20, tol=1e-10, max_iter=5000, reg_covar=0, random_state=0).fit(repeated)
    order = np.argsort(theirs.means_[:, 0])
    ours = fit_mixture(LAYERS, counts, 3)
    assert ours.means == pytest.approx(theirs.means_[order, 0], abs=0.01)
    assert ours.sds == pytest.approx(np.sqrt(theirs.covariances_[order, 0, 0]), abs=0.01)
    assert ours.weights == pytest.approx(theirs.weights_[order], abs=0.005)
    assert ours.log_likelihood == pytest.approx(theirs.score(repeated) * counts.sum(), abs=1e-2)
    assert ours.bic == pytest.approx(theirs.bic(repeated), abs=2e-2)
    assert ours.density(LAYERS) == pytest.approx(np.exp(theirs.score_samples(LAYERS[:, None].astype(float))), abs=1e-4)


def test_means_of_a_known_mixture_are_found() -> None:
    # 2,000 features: each of the 3 means, in each of the 100 draws, is within 0.3 layers. 200 features: on average
    # over the 100 draws each is; in a single draw it need not be, as the standard error alone is 0.2.
    large = np.array([fit_mixture(LAYERS, drawn_counts(2000, seed), 3).means for seed in range(100)])
    assert np.abs(large - MEANS).max() < 0.3
    small = np.array([fit_mixture(LAYERS, drawn_counts(200, seed), 3).means for seed in range(100)])
    assert np.abs(small - MEANS).mean(axis=0).max() < 0.3
    assert np.abs(small - MEANS).max() > 0.3


@pytest.mark.long
def test_bic_finds_the_number_of_components() -> None:
    found = [len(fit_mixture(LAYERS, drawn_counts(1000, seed)).means) for seed in range(10)]
    assert found.count(3) >= 9
    one = np.exp(-((LAYERS - 14) ** 2) / (2 * 4**2))
    assert len(fit_mixture(LAYERS, np.rint(200 * one)).means) == 1


def test_one_component_has_a_closed_form() -> None:
    layers, weights = [1, 4, 9, 20], [2, 3, 0, 5]
    mean = (2 * 1 + 3 * 4 + 5 * 20) / 10
    variance = (2 * (1 - mean) ** 2 + 3 * (4 - mean) ** 2 + 5 * (20 - mean) ** 2) / 10
    fit = fit_mixture(layers, weights, 1)
    likelihood = -10 / 2 * (math.log(2 * math.pi * variance) + 1)
    assert (fit.means, fit.weights) == (pytest.approx((mean,)), pytest.approx((1,)))
    assert fit.sds == pytest.approx((math.sqrt(variance),))
    assert fit.log_likelihood == pytest.approx(likelihood)
    assert fit.bic == pytest.approx(-2 * likelihood + 2 * math.log(10))
    assert fit.density([mean]) == pytest.approx([1 / math.sqrt(2 * math.pi * variance)])


def test_a_single_layer_is_one_layer_wide() -> None:
    fit = fit_mixture([3, 7, 8], [0, 6, 0])
    assert fit.means == pytest.approx((7,)) and fit.sds == pytest.approx((1 / math.sqrt(2 * math.pi),))
    assert fit.log_likelihood == pytest.approx(0, abs=1e-9) and fit.density([7]) == pytest.approx([1])


def test_a_fit_is_seeded_and_scales_with_the_weights() -> None:
    counts = drawn_counts(100, 0)
    fit = fit_mixture(LAYERS, counts, 3)
    assert fit == fit_mixture(LAYERS, counts, 3)
    tripled = fit_mixture(LAYERS, 3 * counts, 3)
    assert tripled.means == pytest.approx(fit.means)
    assert tripled.log_likelihood == pytest.approx(3 * fit.log_likelihood)


def test_more_starts_are_never_less_likely() -> None:
    likelihoods = [fit_mixture(LAYERS, COUNTS, 4, restarts=restarts).log_likelihood for restarts in (1, 3, 10, 30)]
    assert likelihoods == sorted(likelihoods) and likelihoods[0] < likelihoods[-1]


def test_entropy() -> None:
    assert layer_entropy([3] * 26) == pytest.approx(math.log(26))
    assert layer_entropy([0, 7, 0]) == 0
    assert layer_entropy([1, 2, 1]) == pytest.approx(1.5 * math.log(2))
    by_hand = -sum(count / 53 * math.log(count / 53) for count in COUNTS.tolist() if count)
    assert layer_entropy(COUNTS) == pytest.approx(by_hand) == pytest.approx(2.9972, abs=1e-4)


def test_suggested_layers() -> None:
    fit = fit_mixture(LAYERS, drawn_counts(2000, 0), 3)
    assert suggested_layers(fit, LAYERS.tolist()) == [5, 14, 22]
    assert suggested_layers(fit, [0, 6, 20]) == [6, 20]


def test_the_papers_own_counts() -> None:
    # The paper prints figures of the base model's counts (means 4.9, 14.5, 22.7; 41, 37, 22 %), not its counts.
    fit = fit_mixture(LAYERS, COUNTS, 3)
    assert fit.means == pytest.approx((4.19, 14.61, 25.22), abs=0.02)
    assert fit.weights == pytest.approx((0.21, 0.66, 0.13), abs=0.01)
    sklearn = pytest.importorskip("sklearn.mixture", reason="scikit-learn comes with the extra `eval`")
    repeated = np.repeat(LAYERS, COUNTS)[:, None].astype(float)
    for seed in range(5):
        theirs = sklearn.GaussianMixture(3, n_init=10, random_state=seed, reg_covar=1 / (2 * np.pi)).fit(repeated)
        assert theirs.score(repeated) * COUNTS.sum() < fit.log_likelihood + 1e-6
    assert len(fit_mixture(LAYERS, COUNTS).means) == 1


def test_the_papers_figures_are_those_of_one_start_that_ended_early() -> None:
    sklearn = pytest.importorskip("sklearn.mixture", reason="scikit-learn comes with the extra `eval`")
    counted_from_1 = LAYERS - 1
    repeated = np.repeat(counted_from_1, np.rint(SCORES).astype(int))[:, None].astype(float)
    once = sklearn.GaussianMixture(3, random_state=0).fit(repeated)
    order = np.argsort(once.means_[:, 0])
    assert once.means_[order, 0] == pytest.approx([5.6, 15.1, 23.0], abs=0.15)
    assert once.weights_[order] == pytest.approx([0.39, 0.37, 0.24], abs=0.025)
    ours = fit_mixture(counted_from_1, SCORES, 3)
    assert once.score(repeated) < ours.log_likelihood / SCORES.sum()
    assert ours.means != pytest.approx([5.6, 15.1, 23.0], abs=0.5)


def two_sided(null: Floats, estimate: float) -> float:
    """The p-value of an estimate among all orders, itself one of them."""
    return min(1.0, 2 * min((null >= estimate - 1e-8).mean(), (null <= estimate + 1e-8).mean()))


@pytest.mark.parametrize("components", [1, 2])
def test_mixture_correlation_equals_full_enumeration(components: int) -> None:
    layers, counts, scores = np.arange(5), np.array([1, 4, 2, 0, 3]), np.array([3.0, 7.0, 4.0, 1.0, 2.5])
    reference = fit_mixture(layers, counts, components).density(layers)
    null = np.array(
        [
            np.corrcoef(reference, fit_mixture(layers, np.array(order), components).density(layers))[0, 1]
            for order in itertools.permutations(scores)
        ]
    )
    found = mixture_correlation(layers, counts, scores, components=components, permutations=120)
    assert found.estimate == pytest.approx(null[0], abs=1e-8)
    assert found.p_value == pytest.approx(two_sided(null, null[0]))
    assert found.permutations == 120


def test_count_correlation_equals_full_enumeration() -> None:
    counts, scores = np.array([1, 4, 2, 0, 2, 6]), np.array([3.0, 7.0, 4.0, 1.0, 2.5, 2.5])
    null = np.array([spearmanr(counts, order).statistic for order in itertools.permutations(scores)])
    found = count_correlation(counts, scores)
    assert found.estimate == pytest.approx(null[0], abs=1e-8)
    assert found.p_value == pytest.approx(two_sided(null, null[0]))
    assert found.permutations == 720
    drawn = count_correlation(counts, scores, permutations=700)
    assert drawn.permutations == 700
    assert drawn.p_value == pytest.approx(found.p_value, abs=0.08)


def rejections(p_values: Floats) -> None:
    """A p-value is at most alpha in a share alpha of the draws from the null."""
    for alpha in (0.1, 0.3, 0.5, 0.7):
        assert binomtest(int((p_values <= alpha + 1e-9).sum()), len(p_values), alpha).pvalue > 0.001, alpha


def test_p_values_of_the_count_correlation_are_uniform_under_the_null() -> None:
    rng = np.random.default_rng(0)
    p_values = [
        count_correlation(rng.poisson(2, 26), rng.normal(47, 1, 26), permutations=199, seed=seed).p_value
        for seed in range(400)
    ]
    rejections(np.array(p_values))


@pytest.mark.long
def test_p_values_of_the_mixture_correlation_are_uniform_under_the_null() -> None:
    rng = np.random.default_rng(0)
    layers = np.arange(8)
    p_values = [
        mixture_correlation(
            layers, rng.poisson(2, 8) + 1, rng.uniform(1, 5, 8), components=2, permutations=39, seed=seed
        ).p_value
        for seed in range(100)
    ]
    rejections(np.array(p_values))


def test_equal_curves_correlate_fully() -> None:
    counts = drawn_counts(100, 0)
    found = mixture_correlation(LAYERS, counts, counts, components=3, permutations=99)
    assert found.estimate == pytest.approx(1)
    assert found.p_value == pytest.approx(0.02)
    assert count_correlation(counts, 2 * counts, permutations=99).estimate == pytest.approx(1)


def test_the_papers_counts_and_scores() -> None:
    by_layer = count_correlation(COUNTS, SCORES)
    assert by_layer.estimate == pytest.approx(spearmanr(COUNTS, SCORES).statistic, abs=1e-8)
    assert by_layer.estimate < 0 and by_layer.p_value > 0.2
    smoothed = mixture_correlation(LAYERS, COUNTS, SCORES, components=3, permutations=200)
    assert smoothed.estimate > 0.7
    # Two smooth curves over the same layers correlate so highly by chance in more than one of fifty orders.
    assert smoothed.p_value > 0.02


@pytest.mark.parametrize(
    ("layers", "weights", "components", "message"),
    [
        ([1, 2], [1, 1, 1], None, "one each"),
        ([1, 2], [1, -1], None, "not negative"),
        ([1, 2], [0, 0], None, "not all 0"),
        ([1, 2], [1, math.nan], None, "finite"),
        ([1, 2, 3], [1, 1, 0], 3, "between 1 and the 2 layers"),
        ([1, 2, 3], [1, 1, 1], 0, "components is 0"),
    ],
)
def test_bad_input_is_refused(layers: list[int], weights: list[float], components: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_mixture(layers, weights, components)


def test_correlations_refuse_bad_input() -> None:
    with pytest.raises(DataError, match="one score for each count"):
        count_correlation([1, 2, 3], [1, 2])
    with pytest.raises(DataError, match="no correlation"):
        count_correlation([1, 1, 1], [1, 2, 3])
    with pytest.raises(DataError, match="no correlation"):
        mixture_correlation([1, 2, 3], [1, 2, 3], [5, 5, 5])
    with pytest.raises(DataError, match="not negative"):
        mixture_correlation([1, 2, 3], [1, 2, 3], [5, -5, 5])
