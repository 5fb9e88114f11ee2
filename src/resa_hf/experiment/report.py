"""The report of a run: a table to read, a JSON file to parse, a picture to look at."""

import importlib.metadata
from dataclasses import asdict
from typing import Any

from .. import __version__
from .folder import RunFolder, write_json
from .plot import plot_results
from .results import SEEDS_FOR_THE_METHOD, ArmResult, harness_check, sae_quality
from .settings import RunSettings

PACKAGES = ("torch", "transformers", "trl", "peft", "sae-lens", "datasets", "accelerate")


def write_report(
    folder: RunFolder,
    settings: RunSettings,
    results: list[ArmResult],
    data: dict[str, Any],
    choosing: dict[str, Any],
) -> str:
    """Writes report.md, report.json and report.png into the run's folder.

    Returns:
        `str`: the table and what follows from it, for the terminal.
    """
    saes = sae_quality(folder, settings)
    seconds = sum(quality["seconds"] for quality in saes.values()) + sum(sum(r.seconds.values()) for r in results)
    text = "\n\n".join(
        part for part in (table(results), _reading(settings, results), _harness(results), _sae_lines(saes)) if part
    )
    title = f"# {settings.run.model_name_or_path} on {settings.run.dataset}\n\n![accuracy by arm](report.png)"
    closing = (
        f"{data['rows']} {data['train_rows']:,} rows to train on ({data['tokens']['train']['describe']}); "
        f"{data['held_out_rows']:,} held out.\n\n"
        f"Seeds {', '.join(map(str, settings.run.seeds))}. All jobs together took {seconds:.0f} s. "
        + ", ".join(f"{name} {version}" for name, version in versions().items())
        + "."
    )
    folder.root.mkdir(parents=True, exist_ok=True)
    (folder.root / "report.md").write_text(f"{title}\n\n{text}\n\n## Data and versions\n\n{closing}\n")
    write_json(
        folder.root / "report.json",
        {
            "settings": as_plain(settings),
            "data": data,
            "learning_rate_choice": choosing,
            "sae_quality": saes,
            "arms": [_plain_result(result) for result in results],
            "harness_check": [
                {"arm": name, "expected": expected, "got": got} for name, expected, got in harness_check(results)
            ],
            "seconds": seconds,
            "versions": versions(),
        },
    )
    problems = len(results[0].outcomes)
    seeds = "1 seed" if len(settings.run.seeds) == 1 else f"{len(settings.run.seeds)} seeds"
    subtitle = f"{problems} held-out problems, {seeds}, {settings.run.model_name_or_path}"
    plot_results(results, folder.root / "report.png", subtitle)
    return text


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
        "arms": [{**asdict(arm), "tuning": dict(arm.tuning)} for arm in settings.arms],
    }


def table(results: list[ArmResult]) -> str:
    """The result table in Markdown, its columns aligned."""
    head = [
        "arm",
        "accuracy %",
        "95% interval",
        "minus base",
        "95% interval",
        "greedy %",
        "KL first",
        "KL last",
        "length",
        "verdict",
    ]
    rows = [head] + [_row(result) for result in results]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _row(result: ArmResult) -> list[str]:
    interval, difference = result.accuracy, result.difference
    return [
        result.arm.name,
        f"{100 * interval.estimate:.1f}",
        f"{100 * interval.low:.1f} to {100 * interval.high:.1f}",
        "" if difference is None else f"{100 * difference.estimate:+.1f}",
        "" if difference is None else f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}",
        "" if result.greedy is None else f"{100 * result.greedy:.1f}",
        "" if result.initial_kl is None else f"{result.initial_kl:.4f}",
        "" if result.final_kl is None else f"{result.final_kl:.4f}",
        f"{result.mean_length:.1f}",
        "" if result.verdict is None else result.verdict.word,
    ]


def _reading(settings: RunSettings, results: list[ArmResult]) -> str:
    """The verdicts in words, and what question they answer."""
    seeds, problems = len(settings.run.seeds), len(results[0].outcomes)
    if seeds >= SEEDS_FOR_THE_METHOD:
        question = (
            f"These are verdicts on the method: differences to the base are paired by seed ({seeds} seeds, t interval "
            f"with {seeds - 1} degrees of freedom; the same {problems} problems and sampling seeds for every arm)."
        )
    else:
        subject = "this adapter" if seeds == 1 else "these adapters"
        question = (
            f"These are verdicts on {subject}, not on the method: differences are paired by problem ({problems} "
            f"problems). {SEEDS_FOR_THE_METHOD} seeds or more make a statement about the method."
        )
    correction = (
        ""
        if len(results) < 3
        else f" p values of differences carry Holm's correction for {len(results) - 1} comparisons."
    )
    lines = [
        f"- {result.verdict.sentence}." + (f" It is {result.controls}." if result.controls else "")
        for result in results
        if result.verdict is not None
    ]
    return f"{question}{correction}\n\n" + "\n".join(lines)


def _harness(results: list[ArmResult]) -> str:
    checks = harness_check(results)
    if not checks:
        return ""
    wrong = [f"{name} should be {expected}, got {got}" for name, expected, got in checks if expected != got]
    if wrong:
        return f"Harness check: FAILED. {'; '.join(wrong)}. Trust none of the verdicts above."
    return f"Harness check: passed. {len(checks)} arms whose verdict is known by how they are made each got it."


def _sae_lines(saes: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"- SAE of the {source}: "
        + ", ".join(f"{key} {value:.4g}" for key, value in quality.items() if key != "seconds")
        + f" (held-out text), {quality['seconds']:.0f} s of Stage I."
        for source, quality in saes.items()
    ]
    return "\n".join(lines)


def _plain_result(result: ArmResult) -> dict[str, Any]:
    return {
        "name": result.arm.name,
        "learning_rate": result.rate,
        "accuracy": asdict(result.accuracy),
        "accuracy_by_seed": result.by_seed,
        "problems": len(result.outcomes),
        "greedy_accuracy": result.greedy,
        "mean_length": result.mean_length,
        "truncated": result.truncated,
        "initial_kl": result.initial_kl,
        "final_kl": result.final_kl,
        "difference_to_base": None if result.difference is None else asdict(result.difference),
        "adjusted_p": result.adjusted_p,
        "verdict": None if result.verdict is None else asdict(result.verdict),
        "against_controls": result.controls,
        "seconds": result.seconds,
    }
