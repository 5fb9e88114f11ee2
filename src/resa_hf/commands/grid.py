"""The recipe of a sweep: a run's recipe with a section `grid`, whose points are the product of its values."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

from ..experiment.settings import RunArguments, RunSettings
from ..experiment.sweep import HOOKPOINT, FeatureSettings, Point, Sweep, make_point, name_of
from ..hookpoints import decoder_layers
from ..models import load_skeleton
from .recipe import SECTIONS, parse_settings, read_yaml, take_config, wrong_types_told

_RESERVED = {"output_dir", "seeds", "processes", "arms", "features", *SECTIONS}


def parse_sweep(argv: Sequence[str], prog: str, description: str) -> Sweep:
    """Parses the recipe of a sweep and the flags over it.

    Args:
        argv (sequence of `str`): flags, as `resa-hf run` takes them.
        prog, description (`str`): for `--help`.

    Raises:
        `ValueError`: as `parse_run`, naming the point; for a grid that is missing, empty or not of lists; for two
        points with the same settings.
    """
    flags, path = take_config(argv)
    recipe = read_yaml(path) if path else {}
    given, counted = recipe.pop("grid", None), recipe.pop("features", None)

    def parse(changed: Mapping[str, Any]) -> RunSettings:
        with wrong_types_told(str(path)):
            return parse_settings(changed, flags, prog, description, str(path))

    if not given:
        parse(recipe)  # tells --help, and what else is wrong
        raise ValueError("There is nothing to sweep: the recipe needs a section `grid`, of fields and their values.")
    grid = _checked_grid(given)
    if grid.get(HOOKPOINT) == "all":
        one = {field: values[0] for field, values in grid.items()} | {"stage1.hookpoints": ["layers.0"]}
        grid[HOOKPOINT] = _all_layers(parse(_at(recipe, one | {HOOKPOINT: "layers.0"})).run)
    if HOOKPOINT in grid and not recipe.get("sae"):
        recipe = _at(recipe, {"stage1.hookpoints": grid[HOOKPOINT]})  # one pass of Stage I for all of them
    found = []
    for chosen in product(*grid.values()):
        values = dict(zip(grid, chosen, strict=True))
        try:
            found.append((values, parse(_at(recipe, values))))
        except ValueError as error:
            raise ValueError(f"Point {name_of(values)}: {error}") from error
    run = found[0][1].run
    points = [make_point(Path(run.output_dir), values, settings) for values, settings in found]
    _check_different(points)
    return Sweep(Path(run.output_dir), points, run.processes, _features(counted, points))


def _checked_grid(grid: Any) -> dict[str, Any]:
    if not isinstance(grid, dict):
        raise ValueError(f"grid must be a mapping of fields to lists of values, not {grid!r}.")
    if fixed := sorted(_RESERVED & grid.keys()):
        raise ValueError(f"grid cannot vary {', '.join(fixed)}. A section's field is named as `stage1.k` is.")
    if odd := [field for field in grid if not isinstance(field, str)]:
        raise ValueError(f"grid: {odd[0]!r} is no field.")
    for field, values in grid.items():
        if field == HOOKPOINT and values == "all":
            continue
        if not isinstance(values, list) or not values or any(isinstance(value, dict) for value in values):
            raise ValueError(f"grid: {field} is {values!r}; give a list of values.")
        if field == HOOKPOINT and not all(isinstance(value, str) for value in values):
            raise ValueError(f"grid: {HOOKPOINT} is {values!r}; give names, such as layers.1.")
    return dict(grid)


def _all_layers(run: RunArguments) -> list[str]:
    place, layers = decoder_layers(load_skeleton(run.model_name_or_path, revision=run.model_revision))
    return [f"{place}.{number}" for number in range(len(layers))]


def _at(recipe: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with values of fields, as `stage1.k` names them; a hookpoint is that of Stage II's SAE."""
    changed = deepcopy(dict(recipe))
    for field, value in values.items():
        section, _, key = ("stage2.sae_id" if field == HOOKPOINT else field).rpartition(".")
        if section and section not in SECTIONS:
            raise ValueError(f"grid: {field} is no field of the sections {', '.join(SECTIONS)}.")
        if not section:
            changed[key] = value
        elif isinstance(there := changed.get(section) or {}, dict):
            changed[section] = there | {key: value}
    return changed


def _check_different(points: Sequence[Point]) -> None:
    """Two points of one folder would overwrite each other; two of the same settings are one, told twice."""
    for number, point in enumerate(points):
        for other in points[:number]:
            if point.root.name.lower() == other.root.name.lower():
                raise ValueError(f"Points {other.name} and {point.name} would share the folder {point.root}.")
            if point.same_run(other):
                raise ValueError(
                    f"Points {other.name} and {point.name} are the same. Does a flag set what the grid varies?"
                )


def _features(section: Any, points: Sequence[Point]) -> FeatureSettings | None:
    if section is None:
        return None
    known = [field.name for field in fields(FeatureSettings)]
    if not isinstance(section, dict) or section.keys() - set(known):
        raise ValueError(f"features is {section!r}; it must be a mapping of {', '.join(known)}.")
    if not points[0].is_by_hookpoint:
        raise ValueError("features are counted in a sweep over hookpoints alone: `grid: {hookpoint: [...]}`.")
    return FeatureSettings(**section)
