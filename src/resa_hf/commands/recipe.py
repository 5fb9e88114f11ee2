"""Recipes and flags: YAML gives the values, flags win over it, and what nobody knows is an error."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from ..evaluation.engine import Sampling
from ..experiment.settings import Arm, RunArguments, RunSettings, make_arms
from ..sae.config import SAETrainingConfig
from ..tuning.config import SAETuningConfig

SECTIONS: dict[str, Any] = {"stage1": SAETrainingConfig, "stage2": SAETuningConfig, "sampling": Sampling}
# The run sets these itself: one value for all arms would be wrong, or would be overwritten.
_RESERVED = {"output_dir", "seed", "sae", "sae_revision", "packing"}


def recipe_path(name: str) -> Path:
    """A recipe that ships with the package (`tiny-reasoner/run/demo.yaml`), installed or in a checkout."""
    installed = Path(__file__).parents[1] / "recipes" / name
    return installed if installed.is_file() else Path(__file__).parents[3] / "recipes" / name


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a recipe.

    Raises:
        `ValueError`: if it is not there, not YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"There is no recipe {path}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The recipe {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        # A key named null becomes None.
        raise ValueError(f"The recipe {path} must be a YAML mapping whose keys are words.")
    return content


def parse_flat(types: Sequence[Any], argv: Sequence[str], prog: str, description: str) -> tuple[Any, ...]:
    """Parses `--config` and flags into dataclasses that share one flat recipe.

    Raises:
        `ValueError`: for an unknown key, a wrong choice, or a recipe that cannot be read.
    """
    parser = TrlParser(list(types), prog=prog, description=description, allow_abbrev=False)
    rest, path = _take_config(argv)
    _set_defaults(parser, read_yaml(path) if path else {}, str(path))
    return tuple(parser.parse_args_into_dataclasses(rest))


def parse_run(argv: Sequence[str], prog: str, description: str, config: Path | None = None) -> RunSettings:
    """Parses the recipe of a run, with its sections; `--stage2.learning_rate 1e-5` sets a section's key.

    Args:
        argv (sequence of `str`): flags.
        prog, description (`str`): for `--help`.
        config (`Path`, *optional*): the recipe, where none is named by a flag.

    Raises:
        `ValueError`: for an unknown key, a wrong choice, settings that contradict each other, or a recipe that cannot
        be read.
    """
    rest, named = _take_config(argv)
    path = named or config
    recipe = read_yaml(path) if path else {}
    arms = recipe.pop("arms", None)
    flags, rest = _take_sections(rest)
    sections = {name: _section(name, recipe.pop(name, None), flags.get(name, []), str(path)) for name in SECTIONS}
    types: list[Any] = [RunArguments]
    parser = TrlParser(types, prog=prog, description=description, allow_abbrev=False)
    parser.epilog = "Keys of the sections stage1, stage2 and sampling: --stage2.learning_rate 1e-5, and so on."
    _set_defaults(parser, recipe, str(path))
    (run,) = parser.parse_args_into_dataclasses(rest)
    settings = RunSettings(
        run, sections["stage1"], sections["stage2"], Sampling(**sections["sampling"]), make_arms(arms, run)
    )
    lengths = [section.get("max_length") for section in (settings.stage1, settings.stage2)]
    if None not in lengths and lengths[0] != lengths[1]:
        raise ValueError(
            f"max_length is {lengths[0]} in stage1 and {lengths[1]} in stage2; a run packs its text once."
        )
    for arm in settings.arms:
        _check_arm(settings, arm)
    if settings.sae_sources:
        _check_stage1(settings)
    return settings


def _take_config(argv: Sequence[str]) -> tuple[list[str], str | None]:
    rest = list(argv)
    if "--config" not in rest:
        return rest, None
    at = rest.index("--config")
    if at + 1 == len(rest):
        raise ValueError("--config needs the path of a recipe.")
    path = rest[at + 1]
    del rest[at : at + 2]
    return rest, path


def _take_sections(argv: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Sorts `--stage2.key value ...` out of the flags."""
    taken: dict[str, list[str]] = {}
    rest: list[str] = []
    target = rest
    for word in argv:
        match = re.match(r"--(\w+)\.(.+)", word)
        if match and match[1] in SECTIONS:
            target = taken.setdefault(match[1], [])
            word = f"--{match[2]}"
        elif word.startswith("--"):
            target = rest
        target.append(word)
    return taken, rest


def _set_defaults(parser: TrlParser, recipe: Mapping[str, Any], where: str) -> None:
    unknown = parser.set_defaults_with_config(**recipe)[::2]
    if unknown:
        raise ValueError(f"{where} has unknown keys: {', '.join(word.removeprefix('--') for word in unknown)}.")


def _section(name: str, recipe: Any, flags: list[str], where: str) -> dict[str, Any]:
    """The keys that were set, as values of their types; the others keep the dataclass' defaults."""
    recipe = {} if recipe is None else recipe
    if not isinstance(recipe, dict):
        raise ValueError(f"{where}: {name} must be a mapping, not {recipe!r}.")
    parser = TrlParser([SECTIONS[name]], prog=name, allow_abbrev=False, add_help=False)
    _set_defaults(parser, recipe, f"{where}: {name}")
    values = vars(parser.parse_args(flags))
    given = {word.removeprefix("--").partition("=")[0] for word in flags if word.startswith("--")}
    keys = set(recipe) | {field.name for field in dataclasses.fields(SECTIONS[name]) if field.name in given}
    reserved = sorted(keys & _RESERVED) if name != "sampling" else []
    if reserved:
        raise ValueError(
            f"{where}: {', '.join(reserved)} cannot be set in {name}; the run sets it (see `seeds` and `sae`)."
        )
    return {key: values[key] for key in sorted(keys)}


def _check_arm(settings: RunSettings, arm: Arm) -> None:
    if arm.known is not None:
        return
    tuning = _section("stage2", dict(arm.tuning), [], f"Arm {arm.name!r}")
    try:
        config = SAETuningConfig(**{**settings.stage2, **tuning}, output_dir="unused")
        config.check_sae(arm.sae_from != "none")
    except ValueError as error:
        raise ValueError(f"Arm {arm.name!r}: {error}") from error


def _check_stage1(settings: RunSettings) -> None:
    config = SAETrainingConfig(**settings.stage1, output_dir="unused")
    if not config.hookpoints:
        raise ValueError("stage1.hookpoints is not set: say where to train the SAE, for example `hookpoints: [12]`.")
    if len(config.hookpoints) > 1 and "sae_id" not in settings.stage2:
        raise ValueError(
            f"stage1.hookpoints names {len(config.hookpoints)} hookpoints; a run tunes with one SAE: set "
            "stage2.sae_id."
        )
