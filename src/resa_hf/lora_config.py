"""adapter_config.json, read with suspicion: only what says a plain low-rank update, in the types that it should have.

PEFT takes the file at its word: expressions in it are run over every module's name, a rank is believed before the
weights are seen, and some kinds of adapter change the base's own weights while they load.
"""

import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

from .errors import IncompatibleAdapterError
from .untrusted import read_json_object

CONFIG_FILE = "adapter_config.json"

# PEFT matches each name with each module.
_MOST_NAMES = 1000
_NAME = re.compile(r"[\w.-]+")
# What PEFT draws new adapters with. The others cut them out of the base's weights, and leave it without them.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Settings of training, of saving or of a kind that is switched on elsewhere.
_IDLE = frozenset(
    {"peft_version", "inference_mode", "megatron_core", "qalora_group_size", "loftq_config", "eva_config"}
    | {"corda_config", "lora_ga_config", "runtime_config"}
)
_REASONS = {
    "use_dora": "DoRA rescales the base's own weights",
    "modules_to_save": "it replaces whole modules by those of its base",
    "trainable_token_indices": "it replaces embeddings by those of its base",
    "lora_bias": "it also trains biases",
}


def read_lora_config(path: Path, root: Path) -> LoraConfig:
    """The settings of a plain LoRA adapter. `target_modules` is `None` where the file has an expression there.

    Args:
        path (`Path`): an adapter_config.json.
        root (`Path`): the folder out of which no link may lead.

    Raises:
        `IncompatibleAdapterError`: if it is no such file, a setting has the wrong type, or the adapter is something
            else than W + scale * B @ A.
    """
    config = read_json_object(path, root, IncompatibleAdapterError)
    try:
        if config.pop("peft_type", None) != "LORA":
            raise ValueError("only LoRA can be loaded: peft_type must be 'LORA'")
        found = {key: value for key in _CHECKS if (value := config.pop(key, None)) is not None}
        for key, value in found.items():
            if not _CHECKS[key](value):
                raise ValueError(f"{key} is {reprlib.repr(value)}, which is not what belongs there")
        _refuse_other_kinds(config)
        if any(isinstance(found.get(key), str) for key in ("target_modules", "exclude_modules")):
            # Expressions can take forever to match; which modules are meant is known from the tensors' names.
            for key in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
                found.pop(key, None)
        return LoraConfig(**{**found, "task_type": "CAUSAL_LM", "inference_mode": True})
    except (TypeError, ValueError) as error:
        raise IncompatibleAdapterError(f"{path}: {error}.") from error


def _refuse_other_kinds(rest: Mapping[str, Any]) -> None:
    bias, init = rest.get("bias", "none"), rest.get("init_lora_weights", True)
    if bias not in ("none", None):
        raise ValueError(f"bias is {reprlib.repr(bias)}: it also trains the biases of its base")
    if not (isinstance(init, bool | str | None) and init in _HARMLESS_INITS):
        raise ValueError(
            f"init_lora_weights is {reprlib.repr(init)}: the adapter was cut out of its base's weights, and fits only "
            "what is left of them. Convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    for key, value in rest.items():
        if value and key not in (*_IDLE, "bias", "init_lora_weights"):
            reason = _REASONS.get(key, "that is no setting of plain LoRA")
            raise ValueError(
                f"{reprlib.repr(key)} is {reprlib.repr(value)}: {reason}. Only an update W + scale * B @ A can be put "
                "on a base; merge other adapters into their own base with PEFT"
            )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) < 1000


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38


def _is_dropout(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MOST_NAMES and all(map(_is_name, value))


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or _is_list_of_names(value)


def _are_layers(value: Any) -> bool:
    layers = value if isinstance(value, list) else [value]
    return all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers)


def _is_layers_pattern(value: Any) -> bool:
    return value == "" or _is_list_of_names([value] if isinstance(value, str) else value)


def _is_pattern(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """By module, where a leading ^ is the only thing allowed of an expression."""
    return lambda value: (
        isinstance(value, dict)
        and _is_list_of_names([name.removeprefix("^") for name in value])
        and all(holds(item) for item in value.values())
    )


def _is_transformers_class(value: Any) -> bool:
    """PEFT's note of the base's class. It is never imported here, but others follow it."""
    return (
        isinstance(value, dict)
        and all(
            # Unsloth adds a flag.
            isinstance(item, bool) if key not in ("base_model_class", "parent_library") else _is_name(item)
            for key, item in value.items()
        )
        and value.get("parent_library", "transformers.").startswith("transformers.")
    )


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "r": _is_count,
    "lora_alpha": _is_number,
    "lora_dropout": _is_dropout,
    "use_rslora": _is_flag,
    "fan_in_fan_out": _is_flag,
    "target_modules": _are_names,
    "exclude_modules": _are_names,
    "layers_to_transform": _are_layers,
    "layers_pattern": _is_layers_pattern,
    "rank_pattern": _is_pattern(_is_count),
    "alpha_pattern": _is_pattern(_is_number),
    "base_model_name_or_path": _is_text,
    "revision": _is_text,
    "task_type": lambda value: value == "CAUSAL_LM",
    "auto_mapping": _is_transformers_class,
}
