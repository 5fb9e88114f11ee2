"""The macro-average against naive formulas, and by simulation on tasks as unequal as the paper's."""

import itertools
import math

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import optimize, stats
from simulated_answers import answers, pair, solved

from resa_hf.evaluation.macro import equivalent_macro, macro_accuracy, paired_macro
from resa_hf.evaluation.statistics import accuracy_interval, equivalent_over_problems, paired_over_problems

SIZES = {"aime24": (30, 16), "aime25": (30, 16), "amc23": (40, 16), "math_500": (500, 1)}


def two_models(sizes, shift, seed):
    pairs = {task: pair(n, (m, m), shift, seed * 100 + i) for i, (task, (n, m)) in enumerate(sizes.items())}
    return {task: both[0] for task, both in pairs.items()}, {task: both[1] for task, both in pairs.items()}


def welch(treated, base):
    """Mean of the tasks' differences, its standard error and degrees of freedom, by the textbook."""
    differences = [treated[task].mean(axis=1) - base[task].mean(axis=1) for task in treated]
    weight = 1 / len(differences)
    parts = [weight**2 * stats.sem(values) ** 2 for values in differences]
    freedom = sum(parts) ** 2 / sum(part**2 / (len(v) - 1) for part, v in zip(parts, differences, strict=True))
    return sum(weight * values.mean() for values in differences), math.sqrt(sum(parts)), freedom


def test_one_task_is_the_plain_comparison():
    treated, base = pair(40, (4, 4), 0.1, seed=3)
    assert paired_macro({"a": treated}, {"a": base}, 0.9, 500, 7) == paired_over_problems(treated, base, 0.9, 500, 7)
    assert equivalent_macro({"a": treated}, {"a": base}, 0.2) == equivalent_over_problems(treated, base, 0.2)
    plain, macro = accuracy_interval(treated, 0.9), macro_accuracy({"a": treated}, 0.9)
    assert_allclose((macro.estimate, macro.low, macro.high), (plain.estimate, plain.low, plain.high))


def test_tasks_count_the_same_whatever_their_size():
    treated, base = two_models(SIZES, 0.1, seed=0)
    mean, error, freedom = welch(treated, base)
    difference = paired_macro(treated, base)
    assert difference.estimate == pytest.approx(mean)
    assert (difference.n, difference.over) == (600, "problems")
    low, high = stats.t.interval(0.95, freedom, mean, error)
    assert_allclose((difference.low, difference.high), (low, high), atol=0.1 * error)
    assert difference.high - difference.low >= high - low - 1e-12


def test_few_changes_get_the_mid_p_of_all_sign_flips():
    treated, base = two_models({"a": (4, 2), "b": (6, 3)}, 0.3, seed=1)
    parts = np.concatenate([(treated[t].mean(axis=1) - base[t].mean(axis=1)) / len(base[t]) for t in "ab"])
    flipped = np.array([abs(np.dot(signs, parts)) for signs in itertools.product((-1, 1), repeat=len(parts))])
    tied = np.abs(flipped - abs(parts.sum())) < 1e-9
    expected = np.mean(tied) / 2 + np.mean((flipped > abs(parts.sum())) & ~tied)
    assert 0 < expected < 1
    assert paired_macro(treated, base).p_value == pytest.approx(expected)


def test_order_of_the_tasks_does_not_matter():
    treated, base = two_models(SIZES, 0.05, seed=2)
    backwards = dict(reversed(treated.items()))
    assert paired_macro(backwards, base, resamples=300) == paired_macro(treated, base, resamples=300)


def test_equivalence_is_two_one_sided_t_tests():
    treated, base = two_models(SIZES, 0.0, seed=4)
    mean, error, freedom = welch(treated, base)
    for margin in (0.02, 0.05):
        expected = max(stats.t.sf((margin + mean) / error, freedom), stats.t.sf((margin - mean) / error, freedom))
        assert equivalent_macro(treated, base, margin) == pytest.approx(expected)


@pytest.mark.parametrize("sizes", [(30,), (30, 30), (5, 30, 40), (200, 3, 500)])
def test_equal_answers_prove_only_what_their_number_can(sizes):
    same = {str(i): np.ones(n) for i, n in enumerate(sizes)}
    # Where could a macro-average difference of 0.1 hide best from so many problems?
    total = 0.1 * len(sizes)
    best = optimize.minimize(
        lambda d: -np.dot(sizes, np.log1p(-d)),
        np.full(len(sizes), 0.1),
        bounds=[(0, 0.999)] * len(sizes),
        constraints={"type": "eq", "fun": lambda d: d.sum() - total},
        options={"ftol": 1e-12},
    )
    assert equivalent_macro(same, same, 0.1) == pytest.approx(math.exp(-best.fun), rel=1e-3)
    assert equivalent_macro(same, same, 1.5) == 0


def test_macro_accuracy_of_large_tasks_is_the_normal_interval():
    rng = np.random.default_rng(0)
    outcomes = {str(i): answers(rng, solved(rng, 2000, p, 0.3), 4) for i, p in enumerate((0.3, 0.5, 0.8))}
    means = [values.mean(axis=1) for values in outcomes.values()]
    estimate = np.mean([values.mean() for values in means])
    half = 1.96 * math.sqrt(sum(values.var(ddof=1) / 2000 for values in means)) / 3
    interval = macro_accuracy(outcomes)
    assert_allclose((interval.low, interval.high), (estimate - half, estimate + half), atol=0.05 * half)
    perfect = macro_accuracy({"a": np.ones((30, 4)), "b": np.ones((30, 4))})
    assert perfect.estimate == perfect.high == 1
    assert accuracy_interval(np.ones((30, 4))).low < perfect.low < 1


@pytest.mark.parametrize("function", [paired_macro, lambda a, b: equivalent_macro(a, b, 0.02)])
def test_tasks_that_do_not_pair(function):
    with pytest.raises(ValueError, match="No task is given"):
        function({}, {})
    with pytest.raises(ValueError, match=r"treated has the tasks \['a'\], base \['a', 'b'\]"):
        function({"a": [0, 1]}, {"a": [0, 1], "b": [0, 1]})


def test_errors_name_the_task():
    with pytest.raises(ValueError, match=r"treated\['b'\] has 3 problems and base\['b'\] 2"):
        paired_macro({"a": [0, 1], "b": [0, 1, 1]}, {"a": [0, 1], "b": [0, 1]})
    with pytest.raises(ValueError, match="No task is given"):
        macro_accuracy({})


# --- by simulation


def simulated(draws, shift, resamples):
    """Shares of p < 0.05, and of intervals of the difference and of the accuracy that hold the truth."""
    counts = np.zeros(3)
    for seed in range(draws):
        treated, base = two_models(SIZES, shift, seed)
        difference = paired_macro(treated, base, resamples=resamples, seed=seed)
        accuracy = macro_accuracy(base)
        held = difference.low <= shift <= difference.high, accuracy.low <= 0.4 * (1 - shift) <= accuracy.high
        counts += difference.p_value < 0.05, *held
    return counts / draws


def test_false_positives_and_coverage():
    found, held, accurate = simulated(400, shift=0.0, resamples=199)
    # Standard error 1.1%.
    assert abs(found - 0.05) < 0.033
    assert abs(held - 0.95) < 0.033
    assert abs(accurate - 0.95) < 0.033


@pytest.mark.long
def test_false_positives_and_coverage_in_full():
    found, held, accurate = simulated(8000, shift=0.0, resamples=499)
    assert abs(found - 0.05) < 0.007
    assert abs(held - 0.95) < 0.01
    assert abs(accurate - 0.95) < 0.01
    assert abs(simulated(4000, shift=0.1, resamples=499)[1] - 0.95) < 0.01
