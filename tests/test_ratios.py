"""Ratios against Fieller's closed form and the test that it inverts, and by simulation."""

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import optimize, stats
from simulated_answers import answers, solved

from resa_hf.evaluation.ratios import ratio_over_problems, ratio_over_seeds

SEEDS = np.random.default_rng(0).normal([[0.55], [0.6], [0.4]], 0.02, (3, 6))


def fieller(top, bottom, level):
    """The closed form with g (Finney, 1978)."""
    n, a, b = len(top), np.mean(top), np.mean(bottom)
    (v11, v12), (_, v22) = np.cov(top, bottom) / n
    t = stats.t.ppf((1 + level) / 2, n - 1)
    g = t**2 * v22 / b**2
    r = a / b
    half = t / b * math.sqrt(v11 - 2 * r * v12 + r**2 * v22 - g * (v11 - v12**2 / v22))
    return (r - g * v12 / v22 - half) / (1 - g), (r - g * v12 / v22 + half) / (1 - g)


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_over_seeds_is_fiellers_closed_form(level):
    tuned, rl, base = SEEDS
    retention = ratio_over_seeds(tuned, rl, level=level)
    assert retention.estimate == pytest.approx(tuned.mean() / rl.mean())
    assert_allclose((retention.low, retention.high), fieller(tuned, rl, level))
    gain = ratio_over_seeds(tuned, rl, base, level)
    assert gain.estimate == pytest.approx((tuned.mean() - base.mean()) / (rl.mean() - base.mean()))
    assert_allclose((gain.low, gain.high), fieller(tuned - base, rl - base, level))


def test_ends_are_where_the_t_test_turns():
    tuned, rl, base = SEEDS
    gain = ratio_over_seeds(tuned, rl, base)

    def p(ratio):
        return stats.ttest_1samp(tuned - base - ratio * (rl - base), 0).pvalue - 0.05

    assert gain.low == pytest.approx(optimize.brentq(p, -5, gain.estimate))
    assert gain.high == pytest.approx(optimize.brentq(p, gain.estimate, 5))


def test_a_denominator_without_spread_is_a_t_interval():
    tuned = SEEDS[0]
    ratio = ratio_over_seeds(tuned, np.full(6, 0.5))
    assert_allclose((ratio.low, ratio.high), np.array(stats.t.interval(0.95, 5, tuned.mean(), stats.sem(tuned))) / 0.5)


def test_a_gain_that_may_be_none_has_no_bounds():
    rng = np.random.default_rng(1)
    base = rng.normal(0.5, 0.02, 5)
    rl, tuned = base + rng.normal(0.0, 0.02, 5), base + 0.1
    assert stats.ttest_rel(rl, base).pvalue > 0.05
    gain = ratio_over_seeds(tuned, rl, base)
    assert (gain.low, gain.high) == (-math.inf, math.inf)
    assert gain.estimate == pytest.approx(np.mean(tuned - base) / np.mean(rl - base))
    nothing = ratio_over_seeds(tuned, base, base)
    assert math.isnan(nothing.estimate) and (nothing.low, nothing.high) == (-math.inf, math.inf)
    same = np.eye(8, 4)
    nothing = ratio_over_problems({"a": same}, {"a": same}, {"a": np.repeat(same, 3, axis=1)})
    assert math.isnan(nothing.estimate) and (nothing.low, nothing.high) == (-math.inf, math.inf)


def test_bounds_end_where_the_denominator_may_be_0():
    rng = np.random.default_rng(2)
    bounded = []
    for _ in range(200):
        tuned, rl = rng.normal(0.1, 0.1, 5), rng.normal(0.1, 0.1, 5)
        low, high = stats.ttest_1samp(rl, 0).confidence_interval()
        ratio = ratio_over_seeds(tuned, rl)
        bounded.append(math.isfinite(ratio.low))
        assert bounded[-1] == math.isfinite(ratio.high) == (not low < 0 < high)
    assert 20 < sum(bounded) < 180


def test_over_many_problems_is_fiellers_closed_form():
    rng = np.random.default_rng(3)
    chances = solved(rng, 1000, 0.4, 0.3)
    base, tuned, rl = (answers(rng, chances ** (1 / power), 4) for power in (1, 1.5, 2))
    gain = ratio_over_problems({"a": tuned}, {"a": rl}, {"a": base})
    means = [outcomes.mean(axis=1) for outcomes in (tuned, rl, base)]
    expected = fieller(means[0] - means[2], means[1] - means[2], 0.95)
    assert_allclose((gain.low, gain.high), expected, atol=0.05 * (expected[1] - expected[0]))
    # One number a problem, as tokens or seconds are, is the same as its samples' mean.
    by_mean = ratio_over_problems({"a": means[0]}, {"a": means[1]}, {"a": means[2]})
    assert_allclose((by_mean.estimate, by_mean.low, by_mean.high), (gain.estimate, gain.low, gain.high))
    assert gain == ratio_over_problems({"a": tuned}, {"a": rl}, {"a": base})


def test_tasks_count_the_same_whatever_their_size():
    rng = np.random.default_rng(4)
    tuned = {"small": answers(rng, np.full(20, 0.5), 8), "large": answers(rng, np.full(400, 0.8), 1)}
    rl = {"large": answers(rng, np.full(400, 0.9), 2), "small": answers(rng, np.full(20, 0.7), 4)}
    ratio = ratio_over_problems(tuned, rl)
    assert ratio.estimate == pytest.approx(
        (tuned["small"].mean() + tuned["large"].mean()) / (rl["small"].mean() + rl["large"].mean())
    )
    alone = ratio_over_problems({"small": tuned["small"]}, {"small": rl["small"]})
    assert 0.3 < (ratio.high - ratio.low) / (alone.high - alone.low) < 0.6


def coverage_over_seeds(seeds, draws):
    rng = np.random.default_rng(seeds)
    hits = 0
    for _ in range(draws):
        base = rng.normal(0.4, 0.02, seeds)
        tuned, rl = base + rng.normal(0.08, 0.03, seeds), base + rng.normal(0.1, 0.03, seeds)
        gain = ratio_over_seeds(tuned, rl, base)
        hits += gain.low <= 0.8 <= gain.high
    return hits / draws


def coverage_over_problems(problems, samples, draws):
    """[retention, gain recovered]; the gain of RL is 0.2 on every problem, the tuned model's 0.15."""
    hits = np.zeros(2)
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        chances = 0.8 * solved(rng, problems, 0.5, 0.3)
        base, tuned, rl = ({"a": answers(rng, chances + gain, samples)} for gain in (0.0, 0.15, 0.2))
        retention = ratio_over_problems(tuned, rl, resamples=499, seed=seed)
        gain = ratio_over_problems(tuned, rl, base, resamples=499, seed=seed)
        hits += retention.low <= 0.55 / 0.6 <= retention.high, gain.low <= 0.75 <= gain.high
    return hits / draws


def test_coverage():
    # Standard errors 0.5% and 1.1%.
    assert coverage_over_seeds(5, 2000) == pytest.approx(0.95, abs=0.015)
    assert coverage_over_problems(30, 16, 400) == pytest.approx(0.95, abs=0.033)


@pytest.mark.long
def test_coverage_in_full():
    for seeds in (5, 10):
        assert coverage_over_seeds(seeds, 20_000) == pytest.approx(0.95, abs=0.007)
    for problems, samples in ((30, 16), (200, 4)):
        assert coverage_over_problems(problems, samples, 4000) == pytest.approx(0.95, abs=0.015)
    # With one answer to each of 30 problems the gain is often not distinguishable from 0, and the ratio unbounded.
    retention, gain = coverage_over_problems(30, 1, 4000)
    assert abs(retention - 0.95) < 0.015 and gain > 0.935


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (([0.5], [0.5]), "1 seeds; an interval needs at least 2"),
        (([0.5, 0.6], [0.5]), r"shapes \[\(2,\), \(1,\)\]"),
        (([0.5, 0.6], [0.5, 0.6], [0.5]), "wanted: one a seed"),
        (([[0.5], [0.6]], [[0.5], [0.6]]), "wanted: one a seed"),
        (([0.5, math.nan], [0.5, 0.6]), "over seeds are not all finite"),
        (([0.5, 0.6], [0.5, 0.6], None, 95), "level is 95"),
    ],
)
def test_seeds_without_a_ratio(values, message):
    with pytest.raises(ValueError, match=message):
        ratio_over_seeds(*values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (({}, {}), "wanted: at least one"),
        (({"a": [0, 1]}, {"b": [0, 1]}), r"\[\['a'\], \['b'\]\]"),
        (({"a": [0, 1]}, {"a": [0, 1, 1]}), "a has shapes"),
        (({"a": [0, 1]}, {"a": [[], []]}), "a has shapes"),
        (({"a": [1]}, {"a": [1]}), "1 problems of a"),
        (({"a": [1, math.inf]}, {"a": [1, 1]}), "over problems of a are not all finite"),
    ],
)
def test_problems_without_a_ratio(values, message):
    with pytest.raises(ValueError, match=message):
        ratio_over_problems(*values)
