"""The difference that a plan can find: against a power table, and by running the test that is planned."""

import math

import numpy as np
import pytest
from scipy import stats
from simulated_answers import answers
from statsmodels.stats.power import TTestPower

from resa_hf.evaluation.macro import paired_macro
from resa_hf.evaluation.planning import planned_detectable_difference

LUCK = {"accuracy": 0.5, "intraclass_correlation": 0.0, "model_correlation": 0.0}


@pytest.mark.parametrize(("problems", "samples"), [(30, 1), (30, 16), (500, 4)])
def test_problems_all_as_hard_leave_the_luck_of_the_samples(problems, samples):
    difference = planned_detectable_difference({"a": (problems, samples)}, **LUCK)
    sd = math.sqrt(2 * 0.25 / samples)
    assert TTestPower().power(difference / sd, problems, 0.05) == pytest.approx(0.8, abs=1e-6)


def test_more_samples_do_not_help_where_each_problem_is_always_or_never_solved():
    sure = {"accuracy": 0.3, "intraclass_correlation": 1.0, "model_correlation": 0.5}
    one, many = (planned_detectable_difference({"a": (40, samples)}, **sure) for samples in (1, 64))
    # Two 0/1 variables of variance 0.21 and correlation 0.5.
    assert one == many
    assert TTestPower().power(one / math.sqrt(0.21), 40, 0.05) == pytest.approx(0.8, abs=1e-6)
    assert planned_detectable_difference({"a": (40, 1)}, **sure | {"model_correlation": 1.0}) == 0


def test_equal_tasks_are_one_large_task():
    whole = planned_detectable_difference({"a": (120, 4)}, **LUCK)
    assert planned_detectable_difference({"a": (60, 4), "b": (60, 4)}, **LUCK) == pytest.approx(whole)
    # A macro-average is no surer than its smallest task lets it be.
    unequal = planned_detectable_difference({"a": (30, 4), "b": (100_000, 4)}, **LUCK)
    assert unequal == pytest.approx(planned_detectable_difference({"a": (30, 4)}, **LUCK) / 2, rel=0.05)


def beta(share, accuracy, correlation):
    total = (1 - correlation) / correlation
    return stats.beta.ppf(share, accuracy * total, (1 - accuracy) * total)


def power(tasks, accuracy, icc, correlation, draws, resamples=299):
    """How often the planned difference is found."""
    assumed = {"accuracy": accuracy, "intraclass_correlation": icc, "model_correlation": correlation}
    half = planned_detectable_difference(tasks, **assumed) / 2
    rng = np.random.default_rng(0)
    treated, base = {}, {}
    for task, (problems, samples) in tasks.items():
        mine, other = rng.random((2, draws, problems))
        # As hard for both with this probability, else independent: correlated by just that much.
        other = np.where(rng.random((draws, problems)) < correlation, mine, other)
        treated[task] = answers(rng, beta(mine, accuracy + half, icc), samples)
        base[task] = answers(rng, beta(other, accuracy - half, icc), samples)
    return np.mean(
        [
            paired_macro(
                {task: treated[task][i] for task in tasks},
                {task: base[task][i] for task in tasks},
                resamples=resamples,
            ).p_value
            < 0.05
            for i in range(draws)
        ]
    )


def test_planned_difference_is_found_four_times_in_five():
    # Standard error 2%.
    assert power({"a": (100, 4)}, 0.5, 0.3, 0.5, 400) == pytest.approx(0.8, abs=0.06)


@pytest.mark.long
@pytest.mark.parametrize(
    ("tasks", "accuracy", "icc", "correlation"),
    [
        ({"a": (30, 16)}, 0.5, 0.3, 0.8),
        ({"a": (100, 4)}, 0.5, 0.3, 0.5),
        ({"a": (500, 1)}, 0.7, 0.6, 0.8),
        ({"a": (30, 16), "b": (30, 16), "c": (40, 16), "d": (500, 1)}, 0.5, 0.6, 0.8),
    ],
)
def test_planned_difference_is_found_four_times_in_five_in_full(tasks, accuracy, icc, correlation):
    assert power(tasks, accuracy, icc, correlation, 4000) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(
    ("tasks", "changed", "message"),
    [
        ({}, {}, "No task is given"),
        ({"a": (1, 4)}, {}, "a has 1 problems, 4 samples each"),
        ({"a": (30, 0)}, {}, "a has 30 problems, 0 samples each"),
        ({"a": (30, 4)}, {"accuracy": 50}, "accuracy is 50; it must lie between 0 and 1"),
        ({"a": (30, 4)}, {"intraclass_correlation": -0.1}, "intraclass_correlation is -0.1"),
        ({"a": (30, 4)}, {"model_correlation": math.nan}, "model_correlation is nan"),
        ({"a": (30, 4)}, {"power": 1.0}, "power is 1.0"),
    ],
)
def test_plans_that_are_none(tasks, changed, message):
    with pytest.raises(ValueError, match=message):
        planned_detectable_difference(tasks, **LUCK | changed)
