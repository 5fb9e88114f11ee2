"""What results say of the layers: reasoning latents, the quality of the SAEs, and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from ..errors import ExploreError
from ..escaping import prose
from .result_text import quality_of, quality_table
from .results import Result, reading, render, report_text, runs_of

_SCORES = ": reasoning features and scores"


def layers_html(results: Sequence[Result]) -> str:
    """The tables and pictures by layer of all results, as HTML for a page with [`~resa_hf.explore.results.STYLE`].

    Where a kind of result is missing, a sentence names the command that makes it.

    Args:
        results (sequence of [`Result`]): as `find_results` returns them; those without layers are passed over.
    """
    parts = [
        _part(
            "Reasoning latents by layer",
            "counts them: <code>resa-hf features</code> does, on a model with SAEs at several layers",
            _latents,
            results,
        ),
        _part(
            "Quality of the SAEs by layer",
            "has measured an SAE: <code>resa-hf train-sae</code> does, and <code>resa-hf features</code>",
            _quality,
            results,
        ),
        _part(
            "Scores by layer",
            "has them: <code>resa-hf sweep</code> does, with <code>grid: {hookpoint: all}</code> in its recipe",
            _scores,
            results,
        ),
    ]
    return f'<div class="resa-report">{"".join(parts)}</div>'


def _part(title: str, missing: str, find: Callable[[Result], str], results: Sequence[Result]) -> str:
    found = []
    for result in results:
        try:
            if text := find(result):
                found.append(f"<h3>{escape(result.label)}</h3>{render(result, text)}")
        except ExploreError as error:
            found.append(f"<h3>{escape(result.label)}</h3><p>{escape(str(error))}</p>")
    return f"<h2>{title}</h2>{''.join(found)}" if found else f"<h2>{title}</h2><p>No result here {missing}.</p>"


def _latents(result: Result) -> str:
    text = _sections(result).get("Reasoning latents by layer", "") if result.kind == "features" else ""
    return "\n\n".join(part for part in text.split("\n\n") if "pictures/prompt.png" not in part)  # by token


def _quality(result: Result) -> str:
    if result.kind == "features" and (text := _sections(result).get("Quality of the SAEs")):
        return text
    runs = runs_of(result)[:1]  # Stage I of a sweep over hookpoints is that of all of its points
    with reading(result):
        quality = quality_of(runs[0][1] if runs else result.report)
        return "\n\n".join(f"{prose(source)}:\n\n{quality_table(one)}" for source, one in quality.items())


def _scores(result: Result) -> str:
    if result.kind != "sweep" or not result.report.get("layers"):
        return ""
    (_, first), *others = _sections(result).items()
    return "\n\n".join([first, *(f"### {title}\n\n{text}" for title, text in others if title.endswith(_SCORES))])


def _sections(result: Result) -> dict[str, str]:
    """The text of the report by its headings; what stands before the first, but for the title, comes first."""
    first, *others = report_text(result).split("\n## ")
    titled = (section.partition("\n") for section in others)
    return {"": first.partition("\n")[2]} | {title.strip(): text for title, _, text in titled}
