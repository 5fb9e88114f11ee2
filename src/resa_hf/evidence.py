"""What a report says of one adapter, in the words and cells of its model card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import PublishError
from .escaping import code, plain, prose

_THAN_BASE = {
    "better": "better than its base",
    "worse": "worse than its base",
    "equivalent": "equivalent to its base",
    "not distinguishable": "not distinguishable from its base",
}
Row = list[str]


@dataclass(frozen=True)
class Evidence:
    """
    One evaluation of an adapter. All text is ready for Markdown.

    Args:
        title (`str`): what was done.
        word (`str`): the verdict as the report has it, for programs.
        verdict (`str`), sentence (`str`): the same in words, and with its numbers.
        scope (`str`): what the verdict is on.
        doubts (sequence of `str`): why no verdict here can be trusted.
        models, controls, tasks (sequence of rows): the tables, heads aside; empty where there is nothing to compare.
        notes (sequence of `str`): the protocol, how the adapter was chosen, the check of the harness.
        limits (sequence of `str`): what to know before believing it.
        accuracies (`Mapping[str, float]`): by task, of this adapter as far as the report tells it apart.
        metric (`str`): what they are.
        benchmarks (`Mapping[str, Mapping]`): `name` and `commit` of the tasks that are benchmarks.
    """

    title: str
    word: str
    verdict: str
    sentence: str
    scope: str
    doubts: Sequence[str]
    models: Sequence[Row]
    controls: Sequence[Row]
    tasks: Sequence[Row]
    notes: Sequence[str]
    limits: Sequence[str]
    accuracies: Mapping[str, float] = field(default_factory=dict)
    metric: str = "accuracy"
    benchmarks: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)


def evidence_of_evaluation(report: Mapping[str, Any], name: str) -> Evidence:
    """
    What report.json of `resa-hf evaluate` says of the model of that name.

    Raises:
        `PublishError`: if it has no such model.
    """
    settings, lines = report["settings"], report["models"]
    base = report.get("revisions", {}).get("base", {})
    line = _line(lines, name)
    details = line["tasks_detail"]
    tasks = ", ".join(code(task) for task in line["tasks"])
    return Evidence(
        title="This adapter, evaluated",
        scope="A verdict on this adapter, not on the method.",
        doubts=_cut_off([part["truncated"] for part in details.values()]),
        notes=[
            _protocol(line, tasks, settings, [settings["seed"]], settings["margin"]),
            f"The base: {code(settings['model_name_or_path'])}, commit {code(base.get('commit') or 'not recorded')}.",
        ],
        limits=[
            *_cut([part["truncated"] for part in details.values()], settings["max_new_tokens"]),
            *(limit for source, found in report["overlap"].items() for limit in _overlap(found, code(source))),
        ],
        accuracies={task: found["accuracy"]["estimate"] for task, found in line["tasks"].items()},
        metric=f"accuracy, {_answers(settings)} a problem",
        benchmarks=report.get("tasks", {}),
        **_compared(lines, line),
    )


def evidence_of_run(report: Mapping[str, Any], name: str, seed: int | None) -> Evidence:
    """
    What report.json of `resa-hf run`, `compare` or `demo` says of the arm of that name, and of its adapter of `seed`.

    Raises:
        `PublishError`: if it has no such arm.
    """
    run, sampling, lines = report["settings"]["run"], report["settings"]["sampling"], report["arms"]
    line = _line(lines, name)
    arm = {arm["name"]: arm for arm in report["settings"]["arms"]}[name]
    # A model that was taken or made without chance is the same with every seed: those are the sampling's.
    made = arm.get("adapter") is None and arm["known"] in (None, "weight_noise", "random_adapter")
    seeded = made or "{seed}" in (arm.get("adapter") or "")
    seeds: list[int] = run["seeds"] if seeded else run["seeds"][:1]
    tasks = ", ".join(map(code, run["tasks"] or [])) or f"held-out questions of {code(run['dataset'])}"
    moved = f" Its adapters were moved to {code(run['evaluate_on'])}, the base here." if run["evaluate_on"] else ""
    own = line["by_seed"][seeds.index(seed)] if len(seeds) > 1 and seed in seeds else None
    return Evidence(
        title="The run that made this adapter",
        scope=_scope(line, seeds, own, seed),
        doubts=[*_doubts(report), *_cut_off([line["truncated"]])],
        notes=[
            _protocol(line, tasks, sampling, run["seeds"], run["margin"]) + moved,
            *_choice(report, line),
            *_of_sweep(report.get("sweep_points")),
            *_harness(report),
            *_training_time(line, seeds, seed),
        ],
        limits=[
            *_cut([line["truncated"]], sampling["max_new_tokens"]),
            *(_overlap(report["overlap"], "the training data") if report.get("overlap") else []),
        ],
        benchmarks=report.get("tasks", {}),
        **_accuracies(line, sampling, seeds, own, run["evaluate_on"]),
        **_compared(lines, line),
    )


def _line(lines: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    found = [line for line in lines[1:] if line["name"] == name]
    if not found:
        raise PublishError(
            f"The report says nothing of {name!r}; it has {', '.join(repr(line['name']) for line in lines[1:])}."
        )
    return found[0]


def _compared(lines: Sequence[Mapping[str, Any]], line: Mapping[str, Any]) -> dict[str, Any]:
    base, word = lines[0], _word(line)
    controls = line.get("controls", {})
    beside = [base, line, *(other for other in lines if other["name"] in controls)]
    tasks = line["tasks"] if len(line["tasks"]) > 1 else {}
    return {
        "word": word,
        "verdict": _THAN_BASE.get(word, prose(word)),
        "sentence": prose(line["verdict"]["sentence"], [other["name"] for other in lines]),
        "models": [
            [
                f"**{code(other['name'])}**" if other is line else code(other["name"]),
                *_points(other["accuracy"]),
                *_points(other["difference"], "+"),
                _p(other["adjusted_p"]),
                prose(_word(other)),
            ]
            for other in beside
        ],
        "controls": [
            [code(name), *_points(found["difference"], "+"), _p(found["adjusted_p"])]
            for name, found in controls.items()
        ],
        "tasks": [
            [
                code(task),
                _points(base["tasks"][task]["accuracy"])[0],
                *_points(found["accuracy"]),
                *_points(found["difference"], "+"),
                _p(found["adjusted_p"]),
            ]
            for task, found in tasks.items()
        ],
    }


def _word(line: Mapping[str, Any]) -> str:
    """The verdict; exactly 0 in every pair of a few is equivalent to the report, and proves nothing."""
    word = str((line["verdict"] or {}).get("word", ""))
    if word != "equivalent":
        return word
    difference, p = line["difference"], line["equivalence_p"]
    supported = p is not None and p < 1 - difference["level"]
    return word if supported else f"no difference found (too few {difference['over']} to tell)"


def _points(found: Mapping[str, Any] | None, sign: str = "") -> tuple[str, str]:
    """Estimate and interval in percent or points."""
    if found is None:
        return "", ""
    # Adding 0 turns the -0.0 that rounding leaves into 0.0. JSON has no infinity: a missing bound is one.
    middle, low, high = (
        None if found[key] is None else f"{round(100 * found[key], 1) + 0.0:{sign}.1f}"
        for key in ("estimate", "low", "high")
    )
    return middle or "", "no bounds" if low is None or high is None else f"{low} to {high}"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}" if value >= 0.0001 else "< 0.0001"


def _scope(line: Mapping[str, Any], seeds: Sequence[int], own: float | None, seed: int | None) -> str:
    this = f" With the seed of this adapter, {seed}, the accuracy was {100 * own:.1f}%." if own is not None else ""
    if line["difference"]["over"] == "seeds":
        return f"A verdict on the method over {len(seeds)} seeds, not on this adapter alone.{this}"
    if len(seeds) == 1:
        return "A verdict on this adapter, not on the method."
    return f"A verdict on the adapters of {len(seeds)} seeds together, not on the method.{this}"


def _accuracies(
    line: Mapping[str, Any], sampling: Mapping[str, Any], seeds: Sequence[int], own: float | None, moved: str | None
) -> dict[str, Any]:
    accuracies = {task: found["accuracy"]["estimate"] for task, found in line["tasks"].items()}
    metric = f"accuracy, {_answers(sampling)} a problem"
    if own is not None and len(accuracies) == 1:
        accuracies = dict.fromkeys(accuracies, own)
    elif len(seeds) > 1:
        metric += f", mean of the adapters of {len(seeds)} seeds"
    return {"accuracies": accuracies, "metric": metric + (f", moved to {plain(moved)}" if moved else "")}


def _protocol(
    line: Mapping[str, Any], tasks: str, sampling: Mapping[str, Any], seeds: Sequence[int], margin: float
) -> str:
    return (
        f"Protocol: {line['problems']:,} problems ({tasks}), {_answers(sampling)} a problem and seed; temperature "
        f"{sampling['temperature']:g}, top-p {sampling['top_p']:g}, at most {sampling['max_new_tokens']:,} tokens; "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(f'{seed:d}' for seed in seeds)}. 95% intervals; "
        "differences are paired, and their p values adjusted after Holm. "
        f"Below {100 * margin:g} points they do not matter."
    )


def _answers(sampling: Mapping[str, Any]) -> str:
    return "1 answer" if sampling["samples"] == 1 else f"{sampling['samples']:,} answers"


def _training_time(line: Mapping[str, Any], seeds: Sequence[int], seed: int | None) -> list[str]:
    times = line["training_seconds"]
    return [f"Training of this adapter: {times[seeds.index(seed)]:,.0f} s."] if times and seed in seeds else []


def _choice(report: Mapping[str, Any], line: Mapping[str, Any]) -> list[str]:
    chosen, tried = line["candidate"], report["choice"].get(line["name"], {})
    if not chosen or len(tried) < 2:
        return []
    step = f", step {chosen['step']:,}" if chosen["step"] else ""
    on = (
        "the test set"
        if report["chosen_on"] == "the test set"
        else f"{report['settings']['run']['selection']:,} other questions, with the first seed"
    )
    return [f"Learning rate {chosen['rate']:g}{step}: the best of {len(tried)} tried, on {on}."]


def _of_sweep(points: int | None) -> list[str]:
    if not points or points < 2:
        return []
    return [
        f"One of {points:,} runs of a sweep, for which nothing here is corrected: the best of them is chosen by luck, "
        "too."
    ]


def _wrong(report: Mapping[str, Any]) -> list[Mapping[str, str]]:
    return [check for check in report["harness_check"] if check["got"] != check["expected"]]


def _harness(report: Mapping[str, Any]) -> list[str]:
    checks = report["harness_check"]
    if not checks:
        return ["Harness check: none; no arm whose verdict is known beforehand was in the run."]
    right = f"{len(checks) - len(_wrong(report))} of {len(checks)} arms whose verdict is known beforehand got it."
    return [f"Harness check: {'FAILED' if _wrong(report) else 'passed'}; {right}"]


def _doubts(report: Mapping[str, Any]) -> list[str]:
    doubts = [
        f"The check of the harness failed: {code(check['arm'])} should be {prose(check['expected'])}, and got "
        f"{prose(check['got'])}."
        for check in _wrong(report)
    ]
    if report["chosen_on"] == "the test set":
        doubts.append(
            "Selected on the test set: learning rates and checkpoints were chosen by the very answers that are judged "
            "here. The accuracies are too high."
        )
    return doubts


def _cut_off(truncated: Sequence[float]) -> list[str]:
    most = sum(truncated) > len(truncated) / 2
    return ["More than half of its answers were cut at the token limit, before they came to an end."] if most else []


def _cut(truncated: Sequence[float], limit: int) -> list[str]:
    share = sum(truncated) / len(truncated)
    return [f"{100 * share:.1f}% of its answers were cut at {limit:,} new tokens."] if share else []


def _overlap(found: Mapping[str, Any], source: str) -> list[str]:
    return [
        f"Overlap with {source}: {kinds} of {found['benchmark_problems'][task]:,} questions of {code(task)}."
        for task, counts in found["counts"].items()
        if (kinds := ", ".join(f"{count:,} {prose(kind)}" for kind, count in counts.items() if count))
    ]
