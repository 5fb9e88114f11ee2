"""What must hold of the statistics on any answers: against scipy, closed forms, and every case counted out."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from resa_hf.evaluation.comparison import Answers, compare
from resa_hf.evaluation.macro import equivalent_macro, macro_accuracy, paired_macro
from resa_hf.evaluation.ratios import ratio_over_problems, ratio_over_seeds
from resa_hf.evaluation.statistics import (
    accuracy_interval,
    equivalent_over_problems,
    equivalent_over_seeds,
    holm,
    paired_over_problems,
    paired_over_seeds,
)
from resa_hf.evaluation.verdict import against_controls, judge

CLOSE = {"rel": 1e-9, "abs": 1e-12}


@st.composite
def grids(draw, problems=None, samples=None):
    """Answers `[problems, samples]`."""
    rows, columns = problems or draw(st.integers(2, 12)), samples or draw(st.integers(1, 4))
    return np.array(draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))).reshape(rows, -1)


@st.composite
def pairs(draw, most=12):
    problems = draw(st.integers(2, most))
    return draw(grids(problems)), draw(grids(problems))


def accuracies(size):
    return st.lists(st.integers(0, 40).map(lambda right: right / 40), min_size=size, max_size=size)


seeds = st.integers(2, 7).flatmap(lambda size: st.tuples(accuracies(size), accuracies(size)))
levels = st.sampled_from([0.5, 0.8, 0.95, 0.99])
orders = st.integers(0, 2**32).map(random.Random)  # st.randoms has the whole heap collected for each example


def same(one, other):
    assert (one.estimate, one.low, one.high) == pytest.approx((other.estimate, other.low, other.high), **CLOSE)


@given(grids(), levels, orders)
def test_an_accuracy(outcomes, level, order):
    found = accuracy_interval(outcomes, level)
    assert found.estimate == pytest.approx(outcomes.mean(axis=1).mean(), **CLOSE)
    assert 0 <= found.low <= found.estimate <= found.high <= 1
    mirrored = accuracy_interval(~outcomes, level)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high), abs=1e-9)
    rows, columns = (order.sample(range(size), size) for size in outcomes.shape)
    same(found, accuracy_interval(outcomes[rows][:, columns], level))
    wider = accuracy_interval(outcomes, (1 + level) / 2)
    assert wider.low <= found.low + 1e-12 and wider.high >= found.high - 1e-12
    # Once more the same answers tell nothing new; Wilson's interval is that of one answer a problem.
    n, z, p = len(outcomes), stats.norm.isf((1 - level) / 2), outcomes[:, 0].mean()
    wilson = (p + z**2 / (2 * n) + np.array([-z, z]) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))) / (1 + z**2 / n)
    alone = accuracy_interval(outcomes[:, :1], level)
    assert (alone.low, alone.high) == pytest.approx(wilson.clip(0, 1), abs=1e-9)


@given(seeds, levels, orders)
def test_a_difference_over_seeds(accuracies, level, order):
    treated, base = map(np.array, accuracies)
    found, swapped = paired_over_seeds(treated, base, level), paired_over_seeds(base, treated, level)
    assert found.low <= found.estimate <= found.high and 0 <= found.p_value <= 1
    assert (swapped.estimate, swapped.low, swapped.high) == pytest.approx((-found.estimate, -found.high, -found.low))
    assert swapped.p_value == pytest.approx(found.p_value, **CLOSE)
    shuffled = order.sample(range(len(base)), len(base))
    same(found, paired_over_seeds(treated[shuffled], base[shuffled], level))
    if np.ptp(treated - base) > 1e-9:
        scipys = stats.ttest_rel(treated, base)
        interval = scipys.confidence_interval(level)
        assert found.p_value == pytest.approx(scipys.pvalue, rel=1e-6, abs=1e-12)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-9)
        for margin in (0.02, 0.3):
            tests = [
                stats.ttest_1samp(treated - base, side * margin, alternative=way).pvalue
                for side, way in ((-1, "greater"), (1, "less"))
            ]
            found_p = equivalent_over_seeds(treated, base, margin)
            assert found_p == pytest.approx(max(tests), rel=1e-6, abs=1e-12)
    else:
        certain = 2 * 0.5 ** len(base)
        assert found.p_value == pytest.approx(1.0 if abs(found.estimate) < 1e-12 else certain)
        assert equivalent_over_seeds(treated, base, 0.3) >= certain


@given(pairs(8), orders)
def test_a_difference_over_problems(grids, order):
    treated, base = grids
    found = paired_over_problems(treated, base, resamples=99)
    swapped = paired_over_problems(base, treated, resamples=99)
    each = treated.mean(axis=1) - base.mean(axis=1)
    assert found.estimate == pytest.approx(each.mean(), abs=1e-12)
    assert found.low <= found.estimate <= found.high
    # The same draws, seen from the other side.
    assert (swapped.estimate, swapped.low, swapped.high) == pytest.approx((-found.estimate, -found.high, -found.low))
    sums = [abs(np.dot(signs, each)) for signs in itertools.product([1, -1], repeat=len(each))]
    beyond = sum(total > abs(each.sum()) + 1e-9 for total in sums)
    ties = sum(abs(total - abs(each.sum())) <= 1e-9 for total in sums)
    expected = 1.0 if not each.any() else (beyond + ties / 2) / len(sums)
    assert found.p_value == pytest.approx(expected, abs=1e-9) == pytest.approx(swapped.p_value, abs=1e-9)
    shuffled = order.sample(range(len(each)), len(each))
    assert paired_over_problems(treated[shuffled], base[shuffled], resamples=9).p_value == pytest.approx(expected)
    if np.ptp(each) > 1e-9:
        student = stats.ttest_1samp(each, 0).confidence_interval(0.95)
        assert found.low <= student.low + 1e-9 and found.high >= student.high - 1e-9
    else:
        assert found.low == found.high
    one_task = paired_macro({"task": treated}, {"task": base}, resamples=99)
    assert (one_task.estimate, one_task.low, one_task.high) == (found.estimate, found.low, found.high)


@given(pairs(), st.floats(1e-3, 0.99), st.floats(1e-3, 0.99))
def test_an_equivalence_over_problems(grids, margin, other):
    treated, base = grids
    p_value = equivalent_over_problems(treated, base, margin)
    assert p_value == pytest.approx(equivalent_over_problems(base, treated, margin), **CLOSE)
    assert (1 - margin) ** len(treated) <= p_value + 1e-12 <= 1 + 1e-9
    if other > margin:  # a larger margin is easier to keep
        assert equivalent_over_problems(treated, base, other) <= p_value + 1e-9
    assert equivalent_macro({"a": treated}, {"a": base}, margin) == pytest.approx(p_value, **CLOSE)
    if abs(treated.mean() - base.mean()) > margin and treated.shape == base.shape:
        assert p_value >= 0.5


@given(st.dictionaries(st.text("abc", max_size=3), st.floats(0, 1), max_size=6), orders)
def test_holm(p_values, order):
    adjusted = holm(p_values)
    ranked, expected, running = sorted(p_values, key=lambda name: p_values[name]), {}, 0.0
    for rank, name in enumerate(ranked):
        running = max(running, min(1.0, (len(ranked) - rank) * p_values[name]))
        expected[name] = running
    assert list(adjusted) == list(p_values) and adjusted == pytest.approx(expected, rel=1e-12, abs=0)
    assert all(p_values[name] <= adjusted[name] <= 1 for name in p_values)
    mixed = order.sample(list(p_values), len(p_values))
    assert holm({name: p_values[name] for name in mixed}) == pytest.approx(adjusted, rel=1e-12, abs=0)


@given(st.dictionaries(st.text("abc", max_size=3), grids(), min_size=1, max_size=3), orders)
def test_a_macro_average(tasks, order):
    found = macro_accuracy(tasks)
    assert found.estimate == pytest.approx(np.mean([values.mean(axis=1).mean() for values in tasks.values()]))
    assert 0 <= found.low + 1e-12 <= found.estimate + 2e-12 and found.estimate <= found.high + 1e-12 <= 1 + 2e-12
    mixed = {name: tasks[name] for name in order.sample(list(tasks), len(tasks))}
    same(found, macro_accuracy(mixed))
    if len(tasks) == 1:
        same(found, accuracy_interval(next(iter(tasks.values()))))


@given(st.integers(2, 7).flatmap(lambda n: st.tuples(*(st.lists(st.floats(0.1, 9), min_size=n, max_size=n),) * 2)))
def test_a_ratio_over_seeds(values):
    top, bottom = map(np.array, values)
    found, n = ratio_over_seeds(top, bottom), len(top)
    assert found.estimate == pytest.approx(top.mean() / bottom.mean())
    if math.isinf(found.low):
        # The denominator is not distinguishable from 0.
        assert bottom.mean() <= stats.t.isf(0.025, n - 1) * stats.sem(bottom) * (1 + 1e-9)
        return
    assert found.low <= found.estimate + 1e-9 and found.estimate <= found.high + 1e-9
    scaled = ratio_over_seeds(3 * top, bottom)
    assert (scaled.low, scaled.high) == pytest.approx((3 * found.low, 3 * found.high), rel=1e-6, abs=1e-9)
    assume(np.ptp(top / bottom) > 1e-3)
    for end in (found.low, found.high):  # just not distinguishable there, by a plain t test
        assert stats.ttest_1samp(top - end * bottom, 0).pvalue == pytest.approx(0.05, rel=1e-3)
    upside_down = ratio_over_seeds(bottom, top)
    if found.low > 0 and not math.isinf(upside_down.low):
        assert (1 / upside_down.high, 1 / upside_down.low) == pytest.approx((found.low, found.high), rel=1e-5)


@given(pairs())
def test_a_ratio_over_problems(grids):
    top, bottom = ({"task": grid} for grid in grids)
    found = ratio_over_problems(top, bottom, resamples=99)
    if bottom["task"].any():
        wanted = top["task"].mean(axis=1).mean() / bottom["task"].mean(axis=1).mean()
        assert found.estimate == pytest.approx(wanted) and found.low <= found.estimate + 1e-9 <= found.high + 2e-9
        itself = ratio_over_problems(bottom, bottom, resamples=99)
        assert itself.estimate == 1 and (math.isinf(itself.low) or (itself.low, itself.high) == pytest.approx((1, 1)))
    else:
        assert math.isnan(found.estimate) and math.isinf(found.low) and math.isinf(found.high)


@given(seeds, st.floats(0, 1), st.floats(0, 1), st.sampled_from([0.01, 0.02, 0.2]))
def test_a_verdict(accuracies, adjusted, equivalence, margin):
    treated, base = accuracies
    difference = paired_over_seeds(treated, base)
    found = judge(difference, adjusted, equivalence, margin, "ours")
    nothing = difference.estimate == difference.low == difference.high == 0
    if nothing or (equivalence < 0.05 <= adjusted):
        assert found.word == "equivalent"
    elif adjusted < 0.05 and difference.estimate:
        assert found.word == ("better" if difference.estimate > 0 else "worse")
    mirrored = judge(paired_over_seeds(base, treated), adjusted, equivalence, margin, "ours")
    assert mirrored.word == {"better": "worse", "worse": "better"}.get(found.word, found.word)
    assert found.sentence.startswith("ours ") and "nan" not in found.sentence and "inf" not in found.sentence
    final = against_controls(found, {"control": difference}, {"control": adjusted})
    wins = adjusted < 0.05 and difference.estimate > 0
    # Held against a control it can lose, and never win.
    lost = "better than base but not than each control"
    assert final.word == (lost if found.word == "better" and not wins else found.word)


@st.composite
def experiments(draw):
    """A base and two models, on two tasks, with as many seeds."""
    sizes, count = draw(st.tuples(st.integers(2, 5), st.integers(2, 5))), draw(st.sampled_from([1, 2, 5]))
    names = ["base", "ours", "control"]
    return [
        Answers(
            name,
            {f"task {i}": [draw(grids(n, 2)) for _ in range(count)] for i, n in enumerate(sizes)},
        )
        for name in names
    ]


@settings(max_examples=max(3, settings.default.max_examples // 8))  # 10,000 draws each
@given(experiments(), orders)
def test_a_comparison(models, order):
    base, ours, control = models
    found = compare(base, [ours, control], 0.02, {"ours": ["control"]}, rl="control")
    assert [line.name for line in found] == ["base", "ours", "control"]
    for line, answers in zip(found, models, strict=True):
        tasks = [np.concatenate(seed, axis=1) for seed in answers.by_task.values()]
        assert line.accuracy.estimate == pytest.approx(np.mean([task.mean() for task in tasks]))
        assert line.problems == sum(map(len, tasks))
        if line.difference is not None:
            gap = line.accuracy.estimate - found[0].accuracy.estimate
            assert line.difference.estimate == pytest.approx(gap, abs=1e-9)
            assert line.difference.over == ("seeds" if base.seeds >= 5 else "problems")
            assert line.adjusted_p >= line.difference.p_value - 1e-12
    # Problems in another order, the same in all models.
    orders = {task: order.sample(range(len(seed[0])), len(seed[0])) for task, seed in base.by_task.items()}
    mixed = [
        Answers(one.name, {task: [seed[orders[task]] for seed in each] for task, each in one.by_task.items()})
        for one in models
    ]
    again = compare(mixed[0], mixed[1:], 0.02, {"ours": ["control"]}, rl="control")
    for line, other in zip(found, again, strict=True):
        assert line.accuracy.estimate == pytest.approx(other.accuracy.estimate, abs=1e-12)
        if line.difference is not None and line.difference.n <= 10:  # no draws, so no chance
            assert line.difference.p_value == pytest.approx(other.difference.p_value, abs=1e-9)
            assert line.verdict.word == other.verdict.word
    (_, itself) = compare(base, [Answers("same", base.by_task)], 0.02)
    assert itself.difference.estimate == 0 and itself.verdict.word == "equivalent"


def test_a_single_problem_or_seed_is_refused():
    for judged in (paired_over_problems, paired_over_seeds):
        with pytest.raises(ValueError, match="2"):
            judged([1], [0])
    with pytest.raises(ValueError, match="2"):
        accuracy_interval([[1, 0]])
    with pytest.raises(ValueError, match="2"):
        ratio_over_seeds([1.0], [2.0])
