"""The Hub's check of a card's metadata (`POST /api/validate-yaml`), as far as it is documented or has been observed.

Fields: https://github.com/huggingface/hub-docs/blob/main/modelcard.md and
https://huggingface.co/docs/hub/model-cards; licence ids: https://huggingface.co/docs/hub/repositories-licenses.
Unknown fields are allowed. A card without metadata is only warned about
(https://github.com/huggingface/huggingface_hub/pull/1934).
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# The table of the Hub's documentation, docs/hub/repositories-licenses.md in github.com/huggingface/hub-docs;
# huggingface_hub has no such list.
LICENSES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m"
    " afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0"
    " cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0"
    " cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0"
    " cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl"
    " gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr"
    " mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr"
    " deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4"
    " grok2-community gemma unknown other"
)
RELATIONS = ["adapter", "finetune", "merge", "quantized"]
LANGUAGE = r"[a-z]{2,3}(-[A-Za-z]+)*|code|multilingual"
# As in huggingface_hub/repocard.py: the block opens the file, and its end is a line of its own.
METADATA = re.compile(r"\A\s*---[\r\n]+(.*?)[\r\n]+---(\r\n|\n|\Z)", re.DOTALL)

Check = Callable[[dict[str, Any], str], Iterator[str]]


def card_metadata(text: str) -> dict[str, Any] | None:
    """The metadata at the top of a card; None if there is no such block.

    Raises:
        ValueError: With the Hub's message, if the block is no YAML mapping.
    """
    block = METADATA.match(text)
    if block is None:
        return None
    try:
        metadata = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        raise ValueError(f"Invalid YAML in README.md: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError("The YAML metadata of your README.md is invalid.")
    return metadata


def card_warnings(text: str) -> list[str]:
    return [] if METADATA.match(text) else ["empty or missing yaml metadata in repo card"]


def card_errors(text: str) -> list[str]:
    """What the Hub refuses a card for, in its words where they are known; empty if nothing."""
    try:
        metadata = card_metadata(text)
    except ValueError as error:
        return [str(error)]
    return list(_errors(metadata or {}))


def _errors(card: dict[str, Any]) -> Iterator[str]:
    for name in ("library_name", "license_link", "license_name", "pipeline_tag", "thumbnail"):
        yield from _text(card, name, name)
    for name in ("base_model", "datasets", "language", "license", "metrics"):
        yield from _texts(card, name, one_is_enough=True)
    yield from _texts(card, "tags", one_is_enough=False)
    for path, value in _items(card, "license"):
        if value not in LICENSES.split():
            yield f'"{path}" must be one of [{", ".join(LICENSES.split())}]'
    for path, value in _items(card, "language"):
        if not re.fullmatch(LANGUAGE, value):
            yield f'"{path}" with value "{value}" is not valid. It must be an ISO 639-1, 639-2 or 639-3 code'
    for name, kind in (("base_model", "model"), ("datasets", "dataset")):
        for path, value in _items(card, name):
            if not _is_repo_id(value):
                yield f'"{path}" with value "{value}" is not valid. Use a {kind} id from https://hf.co/{kind}s.'
    if card.get("base_model_relation", "adapter") not in RELATIONS:
        yield f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]'
    if not re.fullmatch(r"[a-z0-9.-]+", str(card.get("license_name", "x"))):
        yield f'"license_name" with value "{card["license_name"]}" must be a lower-case id, like my-license-1.0'
    if not re.fullmatch(r"LICENSE(\.md|\.txt)?|https?://\S+", str(card.get("license_link", "LICENSE"))):
        yield '"license_link" must be LICENSE, LICENSE.md or a URL'
    yield from _each(card, "model-index", "model-index", _model_errors)
    yield from _each(
        card, "configs", "configs", lambda config, path: _text(config, "config_name", f"{path}.config_name")
    )


def _model_errors(model: dict[str, Any], path: str) -> Iterator[str]:
    yield from _text(model, "name", f"{path}.name", required=True)
    if "results" not in model:
        yield f'"{path}.results" is required'
    yield from _each(model, "results", f"{path}.results", _result_errors)


def _result_errors(result: dict[str, Any], path: str) -> Iterator[str]:
    needed = {"task": ["type"], "dataset": ["type", "name"], "source": ["url"]}
    for part, required in needed.items():
        if part not in result:
            if part != "source":
                yield f'"{path}.{part}" is required'
        elif not isinstance(result[part], dict):
            yield f'"{path}.{part}" must be of type object'
        else:
            for name in ("type", "name", "config", "split", "revision", "url"):
                yield from _text(result[part], name, f"{path}.{part}.{name}", required=name in required)
    if "metrics" not in result:
        yield f'"{path}.metrics" is required'
    yield from _each(result, "metrics", f"{path}.metrics", _metric_errors)


def _metric_errors(metric: dict[str, Any], path: str) -> Iterator[str]:
    for name in ("type", "name", "config"):
        yield from _text(metric, name, f"{path}.{name}", required=name == "type")
    if metric.get("value") is None:
        yield f'"{path}.value" is required'
    if not isinstance(metric.get("verified", True), bool):
        yield f'"{path}.verified" must be a boolean'


def _each(parent: dict[str, Any], name: str, path: str, check: Check) -> Iterator[str]:
    """The errors of each mapping in a list; nothing if the list is not there."""
    entries = parent.get(name, [])
    if not isinstance(entries, list):
        yield f'"{path}" must be an array'
        return
    for number, entry in enumerate(entries):
        if isinstance(entry, dict):
            yield from check(entry, f"{path}[{number}]")
        else:
            yield f'"{path}[{number}]" must be of type object'


def _text(parent: dict[str, Any], name: str, path: str, *, required: bool = False) -> Iterator[str]:
    if name not in parent:
        if required:
            yield f'"{path}" is required'
    elif not isinstance(parent[name], str):
        yield f'"{path}" must be a string'
    elif not parent[name]:
        yield f'"{path}" is not allowed to be empty'


def _texts(card: dict[str, Any], name: str, *, one_is_enough: bool) -> Iterator[str]:
    value = card.get(name, [])
    if isinstance(value, str) and one_is_enough:
        return
    if not isinstance(value, list):
        yield f'"{name}" must be an array'
        return
    for number, entry in enumerate(value):
        if not isinstance(entry, str):
            yield f'"{name}[{number}]" must be a string'


def _items(card: dict[str, Any], name: str) -> Iterator[tuple[str, str]]:
    """Path and value of a field that is a string or a list of strings."""
    value = card.get(name, [])
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, list):
        yield from ((f"{name}[{n}]", entry) for n, entry in enumerate(value) if isinstance(entry, str))


def _is_repo_id(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True
