"""Licences: what the base's own card says, and what a licence asks of the name of a model made from the base."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import constants, dataset_info, hf_hub_download, metadata_load, model_info
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from ..data import PRESETS
from ..errors import PublishError

logger = logging.getLogger(__name__)

UNKNOWN = "unknown"

# huggingface.co/docs/hub/repositories-licenses. The Hub refuses a card with any other identifier.
_IDS = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma other
    """.split()  # noqa: SIM905  # a hundred lines otherwise
)
_NAME = re.compile(r"\w[\w .+-]{0,99}")
_FILE = re.compile(r"LICENSE[\w.-]{0,20}", re.ASCII)
_LINK = re.compile(r"https?://[\w.~:/?#@!$&+,;=%-]{1,300}")
_LLAMA = re.compile(r"\bllama[ _-]?([34])(?:[._-]?(\d))?(?!\w)", re.IGNORECASE)


@dataclass(frozen=True)
class Licence:
    """The licence of a base, which what is made from it inherits.

    Args:
        id (`str`, *optional*, defaults to `"unknown"`): one of the Hub's identifiers.
        name (`str`, *optional*), link (`str`, *optional*): of a licence that is `"other"`; the name as a slug.
        datasets (`Mapping[str, str | None]`, *optional*): the licences of the datasets, by their names.
        files (sequence of `str`, *optional*): the licence's files that lie in the repository.
    """

    id: str = UNKNOWN
    name: str | None = None
    link: str | None = None
    datasets: Mapping[str, str | None] = field(default_factory=dict)
    files: Sequence[str] = ()

    @property
    def _llama(self) -> str | None:
        """The version of a Llama licence, from `"3"` on."""
        match = _LLAMA.search(self._named)
        return None if match is None else match[1] if match[2] in (None, "0") else f"{match[1]}.{match[2]}"

    @property
    def _named(self) -> str:
        return self.name or "" if self.id == "other" else self.id

    @property
    def prefix(self) -> str | None:
        """What the name of a model made from the base must begin with.

        Section 1.b.i of the community licences: "Llama 3" with Llama 3, "Llama" from Llama 3.1 on, nothing with
        Llama 2 (github.com/meta-llama/llama-models, models/*/LICENSE).
        """
        return None if self._llama is None else "Llama-3" if self._llama == "3" else "Llama"

    @property
    def attribution(self) -> str | None:
        """The words that the same section asks to display."""
        return {"Llama-3": "Built with Meta Llama 3", "Llama": "Built with Llama"}.get(self.prefix or "")

    @property
    def notice(self) -> str | None:
        """What a "Notice" file must say by section 1.b.iii, from Llama 3 on."""
        if self._llama is None:
            return None
        name = "Meta Llama 3" if self._llama == "3" else f"Llama {self._llama}"
        return (
            f"{name} is licensed under the {name} Community License, Copyright © Meta Platforms, Inc. All Rights "
            "Reserved."
        )

    @property
    def lacks(self) -> list[str]:
        """What it demands in the repository (Llama, sections 1.b.i and 1.b.iii; of 2: 1.b.ii), and `files` has not."""
        demanded = {"LICENSE": "a copy of itself", "NOTICE": "a `Notice` file"}
        there = [start for start in demanded for name in self.files if name.startswith(start)]
        is_llama = "llama" in self._named.lower()
        return [words for start, words in demanded.items() if is_llama and start not in there]


def licence_of(
    base: str, datasets: Sequence[str] = (), *, revision: str | None = None, token: str | None = None
) -> Licence:
    """
    Reads the licences of a base and of datasets from their own cards: on the Hub, offline in the cache, or in a
    folder. What a card does not say, or says in no plain way, stays unknown.

    Args:
        base (`str`): Hub repo, folder, or `resa_hf/tiny/base`.
        datasets (sequence of `str`, *optional*): presets, Hub repos and files.
        revision (`str`, *optional*): of the base.
        token (`str`, *optional*): of the Hub. `None`: the saved one.

    Raises:
        `PublishError`: if the Hub cannot be reached, and is not switched off.
    """
    licences = {name: _dataset_licence(name, token) for name in datasets}
    if base.startswith("resa_hf/tiny/"):
        return Licence("apache-2.0", datasets=licences)  # ships in this package, under its licence
    key, name, link = _read(_metadata(base, "model", revision, token))
    if key == UNKNOWN and "llama" in base.lower():
        logger.warning(
            "The licence of %s cannot be read. If it is Llama's, check yourself that it allows the repository's "
            "name: from Llama 3.1 on it must begin with 'Llama'.",
            base,
        )
    if link is not None and _FILE.fullmatch(link):
        home = None if os.path.isdir(base) else f"https://huggingface.co/{base}/blob/{revision or 'main'}/{link}"
        link = _plain(home, _LINK)
    return Licence(key, name, link, datasets=licences)


def check_name(repo_id: str, licence: Licence) -> None:
    """
    Checks that a repository's name is one that the base's licence allows.

    Args:
        repo_id (`str`): of an adapter, a merged model or an SAE that was made from the base.
        licence ([`Licence`]): the base's.

    Raises:
        `PublishError`: if not; the message has a name that is.
    """
    owner, slash, name = repo_id.rpartition("/")
    if licence.prefix is None or re.match(licence.prefix.replace("-", "[-_.]?"), name):
        return
    words = licence.prefix.replace("-", " ")
    raise PublishError(
        f"{repo_id}: the base's licence ({licence.name or licence.id}, section 1.b.i) demands that the name of a "
        f"model made from it begins with {words!r}. {owner}{slash}{licence.prefix}-{name} would do."
    )


def _dataset_licence(name: str, token: str | None) -> str | None:
    presets = [preset for key, preset in PRESETS.items() if name in (key, preset.repo)]
    if presets and presets[0].licence is not None:
        return presets[0].licence
    key, own, _ = _read(_metadata(presets[0].repo if presets else name, "dataset", None, token))
    return None if key == UNKNOWN else own or key


def _read(metadata: Mapping[str, Any]) -> tuple[str, str | None, str | None]:
    """Identifier, name and link. The card is somebody else's: nothing but a plain word or address leaves it."""
    found = metadata.get("license")
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    key, name = (_plain(value, _NAME) for value in (found, metadata.get("license_name")))
    if key is None or key.lower() == UNKNOWN:
        return UNKNOWN, None, None
    if key.lower() not in _IDS:
        key, name = "other", key
    # The Hub takes such a name only: "Some License" is refused.
    name = re.sub(r"[^a-z0-9.]+", "-", (name or "").lower()).strip("-") or None
    link = _plain(metadata.get("license_link"), _LINK) or _plain(metadata.get("license_link"), _FILE)
    return ("other", name, link) if key.lower() == "other" else (key.lower(), None, None)


def _plain(value: Any, pattern: re.Pattern[str]) -> str | None:
    return value if isinstance(value, str) and pattern.fullmatch(value) else None


def _metadata(name: str, repo_type: str, revision: str | None, token: str | None) -> Mapping[str, Any]:
    """The metadata of a card; empty if there is none, or none that can be read."""
    try:
        if os.path.isdir(name):
            return metadata_load(Path(name) / "README.md") or {}
        card = hf_hub_download(name, "README.md", repo_type=repo_type, revision=revision, token=token)
        return metadata_load(card) or {}
    except GatedRepoError:
        # Everyone sees the metadata of a gated repo.
        info = (model_info if repo_type == "model" else dataset_info)(name, revision=revision, token=token)
        return info.card_data.to_dict() if info.card_data is not None else {}
    except LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE:
            return {}
        raise _unread(name) from None
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError, FileNotFoundError):
        return {}
    except httpx.HTTPError:
        raise _unread(name) from None
    except (ValueError, yaml.YAMLError, LookupError, AttributeError, TypeError, RecursionError):
        return {}  # not a card's metadata


def _unread(name: str) -> PublishError:
    return PublishError(f"The licence of {name} cannot be read: the Hub does not answer. Run the same command again.")
