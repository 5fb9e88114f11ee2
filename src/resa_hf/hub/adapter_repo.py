"""Adapter repositories: plain PEFT, which loads without resa-hf, on a base that is on the Hub."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..cards import adapter_card
from ..errors import PublishError
from ..experiment.folder import write_json
from ..provenance import commit_of
from ..untrusted import read_json_object
from .adapter_files import read_adapter
from .folder_contents import Found
from .licence_files import add_licence_files
from .licences import check_name, licence_of
from .record import Record
from .retries import patiently, publish_errors
from .staging import write_evidence

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


def with_base(record: Record, base: str | None, *, token: str | None = None) -> Record:
    """
    The record with the base that others are to load, and its commit: that of the training, or else today's.

    Args:
        record ([`Record`]): of an adapter.
        base (`str`, *optional*): the user's own word for the base.
        token (`str`, *optional*): `None`: the saved one.

    Raises:
        `PublishError`: if the base is not one repository on the Hub.
    """
    if base is not None:
        others = {role: found for role, found in record.revisions.items() if role != "base_adapter"}
        record = replace(record, revisions={**others, "base": {"name": base, "commit": None}})
    name = named_base(record)
    if "base_adapter" in record.revisions or "+" in name:
        adapter = record.revisions.get("base_adapter", {}).get("name", "an adapter")
        raise PublishError(
            f"The adapter was trained on {name} with {adapter} merged into it, and does not fit {name} alone. Publish "
            "the merged model (--merge); or push that model to the Hub, and name it by --base."
        )
    if os.path.exists(name) or name.startswith("resa_hf/") or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is None:
        raise PublishError(
            f"The adapter was trained on {name}, which nobody else can load by that name. Push the model to the Hub, "
            "and name it by --base owner/name; or publish the merged model (--merge)."
        )
    if record.revisions["base"]["commit"] is not None:
        return record
    return replace(record, revisions={**record.revisions, "base": {"name": name, "commit": _head(name, token)}})


def named_base(record: Record) -> str:
    """The base's name.

    Raises:
        `PublishError`: if the adapter names none.
    """
    name = record.revisions["base"]["name"]
    if not name:
        raise PublishError("The adapter names no base: name it by --base owner/name.")
    return name


def _head(base: str, token: str | None) -> str | None:
    if constants.HF_HUB_OFFLINE:
        return commit_of(base)
    with publish_errors(f"The base {base} could not be looked up on the Hub.", token):
        return patiently(lambda: HfApi(token=token).model_info(base).sha)


def stage_adapter(stage: Path, found: Found) -> None:
    """
    Writes all files of an adapter's repository but its card.

    Args:
        stage (`Path`): an empty folder.
        found ([`Found`]): with an adapter, and a record whose base `with_base` has checked.

    Raises:
        `PublishError`: if the adapter's files cannot be used.
    """
    adapter, base = checked_adapter(found), found.record.revisions["base"]
    config = adapter_config(found) | {"base_model_name_or_path": base["name"], "revision": base["commit"]}
    write_json(stage / CONFIG_NAME, config | {"inference_mode": True})
    shutil.copyfile(adapter / SAFETENSORS_WEIGHTS_NAME, stage / SAFETENSORS_WEIGHTS_NAME)
    copy_tokenizer(adapter, stage)
    write_evidence(stage, found)


def checked_adapter(found: Found) -> Path:
    """The adapter's folder, once `read_adapter` has read it."""
    assert found.adapter is not None, "what holds no adapter is refused before"
    read_adapter(found.adapter)
    return found.adapter


def adapter_config(found: Found) -> dict[str, Any]:
    """The adapter's own adapter_config.json."""
    assert found.adapter is not None
    return read_json_object(found.adapter / CONFIG_NAME, found.adapter, PublishError)


def copy_tokenizer(folder: Path, stage: Path) -> bool:
    """Copies the tokenizer's files, if there are any; tells whether."""
    there = [name for name in TOKENIZER_FILES if (folder / name).is_file() and not (folder / name).is_symlink()]
    for name in there:
        shutil.copyfile(folder / name, stage / name)
    return "tokenizer_config.json" in there


def write_card(
    stage: Path, repo_id: str, found: Found, sae_repo: str | None, *, merged: bool, token: str | None = None
) -> None:
    """
    Writes README.md, and the files that the base's licence demands.

    Raises:
        `PublishError`: if the base's licence does not allow the repository's name, or cannot be asked for.
    """
    record = found.record
    if found.trained_with is not None:
        record = replace(record, saes=found.trained_with.record.saes)
    base = record.revisions["base"]
    licence = licence_of(str(base["name"]), record.datasets, revision=base["commit"], token=token)
    check_name(repo_id, licence)
    licence = add_licence_files(stage, str(base["name"]), licence, revision=base["commit"], token=token)
    config = adapter_config(found)
    card = adapter_card(repo_id, record, licence, adapter_config=config, sae_repo=sae_repo, merged=merged)
    (stage / constants.REPOCARD_NAME).write_text(card, encoding="utf-8")
