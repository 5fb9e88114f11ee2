"""What a report.json says, as Markdown: for where no report.md lies beside it, as in repositories on the Hub."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..escaping import code
from ..evidence import evidence_of_evaluation, evidence_of_run

# By hookpoint: `fvu`, `l0`, `dead_share`, `ce_recovered`.
Quality = Mapping[str, Mapping[str, float | None]]

_MEASURE = re.compile(r"(?:eval_)?(fvu|l0|dead_share|ce_recovered)/(.+)")
_COMPARED = ["model", "accuracy %", "95% interval", "minus base", "95% interval", "adjusted p", "verdict"]
_CONTROLS = ["minus its control", "difference", "95% interval", "adjusted p"]
_TASKS = ["task", "base %", "accuracy %", "95% interval", "minus base", "95% interval", "adjusted p"]
_MOST = 100  # adapters; a stranger's report may name any number


def report_parts(report: Mapping[str, Any]) -> Iterator[str]:
    """The verdict on each adapter, the quality of each SAE, and what it all took.

    Args:
        report (`Mapping`): of any command; where it is damaged, what reading it raises is raised.

    Yields:
        `str`: paragraphs and tables.
    """
    from ..evaluation.tables import markdown  # which imports scipy

    find = evidence_of_evaluation if "models" in report else lambda run, name: evidence_of_run(run, name, None)
    lines = report.get("models", report.get("arms", []))
    if len(lines) > _MOST:
        raise ValueError(f"{len(lines)} adapters are more than {_MOST}")
    told: set[str] = set()
    for line in lines[1:]:
        one = find(report, line["name"])
        yield f"## {code(line['name'])}\n\n**Verdict: {one.verdict}.** {one.sentence}. {one.scope}"
        yield from (f"**No verdict here can be trusted.** {doubt}" for doubt in one.doubts)
        for head, rows in ((_COMPARED, one.models), (_CONTROLS, one.controls), (_TASKS, one.tasks)):
            if rows:
                yield markdown(head, rows)
        new = [note for note in (*one.notes, *one.limits) if note not in told]
        yield "\n".join(f"- {note}" for note in new)
        told.update(new)
    for source, quality in quality_of(report).items():
        yield f"## {code(source)}\n\n{quality_table(quality)}"
    told_costs = {} if "tested" in report else report["costs"]  # a report of features has none
    costs = [[code(part), f"{cost['seconds']:,.0f}", f"{cost['tokens']:,}"] for part, cost in told_costs.items()]
    if costs:
        yield markdown(["cost", "seconds", "tokens"], costs)


def quality_of(report: Mapping[str, Any]) -> Mapping[str, Quality]:
    """What a report of a run, of Stage I or of features says of SAEs on held-out text, by the model that they read."""
    if "quality" in report:
        return {"SAEs": report["quality"]}
    sources = {f"SAEs of the {source}": found for source, found in report.get("sae_quality", {}).items()}
    by_source: dict[str, dict[str, dict[str, float | None]]] = {}
    for source, measures in (sources or {"SAEs": report.get("held_out", {})}).items():
        quality = by_source.setdefault(source, {})
        for match, value in ((_MEASURE.fullmatch(key), value) for key, value in measures.items()):
            if match is not None:
                quality.setdefault(match[2], {})[match[1]] = value
    return {source: quality for source, quality in by_source.items() if quality}


def quality_table(quality: Quality) -> str:
    """Markdown, a row a hookpoint."""
    from ..evaluation.tables import markdown

    names = {"fvu": "FVU", "l0": "L0", "dead_share": "dead share", "ce_recovered": "CE recovered"}
    rows = [
        [code(hookpoint), *("" if (value := measured.get(key)) is None else f"{value:.4g}" for key in names)]
        for hookpoint, measured in quality.items()
    ]
    return markdown(["hookpoint", *names.values()], rows)
