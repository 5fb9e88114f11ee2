"""The report of a sweep: one table over all points, what the best of them is worth, and what it all took."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from filelock import FileLock

from ..errors import JobError
from ..evaluation.cost import current_device
from ..evaluation.plot import plot_comparison
from ..evaluation.tables import finite, markdown, points, reading
from .arms import BASE
from .best_of import BestOf, best_lines, best_of
from .folder import reading_files, write_json, write_whole
from .report import as_plain, cost_table, kind_of_accuracy, on_choosing, plain_result, read_costs, versions
from .results import answers_of
from .sweep import Point, Sweep, shown
from .sweep_layers import report_layers
from .sweep_results import Line, collected, judged_together, lines_by_arm


def report_once(sweep: Sweep, failed: Mapping[str, str], since: float) -> None:
    """Writes the report, unless another process of the sweep has.

    Args:
        sweep ([`Sweep`]): what was done.
        failed (`Mapping[str, str]`): the points that failed, and why.
        since (`float`): `time.time()` of the command's start.

    Raises:
        `JobError`: naming the points that failed, once the report on the others is written.
    """
    path = sweep.root / "report.json"
    with FileLock(sweep.root / "locks" / "report.lock"):
        if len(failed) < len(sweep.points) and not (path.is_file() and path.stat().st_mtime >= since):
            with reading_files(sweep.root):
                text = write_sweep_report(sweep, failed)
            print("\n" + text)
    if failed:
        told = "\n".join(f"  {name}: {why}" for name, why in failed.items())
        raise JobError(f"{len(failed)} of {len(sweep.points)} points failed:\n{told}\nA rerun tries them again.")
    print(f"\nReport: {sweep.root / 'report.md'}, report.json, report.png. Runs: {sweep.root}/*/report.md.")


def write_sweep_report(sweep: Sweep, failed: Mapping[str, str]) -> str:
    """Writes report.md, report.json and the pictures into the sweep's folder.

    Returns:
        `str`: the table and what follows from it, for the terminal.
    """
    finished = [point for point in sweep.points if point.name not in failed]
    lines = judged_together({point.name: (point, collected(point)) for point in finished})
    best = _best(lines) if sweep.one_base else {}
    layers = report_layers(sweep, lines_by_arm(lines)) if finished[0].is_by_hookpoint else None
    price = sweep.points[0].settings.run.price_per_gpu_hour
    costs = read_costs(dict.fromkeys(root for point in finished for root in point.folder.roots), price)
    pictures = (layers and layers.pictures) or _draw(sweep, lines)
    compared = sum(line.result.arm != BASE for line in lines)
    parts = [
        "" if not failed else "**Failed:** " + "; ".join(f"{name} ({why})" for name, why in failed.items()),
        sweep_table(lines),
        *dict.fromkeys(on_choosing(point.settings, point.settings.candidates[1:]) for point in finished),
        _on_comparisons(compared, len(finished)),
        best_lines(best),
        "" if layers is None else layers.text,
        cost_table(costs, "all points; what they share counts once"),
        _verdicts(lines) if sweep.one_base else "",
    ]
    text = "\n\n".join(part for part in parts if part)
    run = sweep.points[0].settings.run
    shown_pictures = "".join(f"![{alt}]({name})\n\n" for name, alt in pictures.items())
    title = f"# Sweep: {run.model_name_or_path} on {run.dataset}"
    write_whole(sweep.root / "report.md", f"{title}\n\n{shown_pictures}{text}\n")
    write_json(sweep.root / "report.json", finite({
        "grid": {field: _values(sweep, field) for field in sweep.points[0].values},
        "points": [_plain_point(point, lines) for point in finished],
        "failed": dict(failed),
        "comparisons": compared,
        "best": {name: asdict(found) for name, found in best.items()},
        "layers": None if layers is None else layers.plain,
        "features": None if sweep.features is None else asdict(sweep.features),
        "costs": {name: cost.as_plain() for name, cost in costs.items()},
        "device": current_device(),
        "versions": versions(),
    }))  # fmt: skip
    return text


def sweep_table(lines: Sequence[Line]) -> str:
    """Markdown: the grid's values, the arm, its accuracy, its difference to the base, the verdict, what it took."""
    fields = list(lines[0].point.values)
    head = ["arm", "accuracy %", "95% interval", "minus base", "95% interval", "adjusted p", "training s", "answers s"]
    rows = []
    for line in lines:
        result, compared = line.result, line.result.compared
        rows.append([
            *(_cell(line, field, lines) for field in fields),
            result.arm.name,
            *points(compared.accuracy),
            *points(compared.difference, sign=True),
            "" if compared.adjusted_p is None else f"{compared.adjusted_p:.2g}",
            f"{result.seconds['training']:,.0f}" if result.arm.is_trained else "",
            f"{result.seconds['answers']:,.0f}",
            "" if compared.verdict is None else compared.verdict.word,
        ])  # fmt: skip
    return markdown([*fields, *head, "verdict"], rows)


def _cell(line: Line, field: str, lines: Sequence[Line]) -> str:
    """A base has the values that are the same at all of its points."""
    if line.result.arm != BASE:
        return shown(line.point.values[field])
    bases = [other for other in lines if other.result.arm == BASE]
    values = {shown(other.point.values[field]) for other in lines if other.point.base == line.point.base}
    return values.pop() if len(values) == 1 and len(bases) > 1 else ""


def _on_comparisons(compared: int, finished: int) -> str:
    if compared == 1:
        return ""
    text = (
        f"{compared} comparisons with the base, at {finished} point{'s' if finished > 1 else ''}: p values carry "
        f"Holm's correction for all {compared}; those against controls, for the controls of one arm and point. "
        "Intervals are of one comparison each."
    )
    if finished == 1:
        return text
    return (
        f"{text} The best of several points is chosen by luck, too: its difference is too large on average, and new "
        "seeds or problems tell the true one."
    )


def _values(sweep: Sweep, field: str) -> list[Any]:
    return list({shown(point.values[field]): point.values[field] for point in sweep.points}.values())


def _best(lines: Sequence[Line]) -> dict[str, BestOf]:
    """Of each trained arm; what is not trained does not depend on most grids."""
    return {
        name: best_of({
            line.point.name: answers_of(line.point.folder, line.point.settings, line.result.arm, line.result.candidate)
            for line in found
        })
        for name, found in lines_by_arm(lines).items()
        if found[0].result.arm.is_trained and len(found) > 1
    }  # fmt: skip


def _verdicts(lines: Sequence[Line]) -> str:
    return "## Verdicts\n\n" + reading([line.result.compared for line in lines])


def _plain_point(point: Point, lines: Sequence[Line]) -> dict[str, Any]:
    return {
        "values": dict(point.values),
        "folder": point.root.name,
        "stage1": point.stage1,
        "base": point.base,
        "settings": as_plain(point.settings),
        "arms": [
            plain_result(line.result)
            for line in lines
            if line.point == point or (line.result.arm == BASE and line.point.base == point.base)
        ],
    }


def _draw(sweep: Sweep, lines: Sequence[Line]) -> dict[str, str]:
    """A picture for each base; returns their names and alternative texts."""
    drawn = {}
    for number, base in enumerate(dict.fromkeys(line.point.base for line in lines), start=1):
        name = "report.png" if number == 1 else f"report-{number}.png"
        some = [line for line in lines if line.point.base == base]
        settings = some[0].point.settings
        seeds = "1 seed" if len(settings.run.seeds) == 1 else f"{len(settings.run.seeds)} seeds"
        subtitle = f"{some[0].result.compared.problems} problems, {seeds}, {settings.run.model_name_or_path}"
        results = [line.result.compared for line in some]
        plot_comparison(results, sweep.root / name, subtitle, kind_of_accuracy(settings))
        drawn[name] = "accuracy by point and arm"
    return drawn
