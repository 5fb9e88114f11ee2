"""Recipes and flags: YAML gives the values, flags win over it, and what nobody knows is an error."""

import argparse
import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from trl import TrlParser

from ..evaluation.engine import Sampling
from ..experiment.arms import STUDENT, Arm, make_arms
from ..experiment.settings import RunArguments, RunSettings
from ..sae.config import SAETrainingConfig
from ..tuning.config import SAETuningConfig
from .yaml_types import typed

SECTIONS: dict[str, Any] = {"stage1": SAETrainingConfig, "stage2": SAETuningConfig, "sampling": Sampling}
# The run sets these itself: one value for all arms would be wrong, or would be overwritten.
_RESERVED = {"output_dir", "seed", "sae", "sae_revision", "packing", "eval_strategy", "eval_on_start"}
# Every arm, seed and checkpoint would push to one repository, before there is a verdict.
PUSHING = {"push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo"}
PUSHING |= {"hub_always_push", "hub_revision"}
# Equal tokens, steps and optimiser: an arm with others could not be compared.
_SHARED = {"learning_rate", "max_length", "max_steps", "num_train_epochs", "per_device_train_batch_size"}
_SHARED |= {"gradient_accumulation_steps", "optim", "weight_decay", "max_grad_norm"}
_SHARED |= {"lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"}


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
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"There is no recipe {path}.") from None
    except (OSError, ValueError, yaml.YAMLError, LookupError, AttributeError, TypeError, RecursionError) as error:
        # Of a tag that does not fit, such as `!!int ''`, PyYAML says what its own code stumbled over.
        raise ValueError(f"The recipe {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        # A key named null becomes None.
        raise ValueError(f"The recipe {path} must be a YAML mapping whose keys are words.")
    return content


def parse_flat(
    types: Sequence[Any], argv: Sequence[str], prog: str, description: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Parses `--config` and flags into dataclasses that share one flat recipe.

    Returns:
        The dataclasses, and the keys that were set, with their values.

    Raises:
        `ValueError`: for an unknown key, a wrong choice, or a recipe that cannot be read.
    """
    parser = TrlParser(list(types), prog=prog, description=description, allow_abbrev=False)
    rest, path = take_config(argv)
    recipe = read_yaml(path) if path else {}
    with wrong_types_told(str(path)):
        _set_defaults(parser, recipe, str(path))
        parsed = tuple(parser.parse_args_into_dataclasses(rest))
        return parsed, _given(types, recipe, rest, str(path))


@contextlib.contextmanager
def wrong_types_told(where: str) -> Iterator[None]:
    """YAML may hold a list where a number should be, which settings find out in many ways."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{where}: a value is not of the kind that its key takes: {error}.") from error


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
    rest, named = take_config(argv)
    path = named or config
    recipe = read_yaml(path) if path else {}
    with wrong_types_told(str(path)):
        return parse_settings(recipe, rest, prog, description, str(path))


def parse_settings(
    recipe: Mapping[str, Any], argv: Sequence[str], prog: str, description: str, where: str
) -> RunSettings:
    """What [`parse_run`] does, of a recipe that was read; `where` names it in messages."""
    recipe = dict(recipe)
    arms = recipe.pop("arms", None)
    flags, rest = _take_sections(list(argv))
    sections = {name: _section(name, recipe.pop(name, None), flags.get(name, []), where) for name in SECTIONS}
    types: list[Any] = [RunArguments]
    parser = TrlParser(types, prog=prog, description=description, allow_abbrev=False)
    parser.epilog = "Keys of the sections stage1, stage2 and sampling: --stage2.learning_rate 1e-5, and so on."
    _set_defaults(parser, recipe, where)
    (run,) = parser.parse_args_into_dataclasses(rest)
    if misplaced := sorted(sections["stage2"].keys() & {"control", "control_sae", "control_sae_id"}):
        raise ValueError(
            f"{where}: {', '.join(misplaced)} in stage2 would make every arm a control; set it in an arm."
        )
    stage1, stage2 = _one_max_length(sections["stage1"], sections["stage2"])
    sampling = Sampling(**sections["sampling"])
    made = make_arms(arms, run.sae is not None, run.has_source)
    checked = [_checked_arm(arm, run, stage2, sampling) for arm in made]
    if run.rl_arm not in (None, *(arm.name for arm in checked)):
        raise ValueError(f"rl_arm is {run.rl_arm!r}; the arms: {', '.join(arm.name for arm in checked)}.")
    settings = RunSettings(run, stage1, stage2, sampling, checked)
    if settings.sae_sources:
        _check_stage1(settings)
    return settings


def take_config(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Takes `--config FILE` out of the flags."""
    rest = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
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
    hints = {name: hint for kind in parser.dataclass_types for name, hint in get_type_hints(kind).items()}
    nulls = [name for name, value in recipe.items() if value is None and name in hints]
    if empty := [name for name in nulls if type(None) not in get_args(hints[name])]:
        raise ValueError(f"{where} sets {', '.join(empty)} to null: give a value, or leave it out.")
    unknown = parser.set_defaults_with_config(**typed(recipe, hints, where))[::2]
    if unknown:
        raise ValueError(f"{where} has unknown keys: {', '.join(word.removeprefix('--') for word in unknown)}.")


def _section(name: str, recipe: Any, flags: list[str], where: str) -> dict[str, Any]:
    """The keys that were set, as values of their types; the others keep the dataclass' defaults."""
    recipe = {} if recipe is None else recipe
    if not isinstance(recipe, dict):
        raise ValueError(f"{where}: {name} must be a mapping, not {recipe!r}.")
    given = _given([SECTIONS[name]], recipe, flags, f"{where}: {name}")
    if pushing := sorted(given.keys() & PUSHING):
        raise ValueError(
            f"{where}: {', '.join(pushing)} cannot be set in {name}: a run is published when it is done, by "
            "`resa-hf publish --folder OUTPUT_DIR`."
        )
    reserved = sorted(given.keys() & _RESERVED) if name != "sampling" else []
    if reserved:
        raise ValueError(
            f"{where}: {', '.join(reserved)} cannot be set in {name}; the run sets it (see `seeds` and `sae`)."
        )
    return dict(sorted(given.items()))


def _given(types: Sequence[Any], recipe: Mapping[str, Any], flags: Sequence[str], where: str) -> dict[str, Any]:
    """The keys that a recipe and flags set, as values of their types."""
    parser = TrlParser(list(types), prog=where, allow_abbrev=False, add_help=False)
    for action in parser._actions:  # as TrlParser does; `set_defaults` would put the marker itself into the result
        action.default = argparse.SUPPRESS
    _set_defaults(parser, recipe, where)
    return vars(parser.parse_args(list(flags)))


def _one_max_length(stage1: dict[str, Any], stage2: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Puts the tokens of a row, which a run settles once, into both sections."""
    lengths = {section["max_length"] for section in (stage1, stage2) if "max_length" in section} or {2048}
    if len(lengths) > 1 or None in lengths:
        raise ValueError(
            f"max_length is {stage1.get('max_length')} in stage1 and {stage2.get('max_length')} in stage2; a run "
            "makes its rows of tokens once, so it must be one number."
        )
    (length,) = lengths
    return {**stage1, "max_length": length}, {**stage2, "max_length": length}


def _checked_arm(arm: Arm, run: RunArguments, stage2: Mapping[str, Any], sampling: Sampling) -> Arm:
    """The arm with what is different in its Stage II alone, as values of their types."""
    where = f"Arm {arm.name!r}"
    tuning = _section("stage2", dict(arm.tuning), [], where)
    fixed = sorted(tuning.keys() & _SHARED) if arm.is_trained else sorted(tuning)
    if fixed:
        reason = "shares it with the others (set it in stage2)" if arm.is_trained else "is not trained"
        raise ValueError(f"{where} cannot set {', '.join(fixed)}: it {reason}.")
    if run.load_in_4bit and arm.known in ("svd_of_source", "weight_noise"):
        raise ValueError(
            f"{where}: {arm.known} is made from the weights themselves, which load_in_4bit does not keep."
        )
    if not arm.is_trained:
        return arm
    trained = {} if arm.control_source is None else {"control_sae": "trained by Stage I"}
    try:
        config = SAETuningConfig(**{**stage2, **tuning, **trained}, output_dir="unused")
        config.check_sae(arm.sae_from != "none")
        config.check_control_sae(config.control_sae is not None)
        if config.completion_only_loss and run.pack:
            raise ValueError("completion_only_loss needs pack: false, one document a row.")
        if arm.text == STUDENT:
            _check_on_policy(config, arm.sae_from != "none", sampling)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if config.kl_reference == "source" and not run.has_source:
        raise ValueError(f"{where}: kl_reference: source needs a source model that is not the target.")
    usual = SAETuningConfig(**stage2, output_dir="unused")
    different = {key: getattr(config, key) for key in tuning if getattr(config, key) != getattr(usual, key)}
    return dataclasses.replace(arm, tuning=different)


def _check_on_policy(config: SAETuningConfig, has_sae: bool, sampling: Sampling) -> None:
    """Refuses what TRL's on-policy distillation has no counterpart for."""
    wanted = {"kl_reference": "source", "kl_weight": 1.0, "sft_weight": 0.0, "control": None}
    wrong = [f"{name} is {getattr(config, name)}" for name, value in wanted.items() if getattr(config, name) != value]
    if wrong or has_sae:
        raise ValueError(
            "text: student needs sae_from: none, kl_reference: source, kl_weight: 1.0, sft_weight: 0.0 and no "
            f"control, but {', '.join(wrong + ['there is an SAE'] * has_sae)}."
        )
    if config.kl_temperature != sampling.temperature:
        raise ValueError(
            "text: student takes one temperature for its answers and for the divergence, but sampling.temperature is "
            f"{sampling.temperature} and kl_temperature {config.kl_temperature}: set both alike."
        )


def _check_stage1(settings: RunSettings) -> None:
    config = SAETrainingConfig(**settings.stage1, output_dir="unused")
    if not config.hookpoints:
        raise ValueError("stage1.hookpoints is not set: say where to train the SAE, for example `hookpoints: [12]`.")
    spliced = [arm for arm in settings.arms if arm.sae_from in ("source", "base")]
    if len(config.hookpoints) > 1 and any("sae_id" not in {**settings.stage2, **arm.tuning} for arm in spliced):
        raise ValueError(
            f"stage1.hookpoints names {len(config.hookpoints)} hookpoints; an arm tunes with one SAE: set "
            "stage2.sae_id, or each arm's."
        )
    for arm in spliced:
        keys = {**settings.stage2, **arm.tuning}
        other = arm.tuning.get("control") == "other_layer" and "control_sae" not in arm.tuning
        if other and keys.get("control_sae_id") in (None, keys.get("sae_id")):
            raise ValueError(
                f"Arm {arm.name!r}: control: other_layer needs `control_sae_id`, another one of stage1.hookpoints "
                f"than its sae_id ({keys.get('sae_id')})."
            )
