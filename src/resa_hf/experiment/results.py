"""From the files of a run to its table."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..evaluation.comparison import Answers, Compared, compare
from ..provenance import Revisions, data_revisions, merge_revisions
from .answering import GREEDY, HELD_OUT, MOVEMENT, REVISIONS, read_answers
from .arms import BASE, Arm, Candidate
from .folder import RunFolder, read_json
from .sampled_text import TEXT
from .schedule import Job
from .settings import RunSettings
from .stages import STAGE1, TUNING

EXPECTED = {"zero_adapter": "equivalent", "svd_of_source": "better", "weight_noise": "worse"}


@dataclass(frozen=True)
class ArmResult:
    """One line of the table. KL in nats a token, lengths in tokens, over all seeds.

    Args:
        arm (`Arm`): the arm, or the untouched base.
        compared (`Compared`): accuracies, differences, verdict.
        candidate (`Candidate`, *optional*): how it was trained.
        greedy (`float`, *optional*): macro-average at temperature 0.
        mean_length, truncated (`float`): new tokens an answer, and the share cut at the limit.
        initial_kl, final_kl (`float`, *optional*): the training's, on the held-out text, before the first step and
            after the last.
        without_sae (`dict`): of the adapter that answers, with the SAE removed: `kl`, KL(base || tuned) on the
            held-out text, and `update_norm`, ||dW|| over all modules.
        seconds, tokens (`dict`): spent on `training` (Stage II) and on `answers`, all seeds.
        training_seconds (`list[float]`): of Stage I and II with each seed, and of sampling the text for them.
    """

    arm: Arm
    compared: Compared
    candidate: Candidate | None
    greedy: float | None
    mean_length: float
    truncated: float
    initial_kl: float | None = None
    final_kl: float | None = None
    without_sae: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    training_seconds: list[float] = field(default_factory=list)


def choose_candidates(
    folder: RunFolder, settings: RunSettings, jobs: list[Job]
) -> tuple[dict[str, Candidate], dict[str, dict[str, float]]]:
    """How each trained arm is trained: the best on the questions to choose on, the smaller of two equal.

    Returns:
        The candidates by the arms' names, and the accuracies that they were chosen by.
    """
    accuracies: dict[str, dict[Candidate, float]] = {}
    for job in jobs:
        for candidate in job.candidates:
            assert job.arm is not None
            answers = read_answers(folder.arm(job.arm, candidate, job.seed), settings.chosen_on)
            mean = float(np.mean([task["correct"].mean() for task in answers.values()]))
            accuracies.setdefault(job.arm.name, {})[candidate] = mean
    fixed = {settings.candidates[0]: 0.0}
    chosen = {}
    for arm in settings.arms:
        if arm.is_trained:
            tried = accuracies.get(arm.name, fixed)
            chosen[arm.name] = min(tried, key=lambda c: (-tried[c], c.rate, c.step or 0))
    return chosen, {name: {str(c): a for c, a in tried.items()} for name, tried in accuracies.items()}


def collect(folder: RunFolder, settings: RunSettings, chosen: dict[str, Candidate]) -> list[ArmResult]:
    """Reads the answers of all arms and judges them against the base, which comes first."""
    arms = [BASE, *settings.arms]
    read = {arm.name: _read(folder, settings, arm, chosen.get(arm.like or arm.name)) for arm in arms}
    answers = [_answers(arm, read[arm.name][0]) for arm in arms]
    compared = compare(
        answers[0],
        answers[1:],
        settings.run.margin,
        controls_of(settings.arms),
        settings.run.rl_arm,
        without_stand_in(settings.arms),
    )
    return [
        ArmResult(arm=arm, compared=line, candidate=chosen.get(arm.like or arm.name), **read[arm.name][1])
        for arm, line in zip(arms, compared, strict=True)
    ]


def answers_of(folder: RunFolder, settings: RunSettings, arm: Arm, candidate: Candidate | None) -> Answers:
    """What an arm answered to the questions of the verdict."""
    places = [folder.arm(arm, candidate, seed) for seed in settings.run.seeds]
    return _answers(arm, [read_answers(place, HELD_OUT) for place in places])


def _answers(arm: Arm, seeds: list[dict[str, Any]]) -> Answers:
    return Answers(arm.name, {task: [seed[task]["correct"] for seed in seeds] for task in seeds[0]}, arm.is_seeded)


def controls_of(arms: list[Arm]) -> dict[str, list[str]]:
    """The controls of every arm that is held against some: those with an SAE, and those that a control names."""
    found = {
        arm.name: [other.name for other in arms if other.is_control_of(arm)] for arm in arms if not arm.is_control
    }
    spliced = {arm.name for arm in arms if arm.sae_from != "none"}
    return {name: controls for name, controls in found.items() if controls or name in spliced}


def without_stand_in(arms: list[Arm]) -> set[str]:
    """Arms with an SAE in whose place no other arm has something else."""
    return {
        arm.name
        for arm in arms
        if arm.sae_from != "none" and not any(other.stands_in and other.is_control_of(arm) for other in arms)
    }


def _read(
    folder: RunFolder, settings: RunSettings, arm: Arm, candidate: Candidate | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The answers with each seed, and the rest of the arm's line."""
    seeds = settings.run.seeds
    places = [folder.arm(arm, candidate, seed) for seed in seeds]
    sampled = [read_answers(place, HELD_OUT) for place in places]
    asked_greedily = places if arm.is_seeded else places[:1]
    greedy = [read_answers(place, GREEDY) for place in asked_greedily] if settings.run.greedy else []
    tuned = []
    if arm.is_trained and candidate is not None:
        tuned = [read_json(folder.training(arm, candidate, seed) / TUNING) for seed in seeds]
    moved = [read_json(place / MOVEMENT) for place in places] if arm.has_adapter else []
    saes = {settings.sae_source(source) for source in arm.sae_sources}
    stage1 = [sum(read_json(folder.sae(source, seed) / STAGE1)["seconds"] for source in saes) for seed in seeds]
    every = [task for seed in (*sampled, *greedy) for task in seed.values()]
    line: dict[str, Any] = {
        "greedy": _mean([task["correct"].mean() for seed in greedy for task in seed.values()]),
        "mean_length": _mean([task["lengths"].mean() for seed in sampled for task in seed.values()]),
        "truncated": _mean([task["truncated"].mean() for seed in sampled for task in seed.values()]),
        "initial_kl": _mean([t["evaluations"][0]["eval_kl"] for t in tuned if "eval_kl" in t["evaluations"][0]]),
        "final_kl": _mean([entry["eval_kl"] for t in tuned if "eval_kl" in (entry := _evaluated(t, candidate))]),
        "without_sae": {key: _mean([m[key] for m in moved]) for key in ("kl", "update_norm") if moved},
        "seconds": {"training": sum(t["seconds"] for t in tuned), "answers": sum(task["seconds"] for task in every)},
        "tokens": {
            "training": sum(t["tokens"] for t in tuned),
            "answers": sum(int(task["lengths"].sum()) for task in every),
        },
        "training_seconds": [
            before + t["seconds"] + t.get("text", {}).get("seconds", 0.0)
            for before, t in zip(stage1 if tuned else [], tuned, strict=True)
        ],
    }
    return sampled, line


def _evaluated(tuning: dict[str, Any], candidate: Candidate | None) -> dict[str, Any]:
    """The evaluation of the adapter that answers: of its step, or the last one."""
    last = tuning["steps"] if candidate is None or candidate.step is None else candidate.step
    return [entry for entry in tuning["evaluations"] if entry["step"] <= last][-1]


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def sae_quality(folder: RunFolder, settings: RunSettings) -> dict[str, dict[str, Any]]:
    """Held-out quality of the SAEs by source, mean over seeds; seconds and tokens of Stage I, all seeds."""
    table: dict[str, dict[str, Any]] = {}
    for source in settings.sae_sources:
        reports = [read_json(folder.sae(source, seed) / STAGE1) for seed in settings.run.seeds]
        measured = tuple(f"eval_{name}/" for name in ("fvu", "l0", "dead_share", "ce_recovered"))
        # A folder that was started before one of them was measured is read, too.
        keys = [key for key in reports[0]["quality"] if all(key in report["quality"] for report in reports)]
        keys = [key for key in keys if key.startswith(measured)]
        table[source] = {
            key.removeprefix("eval_"): float(np.mean([r["quality"][key] for r in reports])) for key in keys
        }
        for key in ("seconds", "tokens"):
            table[source][key] = sum(report[key] for report in reports)
    return table


def sampled_texts(folder: RunFolder, settings: RunSettings) -> dict[str, dict[str, Any]]:
    """Of each text that a model wrote, over all seeds: questions `asked` and `kept`, `tokens` written, `seconds`."""
    reports = {
        text: [read_json(folder.text(text, seed) / TEXT) for seed in settings.run.seeds] for text in settings.texts
    }
    keys = ("asked", "kept", "tokens", "seconds")
    return {text: {key: sum(r[key] for r in seeds) for key in keys} for text, seeds in reports.items()}


def read_revisions(folder: RunFolder, settings: RunSettings, data: dict[str, Any]) -> Revisions:
    """What each stage wrote down when it had loaded its models, and what was read as data.

    Of a folder that was started before that was written down, the base's name is known.
    """
    stages = [*folder.glob(f"sae/*/*/{STAGE1}"), *folder.glob(f"arms/**/{TUNING}")]
    parts = [read_json(path).get("revisions", {}) for path in stages]
    parts += [read_json(path) for path in folder.glob(f"arms/**/{REVISIONS}")]
    unknown: Revisions = {"base": {"name": settings.run.model_name_or_path, "commit": None}}
    return unknown | merge_revisions([*parts, data_revisions(data)])


def harness_check(results: list[ArmResult], moved: bool = False) -> list[tuple[str, str, str]]:
    """The known arms: name, the verdict that they must get, the verdict that they got.

    On a sibling (`moved`) nobody knows what the source's difference does.
    """
    known = {name: word for name, word in EXPECTED.items() if not (moved and name == "svd_of_source")}
    return [
        (result.arm.name, known[result.arm.known], result.compared.verdict.word)
        for result in results
        if result.arm.known in known and result.compared.verdict is not None
    ]
