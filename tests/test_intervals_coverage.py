"""By simulation: how often 95% intervals hold the truth, and how often a test finds what is not there."""

import itertools

import numpy as np
import pytest
from simulated_answers import answers, pair, solved

from resa_hf.evaluation.statistics import accuracy_interval, paired_over_problems, paired_over_seeds

CORRELATIONS = (0.0, 0.3, 0.7)


def accuracy_coverage(accuracies, draws, problems=30, samples=16, seed=0):
    """[correlations, accuracies] share of 95% intervals that hold the truth."""
    rng = np.random.default_rng(seed)
    shares = np.zeros((len(CORRELATIONS), len(accuracies)))
    for (i, correlation), (j, accuracy) in itertools.product(enumerate(CORRELATIONS), enumerate(accuracies)):
        for _ in range(draws):
            interval = accuracy_interval(answers(rng, solved(rng, problems, accuracy, correlation), samples))
            shares[i, j] += interval.low <= accuracy <= interval.high
    return shares / draws


def test_accuracy_coverage():
    shares = accuracy_coverage([0.05, 0.2, 0.5, 0.8, 0.95], draws=400)
    # 6000 draws: standard error 0.3% on average, 1.3% in a cell.
    assert abs(shares.mean() - 0.95) < 0.016
    assert shares.min() > 0.92 - 3 * 0.013


@pytest.mark.long
def test_accuracy_coverage_in_full():
    # Where few problems are solved, or few are not, the coverage goes up and down with the accuracy.
    shares = accuracy_coverage([0.05, 0.06, 0.07, 0.08, 0.09, *np.arange(0.1, 0.91, 0.1), 0.92, 0.95], draws=4000)
    assert abs(shares.mean() - 0.95) < 0.01
    assert shares.min() > 0.92
    assert accuracy_coverage([0.06, 0.08, 0.12], draws=2000, samples=64).min() > 0.92


@pytest.mark.parametrize("seeds", [5, 10])
def test_seed_level_coverage(seeds):
    rng = np.random.default_rng(0)
    hits, draws = 0, 4000
    for _ in range(draws):
        # Each seed trains an adapter of its own quality, and both models answer 500 questions.
        base = rng.binomial(500, 0.5, seeds) / 500
        treated = rng.binomial(500, np.clip(rng.normal(0.55, 0.03, seeds), 0, 1)) / 500
        difference = paired_over_seeds(treated, base)
        hits += difference.low <= 0.05 <= difference.high
    assert abs(hits / draws - 0.95) < 0.015


def null_and_coverage(draws, samples, resamples, shift):
    """Shares of p < 0.05, and of intervals that hold the truth, 30 problems."""
    found = held = 0
    for seed in range(draws):
        treated, base = pair(30, samples, shift, seed)
        difference = paired_over_problems(treated, base, resamples=resamples, seed=seed)
        found += difference.p_value < 0.05
        # chances + shift against chances, whatever the problem.
        held += difference.low <= shift <= difference.high
    return found / draws, held / draws


def test_false_positives_and_coverage_over_problems():
    found, held = null_and_coverage(1000, (16, 16), 999, shift=0.0)
    # Standard error 0.7%.
    assert abs(found - 0.05) < 0.02
    assert abs(held - 0.95) < 0.02
    found, held = null_and_coverage(300, (4, 4), 199, shift=0.2)
    assert found > 0.8
    assert held > 0.91


@pytest.mark.long
@pytest.mark.parametrize("samples", [(16, 16), (16, 8)])
def test_false_positives_and_coverage_over_problems_in_full(samples):
    found, held = null_and_coverage(8000, samples, 999, shift=0.0)
    assert abs(found - 0.05) < 0.007
    assert abs(held - 0.95) < 0.01


@pytest.mark.long
def test_false_positives_whatever_the_problems():
    rates = np.zeros((len(CORRELATIONS), 4))
    rng, draws = np.random.default_rng(0), 3000
    for (i, correlation), (j, accuracy) in itertools.product(enumerate(CORRELATIONS), enumerate([0.1, 0.3, 0.5, 0.9])):
        for _ in range(draws):
            chances = solved(rng, 30, accuracy, correlation)
            treated, base = answers(rng, chances, 16), answers(rng, chances, 16)
            rates[i, j] += paired_over_problems(treated, base, resamples=999).p_value < 0.05
    rates /= draws
    # Standard errors 0.4% and 0.14%. With few problems that can change, there is less to find by mistake.
    assert rates.max() < 0.057 + 0.008
    assert abs(rates[:2].mean() - 0.05) < 0.007
