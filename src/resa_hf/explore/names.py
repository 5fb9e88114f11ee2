"""Names that visitors type: of repositories on the Hub and of nothing else."""

import re

from huggingface_hub import HfUri, parse_hf_uri

from ..errors import ExploreError

_LONGEST = 200
_CHARACTERS = re.compile(r"[A-Za-z0-9._%@/=+-]+")


def hub_uri(text: str, what: str) -> HfUri:
    """Reads a visitor's name of a model repository on the Hub, also of an adapter's or an SAE's.

    Whether a folder of that name lies on this machine does not matter: what is returned goes to functions that ask the
    Hub only, such as `hf_hub_download(uri.id, ...)`.

    Args:
        text (`str`): `owner/name`, `owner/name@revision` or `owner/name@revision/sub/folder`, also with `hf://`.
        what (`str`): what it is to be, for the message: `"model"`, `"adapter"`, `"SAE"`.

    Returns:
        `huggingface_hub.HfUri`: with `id`, `revision` and `path_in_repo` (`""`: the repository itself).

    Raises:
        `ExploreError`: for anything else: a path, a URL, a dataset, more than 200 characters.
    """
    try:
        if not isinstance(text, str):
            raise ValueError("it is no text")
        plain = text.strip()
        if len(plain) > _LONGEST:
            raise ValueError(f"it has {len(plain):,} characters, more than {_LONGEST}")
        plain = plain.removeprefix("hf://")
        if not plain:
            raise ValueError("it is empty")
        if not _CHARACTERS.fullmatch(plain):
            raise ValueError("only letters, digits and . _ - / @ can be in it")
        if not {"", ".", ".."}.isdisjoint(plain.split("/")):
            raise ValueError("it is a path")
        uri = parse_hf_uri(f"hf://{plain}")
        if uri.type != "model":
            raise ValueError(f"it names a {uri.type}")
        for part in (uri.revision, uri.path_in_repo):
            if ".." in (part or "").split("/"):
                raise ValueError("it is a path")
    except ValueError as error:
        # HfUriError's text is about spellings that are not taken here.
        reason = f": {error}" if type(error) is ValueError else ""
        raise ExploreError(
            f"{_shortened(text)} names no {what} on the Hub{reason}. A name looks like owner/name, "
            "owner/name@revision or owner/name/folder."
        ) from None
    return uri


def hub_name(text: str, what: str) -> str:
    """The same, spelled in one way: `owner/name[@revision][/sub/folder]`.

    Args:
        text (`str`), what (`str`): as in [`hub_uri`].

    Raises:
        `ExploreError`: as [`hub_uri`] does.
    """
    uri = hub_uri(text, what)
    revision = "" if uri.revision is None else f"@{uri.revision.replace('/', '%2F')}"
    return f"{uri.id}{revision}{'/' if uri.path_in_repo else ''}{uri.path_in_repo}"


def _shortened(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= 62 else f"{shown[:58]}...{shown[-1]}"
