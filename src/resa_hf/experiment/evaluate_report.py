"""The report of `resa-hf evaluate`: a table to read, a JSON file to parse, a picture to look at."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.arguments import EvaluateArguments
from ..evaluation.benchmarks import task_revisions
from ..evaluation.comparison import Answers, compare
from ..evaluation.cost import Cost, current_device, gpus_held
from ..evaluation.pipeline import TaskResult
from ..evaluation.plot import plot_comparison
from ..evaluation.samples import maj_at_k, pass_at_k
from ..evaluation.tables import comparison_table, markdown, plain, ratio_table, reading, task_table
from ..places import parse_place
from ..provenance import Revisions, base_revisions, place_revision
from .evaluate import Evaluated, Evaluation
from .folder import write_json, write_whole
from .report import versions


def write_evaluation(args: EvaluateArguments, evaluation: Evaluation) -> str:
    """Writes report.md, report.json and report.png into the output folder.

    Returns:
        `str`: the tables and what follows from them, for the terminal.
    """
    folder, models = Path(args.output_dir), evaluation.models
    answers = [
        Answers(model.name, {task: [result.outcomes.correct] for task, result in model.tasks.items()})
        for model in models
    ]
    # Without controls an adapter's verdict says that it was compared with none.
    adapters, held_against = (
        [args.name_and_place(adapter)[0] for adapter in group] for group in (args.adapters, args.controls)
    )
    controls = dict.fromkeys(adapters, held_against)
    compared = compare(answers[0], answers[1:], args.margin, controls, args.rl_adapter)
    costs = {model.name: _cost(args, model) for model in models}
    details = {model.name: _detail(model) for model in models}
    read = _adapters_read(args)
    accuracy = "macro-average" if len(models[0].tasks) > 1 else "accuracy"
    parts = [
        comparison_table(compared, _columns(models), "model", accuracy),
        task_table(compared, "model"),
        _samples_table(details),
        reading(compared) if len(compared) > 1 else "",
        ratio_table(compared, args.rl_adapter or ""),
        evaluation.planned["text"],
        markdown(["cost", *Cost.HEAD], [[name, *cost.cells()] for name, cost in costs.items()]),
        *(f"Overlap with {source}. {report.as_markdown()}" for source, report in evaluation.overlap.items()),
    ]
    text = "\n\n".join(part for part in parts if part)
    used = "\n".join(f"- {key}: {value}" for key, value in asdict(args).items() if value not in (None, []))
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    title = f"# {args.model_name_or_path} on {', '.join(models[0].tasks)}\n\n![accuracy by model](report.png)"
    write_whole(folder / "report.md", f"{title}\n\n{text}\n\n## Settings and versions\n\n{used}\n\n{packages}.\n")
    write_json(
        folder / "report.json",
        {
            "settings": asdict(args),
            "revisions": base_revisions(args),
            "tasks": task_revisions(models[0].tasks),
            "planned": evaluation.planned,
            "models": [
                plain(line)
                | {"adapter": read.get(line.name), "moved": dict(model.moved), "tasks_detail": details[model.name]}
                for line, model in zip(compared, models, strict=True)
            ],
            "costs": {name: cost.as_plain() for name, cost in costs.items()},
            "overlap": {source: report.as_plain() for source, report in evaluation.overlap.items()},
            "device": current_device(),
            "versions": versions(),
        },
    )
    subtitle = f"{compared[0].problems} problems, {args.samples} samples each, {args.model_name_or_path}"
    plot_comparison(compared, folder / "report.png", subtitle, accuracy)
    return text


def _adapters_read(args: EvaluateArguments) -> Revisions:
    """By their names here; a server does not tell what it has loaded."""
    named = map(args.name_and_place, (*args.adapters, *args.controls))
    return {} if args.server else {name: place_revision(parse_place(place)) for name, place in named}


def _columns(models: list[Evaluated]) -> dict[str, list[str]]:
    return {
        "KL(base, tuned)": [f"{model.moved['kl']:.4f}" if model.moved else "" for model in models],
        "size of dW": [f"{model.moved['update_norm']:.2f}" if model.moved else "" for model in models],
        "length": [f"{_mean(model, 'lengths'):.1f}" for model in models],
        "truncated %": [f"{100 * _mean(model, 'truncated'):.1f}" for model in models],
    }


def _mean(model: Evaluated, what: str) -> float:
    return float(np.mean([getattr(result.outcomes, what).mean() for result in model.tasks.values()]))


def _samples_table(details: dict[str, Any]) -> str:
    """pass@k and maj@k by task and model; empty with one sample."""
    base = next(iter(details.values()))
    heads = list(next(iter(base.values()))["at_k"])
    rows = [
        [task, name, *(f"{100 * value:.1f}" for value in detail[task]["at_k"].values())]
        for task in base
        for name, detail in details.items()
    ]
    return markdown(["task", "model", *(f"{head} %" for head in heads)], rows) if heads else ""


def _at_k(result: TaskResult) -> dict[str, float]:
    """pass@k and maj@k; k is every power of two above 1, and the number of samples."""
    correct = result.outcomes.correct
    samples = correct.shape[1]
    counts = sorted({samples, *(2**i for i in range(samples.bit_length()))} - {1})
    return {f"pass@{k}": float(pass_at_k(correct, k).mean()) for k in counts} | {
        f"maj@{k}": float(maj_at_k(result.answers, correct, k).mean()) for k in counts
    }


def _detail(model: Evaluated) -> dict[str, Any]:
    return {
        task: {
            "problems": len(result.problems),
            "mean_length": float(result.outcomes.lengths.mean()),
            "truncated": float(result.outcomes.truncated.mean()),
            "seconds": result.seconds,
            "at_k": _at_k(result),
        }
        for task, result in model.tasks.items()
    }


def _cost(args: EvaluateArguments, model: Evaluated) -> Cost:
    results = model.tasks.values()
    gpus = args.gpus
    if gpus is None:
        # A server may hold others than those of this machine.
        gpus = gpus_held() if args.server is None else 0
    seconds = sum(result.seconds for result in results)
    tokens = sum(int(result.outcomes.lengths.sum()) for result in results)
    return Cost(seconds, tokens, gpus, args.price_per_gpu_hour)
