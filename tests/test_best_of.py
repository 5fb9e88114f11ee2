"""The best of n equal points, against every shuffling there is."""

from itertools import permutations, product

import numpy as np
import pytest

from resa_hf.evaluation.comparison import Answers
from resa_hf.experiment.best_of import best_lines, best_of


def every_best(table):
    """The best mean of every way to permute the points within each block; table [blocks, points]."""
    orders = [list(permutations(row)) for row in table]
    return np.array([np.mean(choice, axis=0).max() for choice in product(*orders)])


def with_accuracies(table, problems=20):
    """Answers of one sample, right as often as the table [seeds, points] says."""
    return {
        f"p{point}": Answers("arm", {"t": [(np.arange(problems) < round(a * problems))[:, None] for a in column]})
        for point, column in enumerate(np.transpose(table))
    }


@pytest.mark.parametrize("points", [2, 3])
def test_over_seeds_against_all_shufflings(points):
    table = np.random.default_rng(points).integers(8, 14, size=(5, points)) / 20
    found = best_of(with_accuracies(table), shufflings=20_000)
    expected = every_best(table)
    assert (found.over, found.n, found.point) == ("seeds", points, f"p{table.mean(axis=0).argmax()}")
    assert (found.best, found.mean) == pytest.approx((table.mean(axis=0).max(), table.mean()))
    assert found.expected == pytest.approx(expected.mean(), abs=0.001)
    assert (found.low, found.high) == pytest.approx(np.quantile(expected, [0.025, 0.975]), abs=0.011)
    assert found.p_value == pytest.approx(np.mean(expected >= found.best - 1e-9), abs=0.015)


def test_with_fewer_seeds_over_problems_each_task_counting_alike():
    rng = np.random.default_rng(0)
    few, many = rng.integers(0, 2, size=(2, 2, 3)), rng.integers(0, 2, size=(2, 4, 1))  # [points, problems, samples]
    points = {f"p{i}": Answers("arm", {"few": [few[i]], "many": [many[i]]}) for i in range(2)}
    macro = np.array([(few[i].mean() + many[i].mean()) / 2 for i in range(2)])
    found = best_of(points, shufflings=20_000)
    assert found.over == "problems" and (found.best, found.mean) == pytest.approx((macro.max(), macro.mean()))
    # Every problem's part of the two macro-averages in both orders: 2^6 ways.
    swaps = np.array(list(product([0, 1], repeat=6)))
    columns = np.concatenate([few.mean(axis=2) / 2 / 2, many.mean(axis=2) / 4 / 2], axis=1)
    first = np.where(swaps, columns[1], columns[0]).sum(axis=1)
    best = np.maximum(first, columns.sum() - first)
    assert found.expected == pytest.approx(best.mean(), abs=0.002)
    assert found.p_value == pytest.approx(np.mean(best >= found.best - 1e-9), abs=0.015)


def test_p_is_uniform_where_all_are_equal_and_small_where_one_is_better():
    rng = np.random.default_rng(1)
    p_values = [best_of(with_accuracies(rng.random((5, 6)), 1000), shufflings=400).p_value for _ in range(200)]
    assert np.mean(np.array(p_values) < 0.1) == pytest.approx(0.1, abs=0.06)
    better = rng.random((5, 6)) * 0.1 + np.array([0, 0, 0, 0.4, 0, 0])
    found = best_of(with_accuracies(better, 1000))
    assert found.point == "p3" and found.p_value < 0.001 and found.high < found.best


def test_equal_points_have_nothing_to_choose():
    found = best_of(with_accuracies(np.full((5, 4), 0.5)))
    assert (found.expected, found.low, found.high, found.p_value) == (0.5, 0.5, 0.5, 1.0)
    text = best_lines({"SAE-Tuning": found})
    assert text.startswith("- SAE-Tuning: the best of 4 points is p0, 50.0% (all: 50.0%).") and "each seed" in text
