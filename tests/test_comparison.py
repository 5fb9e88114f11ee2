"""Models compared on the same problems, against scipy and naive formulas."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.weightstats import ttost_paired

from resa_hf.evaluation.comparison import Answers, compare
from resa_hf.evaluation.macro import equivalent_macro, paired_macro
from resa_hf.evaluation.planning import planned_detectable_difference
from resa_hf.evaluation.ratios import ratio_over_problems, ratio_over_seeds
from resa_hf.evaluation.statistics import Interval, paired_over_problems
from resa_hf.evaluation.tables import comparison_table, controls_table, markdown, plain, points, reading, task_table
from resa_hf.experiment.plan import plan


def draw(name, chances, seeds=6, samples=2, seed=0):
    """Answers to tasks of 40 and 90 problems, each right with the chance of its task."""
    rng = np.random.default_rng(seed)
    sizes = {"small": 40, "large": 90}
    return Answers(
        name,
        {
            task: [(rng.random((size, samples)) < chances[task]).astype(int) for _ in range(seeds)]
            for task, size in sizes.items()
        },
    )


BASE = replace(draw("base", {"small": 0.5, "large": 0.5}, seed=1), seeded=False)
BETTER = draw("better", {"small": 0.8, "large": 0.8}, seed=2)
LIKE_IT = draw("like it", {"small": 0.8, "large": 0.8}, seed=3)
WORSE = draw("worse", {"small": 0.2, "large": 0.3}, seed=4)


def macro(answers):
    """Every task counts the same, whatever its size."""
    return np.mean([[outcomes.mean() for outcomes in seeds] for seeds in answers.by_task.values()], axis=0)


def test_over_seeds_against_scipy():
    results = {line.name: line for line in compare(BASE, [BETTER, WORSE], 0.02)}
    assert list(results) == ["base", "better", "worse"] and results["base"].difference is None
    for answers in (BETTER, WORSE):
        expected = stats.ttest_rel(macro(answers), macro(BASE))
        line = results[answers.name]
        assert line.by_seed == pytest.approx(macro(answers).tolist())
        assert line.accuracy.estimate == pytest.approx(macro(answers).mean())
        assert line.difference.p_value == pytest.approx(expected.pvalue)
        assert line.difference.over == "seeds" and line.verdict.word == answers.name
        for task, seeds in answers.by_task.items():
            pairs = [[outcomes.mean() for outcomes in part] for part in (seeds, BASE.by_task[task])]
            assert line.tasks[task].difference.p_value == pytest.approx(stats.ttest_rel(*pairs).pvalue)
    primary = sorted(results[name].difference.p_value for name in ("better", "worse"))
    assert sorted(results[name].adjusted_p for name in ("better", "worse")) == pytest.approx(
        [2 * primary[0], max(2 * primary[0], primary[1])]
    )
    # Secondary endpoints: Holm over the tasks of all models.
    every = [line.tasks[task] for line in (results["better"], results["worse"]) for task in ("small", "large")]
    smallest = min(every, key=lambda task: task.difference.p_value)
    assert smallest.adjusted_p == pytest.approx(4 * smallest.difference.p_value)


def test_with_few_seeds_problems_are_resampled():
    few = [Answers(a.name, {task: seeds[:2] for task, seeds in a.by_task.items()}) for a in (BASE, BETTER)]
    line = compare(few[0], few[1:], 0.02)[1]
    assert line.difference.over == "problems" and line.difference.n == line.problems == 130
    assert line.difference.estimate == pytest.approx(macro(few[1]).mean() - macro(few[0]).mean())


def test_a_model_that_is_the_same_with_every_seed_is_judged_over_problems():
    fixed, rl = replace(BETTER, name="fixed", seeded=False), replace(LIKE_IT, name="rl", seeded=False)
    results = {line.name: line for line in compare(BASE, [WORSE, fixed, rl], 0.02, {"fixed": ["rl", "worse"]}, "rl")}
    line = results["fixed"]
    pooled = [{task: np.hstack(seeds) for task, seeds in answers.by_task.items()} for answers in (fixed, BASE)]
    assert line.difference == paired_macro(*pooled) and line.difference.n == 130
    assert line.equivalence_p == equivalent_macro(*pooled, 0.02)
    assert line.tasks["small"].difference == paired_over_problems(pooled[0]["small"], pooled[1]["small"])
    assert "130 problems" in line.verdict.sentence and "6 seeds" in results["worse"].verdict.sentence
    # Two that are fixed, and one that is not.
    assert {name: control.difference.over for name, control in line.controls.items()} == {
        "rl": "problems",
        "worse": "seeds",
    }
    assert line.retention == ratio_over_problems(pooled[0], {t: np.hstack(s) for t, s in rl.by_task.items()})
    assert results["worse"].retention == ratio_over_seeds(macro(WORSE), macro(rl))
    assert "on one model, the same with every seed (fixed, rl)" in reading(list(results.values()))
    assert "over problems" not in reading(compare(BASE, [BETTER], 0.02))
    assert "on the method" not in reading(compare(BASE, [fixed], 0.02))


@pytest.mark.long
def test_fixed_models_that_are_equally_good_are_seldom_told_apart():
    # Each finds other problems hard, so that seeds, which share the problems, agree on a difference that is luck.
    rng = np.random.default_rng(0)
    found = []
    for _ in range(40):
        chances = rng.beta(1, 1, (2, 12, 1))
        base, model = (
            Answers(name, {"task": [(rng.random((12, 4)) < chance).astype(int) for _ in range(5)]}, seeded=False)
            for name, chance in zip(("base", "model"), chances, strict=True)
        )
        line = compare(base, [model], 0.02)[1]
        by_seed = stats.ttest_rel(macro(model), macro(base))
        found.append((line.difference.p_value < 0.05, by_seed.pvalue < 0.05))
    over_problems, over_seeds = np.mean(found, axis=0)
    assert over_problems < 0.15 and over_seeds > 0.3


def test_better_than_base_is_not_yet_better_than_its_controls():
    controls = {"better": ["like it"], "like it": []}
    results = {line.name: line.verdict for line in compare(BASE, [BETTER, LIKE_IT, WORSE], 0.02, controls)}
    assert results["better"].word == "better than base but not than each control"
    assert results["like it"].word == "better" and "compared with no control" in results["like it"].sentence
    assert "control" not in results["worse"].sentence
    results = {line.name: line.verdict for line in compare(BASE, [BETTER, WORSE], 0.02, {"better": ["worse"]})}
    assert results["better"].word == "better"


def test_better_with_nothing_that_stood_in_for_the_sae():
    controls = {"better": ["worse"], "like it": []}
    lines = compare(BASE, [BETTER, LIKE_IT, WORSE], 0.02, controls, without_stand_in=["better", "like it"])
    for line in lines[1:3]:
        assert line.verdict.word == "better"
        assert line.verdict.sentence.endswith("; nothing stood in for its SAE, so what did it is open")
    assert "also better than every control (worse)" in lines[1].verdict.sentence
    assert "no control" not in lines[2].verdict.sentence


def test_numbers_behind_the_verdict_are_kept():
    controls = {"better": ["like it", "worse"]}
    results = compare(BASE, [BETTER, LIKE_IT, WORSE], 0.02, controls)
    line = results[1]
    assert line.equivalence_p == pytest.approx(ttost_paired(macro(BETTER), macro(BASE), -0.02, 0.02)[0])
    expected = {control.name: stats.ttest_rel(macro(BETTER), macro(control)) for control in (LIKE_IT, WORSE)}
    for name, test in expected.items():
        interval = test.confidence_interval()
        found = line.controls[name].difference
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    # Holm by hand: it beats one clearly and the other not.
    assert line.controls["worse"].adjusted_p == pytest.approx(2 * expected["worse"].pvalue)
    assert line.controls["like it"].adjusted_p == pytest.approx(expected["like it"].pvalue)
    data = json.loads(json.dumps(plain(line)))
    assert data["equivalence_p"] == line.equivalence_p
    assert data["controls"]["worse"]["difference"]["estimate"] == pytest.approx(
        np.mean(macro(BETTER)) - np.mean(macro(WORSE))
    )
    rows = controls_table(results).splitlines()
    assert len(rows) == 4 and rows[3].startswith("| better | worse ")
    assert f"{100 * line.controls['worse'].difference.estimate:+.1f}" in rows[3]
    assert controls_table(compare(BASE, [BETTER], 0.02)) == "" and results[0].controls == {}


def test_shares_of_a_model_trained_by_rl():
    results = {line.name: line for line in compare(BASE, [WORSE, BETTER], 0.02, rl="better")}
    base, worse, better = (macro(answers).mean() for answers in (BASE, WORSE, BETTER))
    assert results["worse"].retention.estimate == pytest.approx(worse / better)
    assert results["worse"].gain_recovered.estimate == pytest.approx((worse - base) / (better - base))
    assert results["better"].retention is results["better"].gain_recovered is None


def test_models_that_answered_other_tasks_are_refused():
    other = Answers("other", {"small": BETTER.by_task["small"]})
    with pytest.raises((ValueError, KeyError)):
        compare(BASE, [other], 0.02)


def test_tables_hold_what_was_found():
    results = compare(BASE, [BETTER, WORSE], 0.02)
    lines = comparison_table(results, {"length": ["1", "2", "3"]}).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert f"{100 * results[1].difference.estimate:+.1f}" in lines[3] and lines[3].rstrip(" |").endswith("better")
    assert len(task_table(results).splitlines()) == 2 + 2 * 3
    data = json.loads(json.dumps(plain(results[1])))
    assert data["verdict"]["word"] == "better" and data["tasks"]["small"]["accuracy"]["low"] > 0.5
    assert points(Interval(-0.0001, -0.01, 0.0004), sign=True) == ("+0.0", "-1.0 to +0.0")
    assert markdown(["a", "empty", "b"], [["1", "", "2"]]).splitlines()[0] == "| a | b |"


def test_the_difference_that_would_have_been_found():
    # statsmodels' power of the paired t test at that difference, from the spread that was seen.
    from statsmodels.stats.power import TTestPower

    line = compare(BASE, [BETTER], 0.02)[1]
    spread = np.std(macro(BETTER) - macro(BASE), ddof=1)
    assert TTestPower().power(line.difference.detectable / spread, nobs=6, alpha=0.05) == pytest.approx(0.8, abs=1e-3)


def test_the_plan_is_told_before_the_run():
    few = plan({"a": (100, 4), "b": (30, 4)}, seeds=1)
    assumed = {"accuracy": 0.5, "intraclass_correlation": 0.5, "model_correlation": 0.8}
    assert few["difference"] == planned_detectable_difference({"a": (100, 4), "b": (30, 4)}, **assumed)
    assert few["assumed"] == assumed and f"{100 * few['difference']:.1f} points" in few["text"]
    assert "130 problems, 1 seed." in few["text"]
    # Over seeds: draws of 10 paired differences with the assumed spread, tested by scipy.
    many = plan({"a": (500, 1)}, seeds=10)
    rng = np.random.default_rng(0)
    spread = np.sqrt(2 * 0.25 * 0.5 / 500 + 0.01**2)
    found = stats.ttest_1samp(rng.normal(many["difference"], spread, (20_000, 10)), 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.02)
