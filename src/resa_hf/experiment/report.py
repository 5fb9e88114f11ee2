"""The report of a run: a table to read, a JSON file to parse, a picture to look at."""

import importlib.metadata
import math
from collections.abc import Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import __version__
from ..evaluation.benchmarks import task_revisions
from ..evaluation.contamination import OverlapReport
from ..evaluation.cost import Cost, current_device, gpus_held
from ..evaluation.plot import plot_comparison
from ..evaluation.ratios import ratio_over_seeds
from ..evaluation.statistics import Interval
from ..evaluation.tables import (
    comparison_table,
    controls_table,
    finite,
    markdown,
    plain,
    ratio_table,
    reading,
    share,
    task_table,
)
from ..provenance import Revisions
from .answering import GREEDY, HELD_OUT, SELECTION, read_answers
from .arms import SOURCE, plain_arm
from .folder import RunFolder, read_json, write_json, write_whole
from .results import ArmResult, harness_check, read_revisions, sae_quality, sampled_texts
from .sampled_text import TEXT
from .settings import RunArguments, RunSettings
from .stages import STAGE1, TUNING

PACKAGES = ("torch", "transformers", "trl", "peft", "sae-lens", "datasets", "accelerate")


def write_report(
    folder: RunFolder,
    settings: RunSettings,
    results: list[ArmResult],
    data: dict[str, Any],
    choosing: dict[str, Any],
    planned: dict[str, Any],
    overlap: OverlapReport | None = None,
) -> str:
    """Writes report.md, report.json and report.png into the run's folder.

    Returns:
        `str`: the table and what follows from it, for the terminal.
    """
    saes, texts = sae_quality(folder, settings), sampled_texts(folder, settings)
    revisions = read_revisions(folder, settings, data)
    costs = read_costs(folder.roots, settings.run.price_per_gpu_hour)
    ratios = _rl_ratios(settings.run, results)
    compared = [result.compared for result in results]
    checks = harness_check(results, moved=settings.run.evaluate_on is not None)
    parts = [
        table(results),
        task_table(compared),
        on_choosing(settings, choosing),
        _of_sweep(folder.points),
        reading(compared),
        controls_table(compared),
        ratio_table(compared, settings.run.rl_arm or ""),
        _harness(checks),
        _sae_lines(saes),
        _text_lines(texts),
        planned["text"],
        "" if overlap is None else overlap.as_markdown(),
        cost_table(costs),
        _rl_lines(ratios),
    ]
    text = "\n\n".join(part for part in parts if part)
    write_whole(folder.root / "report.md", f"{_title(settings)}\n\n{text}\n\n{_closing(settings, data, revisions)}\n")
    content = {
        "settings": as_plain(settings),
        "sweep_points": folder.points,
        "data": data,
        "revisions": revisions,
        "tasks": task_revisions(compared[0].tasks),
        "planned": planned,
        "chosen_on": _chosen_on(settings) if choosing else None,
        "choice": choosing,
        "sae_quality": saes,
        "sampled_text": texts,
        "arms": [plain_result(result) for result in results],
        "harness_check": [{"arm": name, "expected": expected, "got": got} for name, expected, got in checks],
        "overlap": None if overlap is None else overlap.as_plain(),
        "costs": {name: cost.as_plain() for name, cost in costs.items()},
        "rl_ratios": _plain_ratios(ratios),
        "device": current_device(),
        "versions": versions(),
    }
    write_json(folder.root / "report.json", finite(content))
    plot_comparison(compared, folder.root / "report.png", _subtitle(settings, results), kind_of_accuracy(settings))
    return text


def _title(settings: RunSettings) -> str:
    return f"# {settings.run.model_name_or_path} on {settings.run.dataset}\n\n![accuracy by arm](report.png)"


def _closing(settings: RunSettings, data: dict[str, Any], revisions: Revisions) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"## Data and versions\n\n{data['rows']} {data['train_rows']:,} rows to train on "
        f"({data['tokens']['train']['describe']}); {data['held_out_rows']:,} held out.\n\n"
        f"Seeds {', '.join(map(str, settings.run.seeds))}. {packages}.{_commits(revisions)}"
    )


def _commits(revisions: Revisions) -> str:
    known = [f"{role} {found['name']}@{found['commit']}" for role, found in revisions.items() if found["commit"]]
    return f"\n\nRead from the Hub: {', '.join(known)}." if known else ""


def versions() -> dict[str, str]:
    """The versions that were used."""
    return {name: importlib.metadata.version(name) for name in PACKAGES} | {"resa-hf": __version__}


def as_plain(settings: RunSettings) -> dict[str, Any]:
    """The settings as JSON can hold them."""
    return {
        "run": asdict(settings.run),
        "stage1": dict(settings.stage1),
        "stage2": dict(settings.stage2),
        "sampling": asdict(settings.sampling),
        "arms": [plain_arm(arm) for arm in settings.arms],
    }


def table(results: list[ArmResult]) -> str:
    """The result table in Markdown."""
    others = {
        "greedy %": [_number(result.greedy and 100 * result.greedy, ".1f") for result in results],
        "KL first": [_number(result.initial_kl, ".4f") for result in results],
        "KL last": [_number(result.final_kl, ".4f") for result in results],
        "KL(base, tuned)": [_number(result.without_sae.get("kl"), ".4f") for result in results],
        "size of dW": [_number(result.without_sae.get("update_norm"), ".2f") for result in results],
        "length": [f"{result.mean_length:.1f}" for result in results],
        "truncated %": [f"{100 * result.truncated:.1f}" for result in results],
    }
    accuracy = "macro-average" if len(results[0].compared.tasks) > 1 else "accuracy"
    return comparison_table([result.compared for result in results], others, accuracy=accuracy)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def kind_of_accuracy(settings: RunSettings) -> str:
    """In words, for the axis of a picture."""
    return "accuracy on the tasks, macro-average" if settings.run.tasks else "held-out accuracy"


def _subtitle(settings: RunSettings, results: list[ArmResult]) -> str:
    run = settings.run
    seeds = "1 seed" if len(run.seeds) == 1 else f"{len(run.seeds)} seeds"
    model = run.model_name_or_path if run.evaluate_on is None else f"adapters moved to {run.evaluate_on}"
    chosen = ", SELECTED ON THE TEST SET" if run.choose_on_test else ""
    return f"{results[0].compared.problems} problems, {seeds}, {model}{chosen}"


def _chosen_on(settings: RunSettings) -> str:
    return "the test set" if settings.run.choose_on_test else "selection questions"


def on_choosing(settings: RunSettings, choosing: Collection[Any]) -> str:
    """How learning rates and checkpoints were chosen; empty where there was nothing to choose."""
    if not choosing:
        return ""
    if settings.run.choose_on_test:
        return (
            "**Selected on the test set.** Learning rates and checkpoints were chosen by the very answers that are "
            "judged here: the accuracies are too high, and no verdict below can be trusted."
        )
    return (
        f"Learning rates and checkpoints were chosen on {settings.run.selection} other questions, with the first seed."
    )


def _of_sweep(points: int | None) -> str:
    if points is None or points < 2:
        return ""
    return (
        f"This is one of {points} runs of a sweep. What follows is corrected for the arms of this run alone: the best "
        f"of {points} is chosen by luck, too. The sweep's own report, one folder up, corrects for all."
    )


def _harness(checks: list[tuple[str, str, str]]) -> str:
    if not checks:
        return ""
    wrong = [f"{name} should be {expected}, got {got}" for name, expected, got in checks if expected != got]
    if wrong:
        return f"Harness check: FAILED. {'; '.join(wrong)}. Trust none of the verdicts above."
    return f"Harness check: passed. {len(checks)} arms whose verdict is known by how they are made each got it."


def _sae_lines(saes: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"- SAE of the {source.replace('-', ', ')}: "
        + ", ".join(f"{key} {value:.4g}" for key, value in quality.items() if key not in ("seconds", "tokens"))
        + " (held-out text)."
        for source, quality in saes.items()
    ]
    return "\n".join(lines)


def _text_lines(texts: dict[str, dict[str, Any]]) -> str:
    """What was asked for the text of all seeds, what of it is trained on, and what writing it took."""
    lines = [
        f"- Text sampled from the {text}: {told['asked']:,} questions asked, {told['kept']:,} kept"
        f"{' (right and not truncated)' if text == SOURCE else ''}; {told['tokens']:,} tokens written in "
        f"{told['seconds']:,.0f} s."
        for text, told in texts.items()
    ]
    return "\n".join(lines)


def read_costs(roots: Iterable[Path], price: float | None) -> dict[str, Cost]:
    """What the parts of a run took, told by the files in its folders: all arms and seeds, and what was tried to choose
    among.
    """
    folders = list(roots)
    saes = [read_json(path) for root in folders for path in root.glob(f"sae/*/*/{STAGE1}")]
    tunings = [read_json(path) for root in folders for path in root.glob(f"arms/**/{TUNING}")]
    places = {path.parent.parent for root in folders for path in root.glob("arms/**/answers/*")}
    answers = [
        task
        for place in places
        for split in (SELECTION, HELD_OUT, GREEDY)
        for task in read_answers(place, split).values()
    ]
    texts = [read_json(path) for root in folders for path in root.glob(f"text/*/*/{TEXT}")]
    parts = {
        "Stage I": [(sae["seconds"], sae["tokens"]) for sae in saes],
        **({"sampled text": [(text["seconds"], text["tokens"]) for text in texts]} if texts else {}),
        "Stage II": [(tuning["seconds"], tuning["tokens"]) for tuning in tunings],
        "evaluation": [(task["seconds"], int(task["lengths"].sum())) for task in answers],
    }
    return {
        name: Cost(sum(s for s, _ in spent), sum(t for _, t in spent), price_per_gpu_hour=price)
        for name, spent in parts.items()
    }


def cost_table(costs: dict[str, Cost], head: str = "all arms and seeds, and the choosing") -> str:
    """The costs and their sum."""
    first, *rest = costs.values()
    rows = [[name, *cost.cells()] for name, cost in (costs | {"together": sum(rest, first)}).items()]
    return markdown([head, *Cost.HEAD], rows)


def _rl_ratios(run: RunArguments, results: list[ArmResult]) -> dict[str, dict[str, Any]]:
    """By trained arm: Stage I and II of one seed as shares of the RL training, which the user states."""
    if run.rl_seconds is None:
        return {}
    gpus = gpus_held() / run.rl_gpus
    ratios = {}
    for result in results:
        if spent := result.training_seconds:
            time = ratio_over_seeds(spent, [run.rl_seconds] * len(spent)) if len(spent) > 1 else None
            time = time or Interval(spent[0] / run.rl_seconds, -math.inf, math.inf)
            hours = Interval(gpus * time.estimate, gpus * time.low, gpus * time.high) if gpus else None
            ratios[result.arm.name] = {"time": time, "gpu_hours": hours}
    return ratios


def _plain_ratios(ratios: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {key: value and asdict(value) for key, value in ratio.items()} for name, ratio in ratios.items()}


def _rl_lines(ratios: dict[str, dict[str, Any]]) -> str:
    if not ratios:
        return ""
    head = ["Stage I and II of one seed", "time / RL's", "95% interval", "GPU-hours / RL's", "95% interval"]
    rows = [
        [name, *share(ratio["time"]), *(share(ratio["gpu_hours"]) if ratio["gpu_hours"] else ("", ""))]
        for name, ratio in ratios.items()
    ]
    return markdown(head, rows)


def plain_result(result: ArmResult) -> dict[str, Any]:
    """One line as JSON can hold it."""
    return plain(result.compared) | {
        "candidate": None if result.candidate is None else asdict(result.candidate),
        "greedy_accuracy": result.greedy,
        "mean_length": result.mean_length,
        "truncated": result.truncated,
        "initial_kl": result.initial_kl,
        "final_kl": result.final_kl,
        "without_sae": result.without_sae,
        "seconds": result.seconds,
        "training_seconds": result.training_seconds,
        "tokens": result.tokens,
    }
