"""Reasoning adapters: put on the model that they were trained on, or on a sibling of it."""

import copy
import math
import os
import re
import reprlib
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from .downloads import hub_errors
from .errors import IncompatibleAdapterError
from .lora_config import CONFIG_FILE, read_lora_config
from .places import Place, parse_place
from .untrusted import read_json_object, read_shapes, read_tensors

WEIGHTS_FILE = "adapter_model.safetensors"


def load_reasoning_adapter(
    model: PreTrainedModel | PeftModel,
    adapter: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    revision: str | None = None,
    subfolder: str | None = None,
    name: str | None = None,
) -> PeftModel:
    """
    Puts a LoRA adapter on the model that it was trained on, or on a sibling: the same shapes, while weights, special
    tokens, RoPE base and the tying of the head may be others.

    Nothing but the two files of the adapter is read, and they are checked before the model is touched. The base's
    weights stay as they are, to the bit: `model.unload()` gives the base back. Several adapters act together, each as
    W + scale * B @ A; all else is PEFT's: `model.set_adapter(name)` lets one act alone,
    `model.base_model.set_adapter([one, other])` several, `with model.disable_adapter()` none,
    `model.delete_adapter(name)` removes one, `model.active_adapters` tells which act.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal LM, or one with LoRA adapters. Those that act go on acting, and the new one joins them.
        adapter (`str` or `os.PathLike`): a folder or a Hub repository, also as `owner/name@revision/sub/folder`.
        scale (`float`, *optional*, defaults to `1.0`):
            Multiplies the update, by way of the adapter's `lora_alpha`: 0 is the base, negative numbers subtract.
        revision (`str`, *optional*), subfolder (`str`, *optional*): of the repository; a subfolder of a folder, too.
        name (`str`, *optional*):
            What the adapter is called in the model. `None`: `"default"` for the first, then the last part of its
            repository's or folder's name, dots as dashes.

    Returns:
        [`~peft.PeftModel`]: with the adapter active and frozen; the same object if `model` was one.

    Raises:
        `IncompatibleAdapterError`: if there is no such adapter; if its files are not what they should be (pickles are
            not read); if it is another kind than plain LoRA; if it does not fit, naming the first tensor that differs.
        `ValueError`: if `scale` is not finite, or the name is taken or one that PEFT cannot use.
        `OSError`: if the Hub cannot be reached, or the disk is full; a rerun goes on from there.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be a finite number: 1 is the adapter as trained, 0 the base.")
    try:
        place = parse_place(os.fspath(adapter), revision=revision, subfolder=subfolder)
    except ValueError as error:
        raise IncompatibleAdapterError(f"No adapter can be loaded: {error}") from error
    base = _base(model)
    name = _free_name(model, place, name)
    root, folder = _fetch(place)
    config = read_lora_config(folder / CONFIG_FILE, root)
    shapes = read_shapes(folder / WEIGHTS_FILE, root, IncompatibleAdapterError)
    if config.target_modules is None:
        config.target_modules = _modules(base, shapes)
    names = _check_fits(base, config, shapes, place)
    _warn_of_another_base(base, config, place)
    tensors = read_tensors(folder / WEIGHTS_FILE, IncompatibleAdapterError)
    if scale != 1:
        config.lora_alpha *= scale  # type: ignore[assignment]  # PEFT takes any number
        config.alpha_pattern = {key: alpha * scale for key, alpha in (config.alpha_pattern or {}).items()}
    return _attach(model, config, {key: tensors[key] for key in names}, name)


def base_of_adapter(place: Place) -> Place | None:
    """The model that the adapter at a place names as its base; `None` if there is no adapter.

    Raises:
        `IncompatibleAdapterError`: if the adapter is no plain LoRA, or names no base.
        `OSError`: if there is no such place.
    """
    path = find_adapter_config_file(place.name, revision=place.revision, subfolder=place.subfolder or "")
    if path is None:
        return None
    config = read_lora_config(Path(path), Path(place.name) if place.is_folder else Path(path).parent)
    try:
        return parse_place(config.base_model_name_or_path or "", revision=config.revision)
    except ValueError as error:
        raise IncompatibleAdapterError(
            f"The adapter {str(place)!r} names no base that can be read: {error}"
        ) from error


def _base(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal LM inside."""
    if isinstance(model, PeftModel) and isinstance(model.base_model, LoraModel):
        base = model.get_base_model()
    else:
        base = model
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError("The model has adapters that are no LoRA of a PeftModel. Unload or merge them first.")
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"An adapter goes on a causal LM of transformers, not on a {type(base).__name__}.")
    return base


def _free_name(model: PreTrainedModel | PeftModel, place: Place, name: str | None) -> str:
    taken = list(model.peft_config) if isinstance(model, PeftModel) else []
    if name is None:
        last = PurePosixPath(place.subfolder or Path(place.name).resolve().name).name
        name = "default" if "default" not in taken else last.replace(".", "-")
    # PEFT keeps adapters as submodules, and looks for its own prefix in their names.
    if name in taken or "." in name or name in "lora_" or name in dir(torch.nn.ModuleDict()):
        raise ValueError(
            f"The adapter cannot be called {name!r} here. Give a `name` without a dot that is none of a module's own "
            f"and not taken: {', '.join(taken) or 'none'} is."
        )
    return name


def _fetch(place: Place) -> tuple[Path, Path]:
    """The folder out of which no link may lead, and in it the adapter's."""
    if place.is_folder:
        root, folder = Path(place.name), Path(place.name, place.subfolder or "")
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / file).is_file():
                raise _lacks(place, file)
        return root, folder
    commit, depth = place.revision, len(PurePosixPath(place.subfolder or "").parts)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        with hub_errors(place.name, place.revision, IncompatibleAdapterError):
            try:
                path = Path(hf_hub_download(place.name, file, revision=commit, subfolder=place.subfolder))
            except RemoteEntryNotFoundError:
                raise _lacks(place, file) from None
        # The second file is of the first one's commit, also when the branch moves in between.
        commit = path.parents[depth].name
    return path.parent, path.parent


def _lacks(place: Place, file: str) -> IncompatibleAdapterError:
    hint = (
        " Other weights are not read: a pickle such as adapter_model.bin can run code." if file == WEIGHTS_FILE else ""
    )
    return IncompatibleAdapterError(f"{str(place)!r} holds no {file}.{hint}")


def _modules(base: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The model's modules that a file has an update of."""
    found = [re.fullmatch(r"base_model\.model\.(.+)\.(?:lora_A\.weight|lora_embedding_A)", name) for name in shapes]
    return sorted({match[1] for match in found if match is not None} & dict(base.named_modules()).keys())


def _check_fits(
    base: PreTrainedModel, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]], place: Place
) -> list[str]:
    """The names of the update's tensors. Raises unless the file holds them all, as this model needs them."""
    try:
        # No memory is taken, whatever rank the settings claim. PEFT's own low_cpu_mem_usage allocates first.
        with torch.device("meta"):
            peft = PeftModelForCausalLM(type(base)(copy.deepcopy(base.config)), copy.deepcopy(config))
    except ValueError as error:
        reason = textwrap.shorten(str(error), 500)
        raise IncompatibleAdapterError(f"{str(place)!r} does not fit {base.name_or_path!r}: {reason}") from error
    # Never "auto": that asks the Hub for the base's configuration.
    updates = get_peft_model_state_dict(peft, save_embedding_layers=False)
    # Beside an update of the head, PEFT saves the base's embeddings. Such copies may be there, and are left alone.
    wanted = get_peft_model_state_dict(peft, save_embedding_layers=True)
    for name in sorted(updates.keys() | shapes.keys()):
        there, here = shapes.get(name), tuple(wanted[name].shape) if name in wanted else None
        if there != here:
            raise IncompatibleAdapterError(
                f"{str(place)!r} (of {config.base_model_name_or_path!r}) does not fit {base.name_or_path!r}: "
                f"{name} is {_shape(there)} in the adapter and {_shape(here)} for this model."
            )
    return list(updates)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _warn_of_another_base(base: PreTrainedModel, config: LoraConfig, place: Place) -> None:
    """Siblings have the same shapes, and strangers may: whether it works is for an evaluation to tell."""
    trained_on, given = str(config.base_model_name_or_path or ""), str(base.name_or_path)
    here = base.config.to_dict()
    there = _cached_config(trained_on)
    differences = [
        f"{key} {reprlib.repr(there[key])} there, {here.get(key)!r} here"
        for key in ("model_type", "vocab_size")
        if key in there and there[key] != here.get(key)
    ]
    made_for = (config.auto_mapping or {}).get("base_model_class", type(base).__name__)
    if made_for != type(base).__name__:
        differences.append(f"{made_for} there, {type(base).__name__} here")
    names = Path(trained_on).name, Path(given).name
    if differences or (all(names) and names[0] != names[1]):
        note = f" They are no siblings: {'; '.join(differences)}." if differences else ""
        warnings.warn(f"{str(place)!r} was trained on {trained_on!r}, and is put on {given!r}.{note}", stacklevel=3)


def _cached_config(repo: str) -> dict[str, Any]:
    """A model's configuration, if the Hub's cache has it. The name is an adapter's word: nothing is fetched."""
    try:
        path = try_to_load_from_cache(repo, "config.json")
    except HFValidationError:
        return {}
    return read_json_object(Path(path), Path(path).parent, IncompatibleAdapterError) if isinstance(path, str) else {}


def _attach(
    model: PreTrainedModel | PeftModel, config: LoraConfig, tensors: dict[str, Tensor], name: str
) -> PeftModel:
    mode = model.training
    with torch.random.fork_rng(devices=[]):  # what PEFT draws for a new adapter is overwritten below
        if isinstance(model, PeftModel):
            assert isinstance(model.base_model, LoraModel), "by _base"
            peft, active = model, model.active_adapters
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            model.add_adapter(name, config)
            model.base_model.set_adapter([*active, name], inference_mode=True)
            for parameter in trainable:
                parameter.requires_grad_(True)
        else:
            peft = PeftModelForCausalLM(model, config, adapter_name=name)
    set_peft_model_state_dict(peft, tensors, adapter_name=name)
    return peft.train(mode)
