"""From the files of a sweep's points to the lines of one table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..evaluation.statistics import holm
from ..evaluation.verdict import against_controls, judge
from .results import ArmResult, choose_candidates, collect, controls_of, without_stand_in
from .schedule import choosing_jobs
from .sweep import Point


@dataclass(frozen=True)
class Line:
    """An arm at a point, or the base before the first point that is held against it."""

    point: Point
    result: ArmResult


def collected(point: Point) -> list[ArmResult]:
    """The results of a point that is finished, the base first."""
    chosen, _ = choose_candidates(point.folder, point.settings, choosing_jobs(point.settings))
    return collect(point.folder, point.settings, chosen)


def judged_together(results: Mapping[str, tuple[Point, Sequence[ArmResult]]]) -> list[Line]:
    """Every arm of every point with the verdict that it gets among all of them; each base once, before its points."""
    adjusted = holm({
        f"{name}\n{result.arm.name}": result.compared.difference.p_value
        for name, (_, arms) in results.items()
        for result in arms
        if result.compared.difference is not None
    })  # fmt: skip
    lines: list[Line] = []
    for name, (point, arms) in results.items():
        if all(line.point.base != point.base for line in lines):
            lines.append(Line(point, arms[0]))
        lines += [Line(point, _judged(result, point, adjusted[f"{name}\n{result.arm.name}"])) for result in arms[1:]]
    return lines


def _judged(result: ArmResult, point: Point, adjusted_p: float) -> ArmResult:
    compared, settings, name = result.compared, point.settings, result.arm.name
    assert compared.difference is not None and compared.equivalence_p is not None
    shown_name = f"{name}, {point.name}"
    verdict = judge(compared.difference, adjusted_p, compared.equivalence_p, settings.run.margin, shown_name)
    if name in controls_of(settings.arms):
        minus = {control: line.difference for control, line in compared.controls.items()}
        p_values = {control: line.adjusted_p for control, line in compared.controls.items()}
        verdict = against_controls(verdict, minus, p_values, stand_in=name not in without_stand_in(settings.arms))
    return replace(result, compared=replace(compared, name=shown_name, adjusted_p=adjusted_p, verdict=verdict))


def lines_by_arm(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The lines of each arm, the base's included."""
    names = dict.fromkeys(line.result.arm.name for line in lines)
    return {name: [line for line in lines if line.result.arm.name == name] for name in names}
