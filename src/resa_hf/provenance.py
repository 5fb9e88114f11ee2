"""Which commits were read: of models, adapters, SAEs and datasets, by their role. Asked after loading, offline."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import PreTrainedModel

from .adapters import base_of_adapter
from .arguments import ModelArguments, SourceArguments
from .data import TINY
from .hookpoints import causal_lm
from .places import Place, parse_place
from .tiny import tiny_path

_SHIPPED = {str(tiny_path(kind)): f"resa_hf/tiny/{kind}" for kind in ("base", "source")}

Revision = dict[str, str | None]  # `name`, `commit`, and `subfolder` where there is one
Revisions = dict[str, Revision]  # by role, as in `hub.record.Record`


def commit_of(name: str, *, revision: str | None = None) -> str | None:
    """
    The commit at which a model repository was loaded, from the local cache: where a branch was then, not now.

    Args:
        name (`str`):
            The repository's id, or a folder or file.
        revision (`str`, *optional*):
            The branch, tag or commit that was asked for. `None`: `main`.

    Returns:
        `str` or `None`: 40 hexadecimal digits; `None` for what is not on the Hub, or was not loaded from it.
    """
    if os.path.exists(name):
        return None
    try:
        # No file is asked for, so that none can be missing: what is left is the folder of the revision.
        snapshot = snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[])
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return Path(snapshot).name


def loaded_revision(role: str, model: nn.Module) -> Revisions:
    """
    What a model that somebody has loaded came from. It does not tell its revision: the commit is that of `main` in the
    local cache, where libraries that ask the Hub about the model later may move it.
    """
    bare = causal_lm(model)
    name = bare.config.name_or_path if isinstance(bare, PreTrainedModel) else None
    return {} if name is None else {role: {"name": local_name(name), "commit": commit_of(name)}}


def local_name(name: str) -> str:
    """
    How a report names what was read: a folder or file by its absolute path, which cannot be taken for a repository on
    the Hub, wherever the report is read; what ships here, and all else, by its own name.
    """
    if not name or not os.path.exists(os.path.expanduser(name)):
        return name
    return _SHIPPED.get(name) or str(Path(name).expanduser().absolute())


def place_revision(place: Place) -> Revision:
    """What was read at a place, and its commit."""
    if place.is_folder:
        return {"name": local_name(place.name), "commit": None}
    found: Revision = {"name": place.name, "commit": commit_of(place.name, revision=place.revision)}
    return found if place.subfolder is None else {**found, "subfolder": place.subfolder}


def model_revisions(role: str, name: str, revision: str | None = None, adapter: str | None = None) -> Revisions:
    """
    A model under its role, and the adapter that was merged into it under `<role>_adapter`.

    Args:
        role (`str`):
            `"base"`, `"source"` or `"evaluate_on"`.
        name (`str`), revision (`str`, *optional*), adapter (`str`, *optional*):
            As [`~resa_hf.models.load_causal_lm`] takes them: the name may be an adapter's, too.
    """
    if adapter is not None:
        return {**model_revisions(role, name, revision), f"{role}_adapter": place_revision(parse_place(adapter))}
    place = parse_place(name)
    if revision is not None and not place.is_folder:
        place = replace(place, revision=revision)
    base = base_of_adapter(place)
    if base is None:
        return {role: place_revision(place)}
    return {role: place_revision(base), f"{role}_adapter": place_revision(place)}


def base_revisions(args: ModelArguments) -> Revisions:
    """The target model."""
    return model_revisions("base", args.model_name_or_path, args.model_revision, args.model_adapter)


def source_revisions(args: ModelArguments, source: SourceArguments) -> Revisions:
    """The source model; nothing where the target itself is the source."""
    if not source.has_source:
        return {}
    name = source.source_model or args.model_name_or_path
    return model_revisions("source", name, source.source_revision, source.source_adapter)


def sae_revision(role: str, name: str | None, revision: str | None) -> Revisions:
    """An SAE that was taken and not trained, `"sae"` or `"initial_sae"`; nothing where there is none."""
    return {} if name is None else {role: place_revision(parse_place(name, revision=revision))}


def data_revisions(report: Mapping[str, Any]) -> Revisions:
    """The datasets, from what was written down when they were read (`data.json`; `data` in a stage's report)."""
    read: Revisions = {}
    for role in ("dataset", "trigger_dataset"):
        if report.get(role) is not None:
            name, commit = report.get(f"{role}_repo") or report[role], report.get(f"{role}_commit")
            # Offline, `datasets` takes a folder for the repository that has its name.
            is_local = commit is None and name not in TINY
            read[role] = {"name": local_name(name) if is_local else name, "commit": commit}
    return read


def sae_metadata(read: Revisions, dataset: Revision) -> dict[str, Any]:
    """
    What the metadata of an SAE tell of the model and the text that it was trained on.

    Args:
        read (`dict`): the model, and the adapter that was merged into it.
        dataset (`dict`): the trigger dataset.

    Returns:
        `dict[str, Any]`: `model_name` and `dataset_path`, which are sae-lens' keys: of a merged model, it is the base
        that sae-lens can load; and beside them `model_revision`, `model_adapter`, `dataset_revision`.
    """
    model, *adapter = read.values()
    return {
        "model_name": model["name"],
        "model_revision": model["commit"],
        "model_adapter": adapter[0] if adapter else None,
        "dataset_path": dataset["name"],
        "dataset_revision": dataset["commit"],
    }


def merge_revisions(parts: Iterable[Revisions]) -> Revisions:
    """All roles of the parts of one run. Where a branch has moved between two of them, no commit is claimed."""
    merged: Revisions = {}
    for part in parts:
        for role, found in part.items():
            agrees = merged.setdefault(role, found)["commit"] == found["commit"]
            merged[role] = merged[role] if agrees else {**found, "commit": None}
    return merged
