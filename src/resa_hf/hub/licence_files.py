"""The files that must go with what is made from a base: its licence, and the notices that this demands."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import httpx

from ..errors import PublishError
from ..untrusted import check_plain
from .licences import Licence
from .upload import LICENCE_FILE

NOTICE = "NOTICE"


def add_licence_files(
    stage: Path, base: str, licence: Licence, *, revision: str | None = None, token: str | None = None
) -> Licence:
    """
    Copies the base's LICENSE and NOTICE files, and writes the notice that a Llama licence demands. What cannot be read
    (offline, gated) is left out.

    Args:
        stage (`Path`): the folder that is to be published.
        base (`str`): Hub repo or folder.
        licence ([`Licence`]): the base's.
        revision (`str`, *optional*): of the base.
        token (`str`, *optional*): of the Hub. `None`: the saved one.

    Returns:
        [`Licence`]: which knows its files.

    Raises:
        `PublishError`: if one of them is a link that leads out of a folder.
    """
    folder = _folder(base, revision, token)
    if folder is not None:
        for path in folder.glob("*"):  # the cache has no folder of a repository of which nothing was wanted
            if LICENCE_FILE.fullmatch(path.name) and path.is_file():
                check_plain(path, folder, PublishError)
                shutil.copyfile(path, stage / path.name)
    if licence.notice is not None:
        own = stage / NOTICE
        there = own.read_bytes() if own.is_file() else b""
        if licence.notice.encode() not in there:
            own.write_bytes(there + f"{licence.notice}\n".encode())
    return replace(licence, files=sorted(path.name for path in stage.iterdir() if LICENCE_FILE.fullmatch(path.name)))


def _folder(base: str, revision: str | None, token: str | None) -> Path | None:
    """Where its files lie, if it has any."""
    if os.path.isdir(base):
        return Path(base)
    # Offline, what is asked for would have to be there.
    wanted = [] if constants.HF_HUB_OFFLINE else ["LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=wanted, token=token))
    except (HFValidationError, LocalEntryNotFoundError, httpx.HTTPError):
        return None
