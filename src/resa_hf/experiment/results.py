"""From the answers of a run to its table: accuracies, paired differences to the base, verdicts."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..evaluation.statistics import (
    Difference,
    Interval,
    accuracy_interval,
    equivalent_over_problems,
    equivalent_over_seeds,
    holm,
    paired_over_problems,
    paired_over_seeds,
)
from ..evaluation.verdict import Verdict, against_controls, judge
from .folder import BASE, RunFolder, read_json
from .schedule import Job
from .settings import Arm, RunSettings
from .stages import STAGE1, TUNING, read_answers

SEEDS_FOR_THE_METHOD = 5
EXPECTED = {"zero_adapter": "equivalent", "svd_of_source": "better", "weight_noise": "worse"}


@dataclass
class ArmResult:
    """One line of the table. Accuracies are shares, KL in nats a token, lengths in tokens, over all seeds.

    Args:
        arm (`Arm`): the arm, or the untouched base.
        rate (`float` or `None`): its Stage II learning rate.
        by_seed (`list[float]`): accuracy with each seed.
        accuracy (`Interval`): over problems, the seeds being samples of a problem.
        greedy (`float` or `None`): accuracy at temperature 0, mean over seeds.
        mean_length, truncated (`float`): new tokens an answer, and the share cut at the limit.
        initial_kl, final_kl (`float` or `None`): on the held-out text, before the first step and after the last.
        difference (`Difference` or `None`): to the base, paired.
        adjusted_p (`float` or `None`): p of the difference, Holm's correction over the arms.
        verdict (`Verdict` or `None`): in words.
        controls (`str`): whether the arm is better than each of its controls too, where that is a question.
        seconds (`dict`): spent on training and on answers, all seeds.
    """

    arm: Arm
    rate: float | None
    by_seed: list[float]
    accuracy: Interval
    greedy: float | None
    mean_length: float
    truncated: float
    initial_kl: float | None = None
    final_kl: float | None = None
    difference: Difference | None = None
    adjusted_p: float | None = None
    verdict: Verdict | None = None
    controls: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    outcomes: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)), repr=False)


def choose_rates(folder: RunFolder, settings: RunSettings, jobs: list[Job]) -> tuple[dict[str, float], dict[str, Any]]:
    """The learning rate of each trained arm: the best on the selection questions, the smaller one of two equal.

    Returns:
        The rates by the arms' names, and the accuracies that they were chosen by.
    """
    accuracies: dict[str, dict[float, float]] = {}
    for job in jobs:
        if job.arm is not None and job.rate is not None:
            answers = read_answers(folder.arm(job.arm, job.rate, job.seed) / "selection-sampled.jsonl")
            accuracies.setdefault(job.arm.name, {})[job.rate] = float(answers["correct"].mean())
    fixed = settings.learning_rates[0]
    rates = {}
    for arm in settings.arms:
        if arm.known is None:
            tried = accuracies.get(arm.name, {fixed: 0.0})
            rates[arm.name] = min(tried, key=lambda rate: (-tried[rate], rate))
    return rates, accuracies


def collect(folder: RunFolder, settings: RunSettings, rates: dict[str, float]) -> list[ArmResult]:
    """Reads the answers of all arms and judges them against the base, which comes first."""
    results = [_read(folder, settings, arm, rates.get(arm.name)) for arm in (BASE, *settings.arms)]
    base, *others = results
    method = len(settings.run.seeds) >= SEEDS_FOR_THE_METHOD
    for result in others:
        result.difference = _difference(result, base, method)
    adjusted = holm({r.arm.name: r.difference.p_value for r in others if r.difference is not None})
    margin = settings.run.margin
    for result in others:
        assert result.difference is not None
        if method:
            equivalence = equivalent_over_seeds(result.by_seed, base.by_seed, margin)
        else:
            equivalence = equivalent_over_problems(result.outcomes, base.outcomes, margin)
        result.adjusted_p = adjusted[result.arm.name]
        result.verdict = judge(result.difference, result.adjusted_p, equivalence, margin, result.arm.name)
    _hold_against_controls(others, method)
    return results


def _hold_against_controls(results: list[ArmResult], method: bool) -> None:
    for result in results:
        spliced = result.arm.sae_from != "none" and not result.arm.is_control
        if spliced and result.verdict is not None and result.verdict.word == "better":
            controls = [control for control in results if control.arm.is_control_of(result.arm)]
            differences = {control.arm.name: _difference(result, control, method) for control in controls}
            adjusted = holm({name: difference.p_value for name, difference in differences.items()})
            result.controls = against_controls(differences, adjusted)


def _difference(treated: ArmResult, base: ArmResult, method: bool) -> Difference:
    if method:
        return paired_over_seeds(treated.by_seed, base.by_seed)
    return paired_over_problems(treated.outcomes, base.outcomes)


def _read(folder: RunFolder, settings: RunSettings, arm: Arm, rate: float | None) -> ArmResult:
    places = [folder.arm(arm, rate, seed) for seed in settings.run.seeds]
    sampled = [read_answers(place / "held_out-sampled.jsonl") for place in places]
    greedy = [read_answers(place / "held_out-greedy.jsonl") for place in places] if settings.run.greedy else []
    outcomes = np.concatenate([answers["correct"] for answers in sampled], axis=1)
    tuned = [read_json(place / TUNING) for place in places if rate is not None]
    initial, final = ([t[when]["eval_kl"] for t in tuned if "eval_kl" in t[when]] for when in ("initial", "final"))
    return ArmResult(
        arm=arm,
        rate=rate,
        by_seed=[float(answers["correct"].mean()) for answers in sampled],
        accuracy=accuracy_interval(outcomes),
        greedy=float(np.mean([answers["correct"].mean() for answers in greedy])) if greedy else None,
        mean_length=float(np.mean([answers["lengths"].mean() for answers in sampled])),
        truncated=float(np.mean([answers["truncated"].mean() for answers in sampled])),
        initial_kl=float(np.mean(initial)) if initial else None,
        final_kl=float(np.mean(final)) if final else None,
        seconds={
            "training": sum(t["seconds"] for t in tuned),
            "answers": sum(answers["seconds"] for answers in sampled + greedy),
        },
        outcomes=outcomes,
    )


def sae_quality(folder: RunFolder, settings: RunSettings) -> dict[str, dict[str, Any]]:
    """Held-out quality of the SAEs by source, mean over seeds, and the seconds of Stage I."""
    table: dict[str, dict[str, Any]] = {}
    for source in settings.sae_sources:
        reports = [read_json(folder.sae(source, seed) / STAGE1) for seed in settings.run.seeds]
        keys = [key for key in reports[0]["quality"] if key.startswith(("eval_fvu/", "eval_l0/", "eval_dead_share/"))]
        table[source] = {
            key.removeprefix("eval_"): float(np.mean([r["quality"][key] for r in reports])) for key in keys
        }
        table[source]["seconds"] = sum(report["seconds"] for report in reports)
    return table


def harness_check(results: list[ArmResult]) -> list[tuple[str, str, str]]:
    """The known arms: name, the verdict that they must get, the verdict that they got."""
    return [
        (result.arm.name, EXPECTED[result.arm.known], result.verdict.word)
        for result in results
        if result.arm.known is not None and result.verdict is not None
    ]
