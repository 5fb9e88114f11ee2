"""The reports of resa-hf's commands, found in folders or on the Hub, as a page shows them."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from ..errors import ExploreError
from ..escaping import code, shown, shown_all, without_token
from ..experiment.arms import Arm, Candidate, run_recipe
from ..experiment.folder import SHARED, RunFolder
from ..features.page import embedded, make_renderer
from .public import public_folder
from .result_text import report_parts

Kind = Literal["run", "compare", "evaluate", "sweep", "features", "train-sae", "tune"]

REPORT, TEXT, _CARD = "report.json", "report.md", "README.md"
# What a repository may hold beside its report, and the bytes that are read of each kind of file at most. Rendering the
# text that a stranger wrote takes up to 8 seconds a megabyte.
_PICTURES = ("report", *(f"pictures/{name}" for name in ("counts", "prompt", "quality", "effects", "matching")))
_FILES = (REPORT, TEXT, *(f"{name}{theme}.png" for name in _PICTURES for theme in ("", "-dark")))
_LIMITS = {".json": 2**20, ".md": 2**21, ".png": 2**21}
_LETTERS_SHOWN, _LETTERS_OF_RECIPE = 200_000, 100_000
_ADDRESS = re.compile(r"(pictures/)?\w[\w.-]*\.png", re.ASCII)

# For the page that shows `result_html` and `layers_html`; in its dark mode an element around them has `.dark`.
STYLE: Final = """
.resa-report { overflow-wrap: break-word; }
.resa-report .wide { display: block; overflow-x: auto; margin: 16px 0; }
.resa-report img { width: 100%; min-width: 640px; max-width: 960px; margin: 0; }
.resa-report table { border-collapse: collapse; font-size: 14px; white-space: nowrap; }
.resa-report td:first-child { min-width: 9em; white-space: normal; }
.resa-report th { border: 1px solid #8c959f; padding: 4px 8px; text-align: left; }
.resa-report td { border: 1px solid #8c959f; padding: 4px 8px; text-align: left; }
.resa-report pre { border: 1px solid #8c959f; padding: 8px; white-space: pre-wrap; }
.resa-report .only-dark { display: none; }
.dark .resa-report .only-dark { display: block; }
.dark .resa-report .only-light { display: none; }
"""


@dataclass(frozen=True)
class Result:
    """A report, and where it lies.

    Args:
        label (`str`): what to call it; each of those that `find_results` returns has another one.
        kind (`str`): the command that made it; a run with several arms is a `"compare"`, the demo too.
        folder (`Path`): with its `report.json`, text and pictures.
        report (`Mapping`): `report.json`.
        repo (`str`, *optional*): its name, where it came from the Hub: a stranger wrote it.
    """

    label: str
    kind: Kind
    folder: Path
    report: Mapping[str, Any]
    repo: str | None = None


def find_results(folders: Sequence[Path]) -> list[Result]:
    """The reports in folders and in the folders directly inside them; of a sweep its own alone.

    A `report.json` that is damaged, or that no command of resa-hf wrote, is left out with a warning.

    Args:
        folders (sequence of `Path`): output folders of commands, or folders that hold such.
    """
    found: dict[Path, Result] = {}
    for folder in (folder.resolve() for folder in folders if folder.is_dir()):
        # A sweep's point has a file that names what it shares with the others.
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not (path / f"{SHARED}.json").is_file())
        for place in (folder, *inside):
            if place in found or not (place / REPORT).is_file():
                continue
            try:
                result = _read(place, place.name)
                adapters_of(result), saes_of(result)
            except ExploreError as error:
                warnings.warn(f"{place} is left out: {error}", stacklevel=2)
                continue
            same = sum((one.folder.name, one.kind) == (place.name, result.kind) for one in found.values())
            found[place] = replace(result, label=f"{result.label} ({same + 1})") if same else result
    return list(found.values())


def _read(folder: Path, name: str, repo: str | None = None) -> Result:
    try:
        report = without_token(json.loads((folder / REPORT).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise ExploreError(f"{REPORT} of {name} cannot be read ({type(error).__name__}).") from None
    kind = _kind(report) if isinstance(report, dict) else None
    if kind is None:
        raise ExploreError(f"{REPORT} of {name} is not that of a command of resa-hf.")
    return Result(f"{name}, {kind}", kind, folder, report, repo)


def _kind(report: Mapping[str, Any]) -> Kind | None:
    """The command that wrote it, by what only that one writes."""
    if {"grid", "points"} <= report.keys():
        return "sweep"
    if {"layers", "tested"} <= report.keys():
        return "features"
    if not isinstance(report.get("settings"), dict):
        return None
    if "models" in report:
        return "evaluate"
    if isinstance(arms := report.get("arms"), list):
        return "compare" if len(arms) > 2 else "run"  # the base is one of them
    if "held_out" in report:
        return "train-sae" if "hookpoints" in report["settings"] else "tune"
    return None


@contextmanager
def reading(result: Result) -> Iterator[None]:
    """Says that the report is damaged, where the block finds in it something else than it should hold."""
    try:
        yield
    except ExploreError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ExploreError(
            f"{REPORT} of {result.label} is damaged, or of another version of resa-hf ({type(error).__name__})."
        ) from error


def adapters_of(result: Result) -> dict[str, Path]:
    """The adapters on this machine that the report is about, by names for people: of the first seed, the controls and
    the known ones included. None of a report from the Hub, whose paths mean nothing here.

    Raises:
        `ExploreError`: if the report is damaged.
    """
    with reading(result):
        if result.repo is not None:
            return {}
        if result.kind == "tune":
            found = {"adapter": result.folder}
        elif result.kind == "evaluate":
            models = result.report["models"][1:]
            found = {model["name"]: Path((model.get("adapter") or {}).get("name") or "") for model in models}
        else:
            found = {
                name: path
                for folder, run in runs_of(result)
                for name, path in _arms(folder, run, "" if folder == result.folder else f", {folder.name}")
            }
        return {
            f"{name} ({result.label})": path
            for name, path in found.items()
            if os.path.isfile(path / "adapter_config.json")  # False, and no error, for what is too long to be a path
        }


def runs_of(result: Result) -> list[tuple[Path, Mapping[str, Any]]]:
    """The runs that a report on this machine tells of, a sweep's one by one: folders, and their reports.

    Raises:
        `ExploreError`: if the report is damaged.
    """
    with reading(result):
        if result.repo is not None or result.kind not in ("run", "compare", "sweep"):
            return []
        if result.kind != "sweep":
            return [(result.folder, result.report)]
        folders = [result.folder / Path(point["folder"]).name for point in result.report["points"]]
        return [(folder, _read(folder, folder.name).report) for folder in folders if os.path.isfile(folder / REPORT)]


def _arms(folder: Path, run: Mapping[str, Any], where: str) -> Iterator[tuple[str, Path]]:
    chosen = {line["name"]: line.get("candidate") for line in run["arms"]}
    places, seed = RunFolder.open(folder), int(run["settings"]["run"]["seeds"][0])
    for arm in (Arm(**entry) for entry in run["settings"]["arms"]):
        candidate = Candidate(**chosen[arm.name]) if chosen.get(arm.name) else None
        yield f"{arm.name}{where}", places.arm(arm, candidate, seed) / "adapter"


def saes_of(result: Result) -> dict[str, Path]:
    """The folders of SAEs on this machine that the report is about, by names for people: one folder a hookpoint in
    each; of the first seed. None of a report from the Hub.

    Raises:
        `ExploreError`: if the report is damaged.
    """
    with reading(result):
        if result.repo is not None:
            return {}
        found: dict[str, Path] = {}
        if result.kind == "train-sae":
            found["SAEs"] = result.folder
        elif result.kind == "features":
            found["SAEs"] = Path(result.report["settings"]["saes"])
        for folder, run in runs_of(result):
            places, seed = RunFolder.open(folder), int(run["settings"]["run"]["seeds"][0])
            for source in sorted(path.name for path in places.glob("sae/*")):
                saes = places.sae(source, seed)
                if saes not in found.values():  # points of a sweep share them
                    where = f", {folder.name}" if f"SAEs of the {source}" in found else ""
                    found[f"SAEs of the {source}{where}"] = saes
        return {f"{name} ({result.label})": path for name, path in found.items() if any(path.glob("*/cfg.json"))}


def hub_result(name: str) -> Result:
    """The report that a public repository on the Hub holds, such as `resa-hf publish` puts there.

    Args:
        name (`str`): a visitor's name of it, as [`~resa_hf.explore.names.hub_name`] takes it.

    Raises:
        `ExploreError`: if there is no such repository, or no report in it; or if a file is too large.
        `OSError`: if the Hub cannot be reached.
    """
    there = public_folder(name, "result")
    wanted = [file for file in (_FILES if REPORT in there.sizes else (_CARD,)) if file in there.sizes]
    for file in wanted:
        if there.sizes[file] > (limit := _LIMITS[Path(file).suffix]):
            raise ExploreError(f"{file} of {there.name} has {there.sizes[file]:,} bytes; at most {limit:,} are read.")
    folder = there.fetch(wanted, sum(_LIMITS[Path(file).suffix] for file in wanted))
    if REPORT not in wanted:
        card = _said_instead(folder / _CARD) if wanted else "It has no card either."
        raise ExploreError(f"{there.name} holds no {REPORT}: nothing there tells of a run of resa-hf. {card}")
    return _read(folder, there.name, there.name)


def _said_instead(card: Path) -> str:
    text = card.read_text(encoding="utf-8", errors="replace")
    line = " ".join(re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL).split())
    return f"Its card says: {line[:300]}{'…' if len(line) > 300 else ''}"


def result_html(result: Result) -> str:
    """The report as HTML for a page with `STYLE`. What somebody wrote is text in it; its pictures are part of it.

    Raises:
        `ExploreError`: if the report is damaged.
    """
    return f'<div class="resa-report">{render(result, report_text(result))}</div>'


def report_text(result: Result) -> str:
    """`report.md`; where there is none, as in repositories on the Hub, what `report.json` says of each adapter or SAE.

    Raises:
        `ExploreError`: if the report is damaged.
    """
    path = result.folder / TEXT
    with reading(result):
        if _is_part(path, result, ".md"):
            text = path.read_text(encoding="utf-8", errors="replace")
            if result.repo is None:  # the paths of a report from the Hub are not this machine's
                text = _without_paths(text, result.report)
        else:
            picture = ["![Accuracies](report.png)"] if _is_png(result.folder / "report.png", result) else []
            text = "\n\n".join([f"# {code(result.label)}", *picture, *report_parts(result.report)])
    return text if len(text) <= _LETTERS_SHOWN else f"{text[:_LETTERS_SHOWN]}\n\n…"


def _without_paths(text: str, report: Mapping[str, Any]) -> str:
    """The text with the paths that the report's settings name as their last parts."""
    paths = {path for key in ("settings", "revisions", "points") for path in _strings(report.get(key))}
    longest_first = sorted((path for path in paths if shown(path) != path), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)) or "$^", lambda found: shown(found[0]), text)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
    elif isinstance(value, str):
        yield value


def render(result: Result, markdown: str) -> str:
    """Markdown of a report as HTML, its headings one level lower, with the pictures in its folder, each once."""
    shown_already: set[str] = set()

    def picture(address: str, alt: str) -> str | None:
        light = result.folder / address
        if address in shown_already or not _ADDRESS.fullmatch(address) or not _is_png(light, result):
            return None
        shown_already.add(address)
        dark = light.with_name(f"{light.stem}-dark.png")
        themes = {"only-light": light, "only-dark": dark} if _is_png(dark, result) else {"": light}
        images = (f'<img class="{name}" src="{embedded(path)}" alt="{escape(alt)}">' for name, path in themes.items())
        return f'<span class="wide" tabindex="0">{"".join(images)}</span>'

    renderer = make_renderer(picture)
    tokens = renderer.parse(markdown)
    for token in tokens:
        if token.type.startswith("heading_"):
            token.tag = f"h{min(int(token.tag[1:]) + 1, 6)}"
    return str(renderer.renderer.render(tokens, renderer.options, {}))


def _is_png(path: Path, result: Result) -> bool:
    return _is_part(path, result, ".png") and path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def _is_part(path: Path, result: Result, kind: str) -> bool:
    """Whether it is a file of the result, and no link to another place; the Hub's cache is made of links."""
    inside = path.resolve().is_relative_to(result.folder.resolve()) or result.repo is not None
    return path.is_file() and inside and path.stat().st_size <= _LIMITS[kind]


def recipe_of(result: Result) -> str:
    """The recipe that repeats it, as YAML for `--config`: without paths of this machine and tokens.

    Raises:
        `ExploreError`: if the report is damaged.
    """
    with reading(result):
        if result.kind in ("run", "compare"):
            recipe = run_recipe(result.report["settings"])
        elif result.kind == "sweep":
            recipe = _sweep_recipe(result.report)
        else:
            recipe = dict(result.report["settings"])
        # No field has another default than `None` where `None` is a value.
        recipe = {key: value for key, value in recipe.items() if value is not None}
        if len(str(recipe)) > _LETTERS_OF_RECIPE:
            raise ValueError("no recipe is that long")
        text = yaml.safe_dump(shown_all(recipe), sort_keys=False, allow_unicode=True)
        return f"# resa-hf {result.kind} --config recipe.yaml\n{text}"


def _sweep_recipe(report: Mapping[str, Any]) -> dict[str, Any]:
    recipe = run_recipe(report["points"][0]["settings"])
    recipe["output_dir"] = str(Path(recipe["output_dir"]).parent)
    for field in report["grid"]:
        section, _, key = ("stage2.sae_id" if field == "hookpoint" else field).rpartition(".")
        (recipe[section] if section else recipe).pop(key, None)
    return {**recipe, "features": report.get("features"), "grid": report["grid"]}
