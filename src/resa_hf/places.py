"""Where a model or an adapter lies: a folder, or a place on the Hub, spelled as the Hub does in hf:// paths."""

import os
from dataclasses import dataclass
from pathlib import PurePosixPath

from huggingface_hub import parse_hf_uri
from huggingface_hub.utils import validate_repo_id

from .tiny import tiny_path

_TINY = {f"resa_hf/tiny/{part}": tiny_path(part) for part in ("base", "source")}


@dataclass(frozen=True)
class Place:
    """A folder or a Hub repository, and where in it.

    Args:
        name (`str`): the folder, or the repository's id.
        revision (`str`, *optional*): branch, tag or commit of the repository.
        subfolder (`str`, *optional*): inside.

    Raises:
        `ValueError`: for a revision of a folder, or one or a subfolder that would lead out of the place.
    """

    name: str
    revision: str | None = None
    subfolder: str | None = None

    def __post_init__(self) -> None:
        if self.revision is not None:
            check_inside(self.revision, "revision")
            if self.is_folder:
                raise ValueError(f"revision {self.revision!r} is for Hub repositories, and {self.name!r} is a folder.")
        if self.subfolder is not None:
            inside = check_inside(self.subfolder, "subfolder")
            object.__setattr__(self, "subfolder", None if inside == "." else inside)

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder on this machine."""
        return os.path.isdir(self.name)  # False, and no error, for what is too long to be a path

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision.replace('/', '%2F')}"
        return f"{self.name}{revision}{'' if self.subfolder is None else f'/{self.subfolder}'}"


def parse_place(text: str, *, revision: str | None = None, subfolder: str | None = None) -> Place:
    """Reads how a recipe or a flag names a model or an adapter.

    Args:
        text (`str`):
            A folder that exists; `resa_hf/tiny/base` or `resa_hf/tiny/source`, which ship here; or a Hub repository:
            `owner/name`, `owner/name@revision`, `owner/name@revision/sub/folder`, `owner/name/sub/folder`. A branch
            with a slash is written with `%2F`, as in any hf:// path
            (https://huggingface.co/docs/huggingface_hub/package_reference/hf_uris).
        revision (`str`, *optional*), subfolder (`str`, *optional*):
            Given beside it.

    Raises:
        `ValueError`: if it is none of these, or says otherwise than what is given beside it.
    """
    place = _parsed(text)
    for what, there, given in (("revision", place.revision, revision), ("subfolder", place.subfolder, subfolder)):
        if given is not None and there not in (None, given):
            raise ValueError(f"{text!r} names the {what} {there!r}, and {given!r} is given beside it.")
    return Place(place.name, revision or place.revision, subfolder or place.subfolder)


def _parsed(text: str) -> Place:
    if text in _TINY:
        return Place(str(_TINY[text]))
    if os.path.isdir(text):
        return Place(text)
    try:
        if not {"/", "@"} & set(text):
            validate_repo_id(text)
            return Place(text)
        if text.startswith("/"):
            raise ValueError("a repository's name does not begin with a slash.")
        uri = parse_hf_uri(f"hf://{text.removeprefix('hf://')}")
        if uri.type != "model":
            raise ValueError(f"it names a {uri.type}.")
        return Place(uri.id, uri.revision, uri.path_in_repo or None)
    except ValueError as error:
        raise ValueError(
            f"{text!r} is no folder here, and no place on the Hub (owner/name, owner/name@revision, "
            f"owner/name@revision/sub/folder): {error}"
        ) from error


def check_inside(path: str, what: str) -> str:
    """A relative path of an artifact, made plain: `"a//b/"` becomes `"a/b"`.

    Raises:
        `ValueError`: if it is absolute, climbs out by `..`, or is no path on some system (backslash, colon, NUL).
    """
    parts = PurePosixPath(path).parts
    if not path.isprintable() or path.startswith("/") or ".." in parts or {"\\", ":"} & set(path):
        raise ValueError(f"{what} {path!r} must lie inside the repository or folder, such as 'layers.12'.")
    return PurePosixPath(*parts).as_posix()
