"""Other people's words in a model card: shown, never acted on, and without the folders of whoever published it."""

import html
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

# A path from a root, from home or from above, up to its last part; of `name=path` the path.
_FOLDERS = re.compile(r"^([^/\\=]*=)?(?:~[^/\\]*|\.{1,2}|[A-Za-z]:|file:)?[/\\].*[/\\](?=[^/\\])")


def shown(text: str) -> str:
    """A path that tells of somebody's machine as its last part; anything else unchanged."""
    return _FOLDERS.sub(r"\1", text.rstrip("/\\") if _FOLDERS.match(text) else text)


def plain(text: str) -> str:
    """A name as one line of the metadata."""
    return _one_line(shown(text))


def code(value: Any) -> str:
    """A name as a code span, in which no Markdown, HTML or address means anything; also for a table's cell."""
    return f"`{plain(str(value)).translate(str.maketrans('`|<>', '´¦‹›')) or ' '}`"


def prose(text: str, names: Iterable[str] = ()) -> str:
    """A sentence, with the names in it as code spans, and without a meaning as Markdown or HTML."""
    known = sorted((name for name in names if name), key=len, reverse=True)
    pattern = rf"(?<!\w)({'|'.join(map(re.escape, known))})(?!\w)" if known else r"(?!)()"
    parts = re.split(pattern, text)
    return "".join(code(part) if place % 2 else _escaped(part) for place, part in enumerate(parts) if part)


def as_yaml(value: Any) -> str:
    """The value as YAML that reads back as itself, paths aside, and that can leave no fence and no HTML block."""
    text = yaml.dump(shown_all(value), Dumper=_Dumper, sort_keys=False, width=float("inf"))
    return re.sub(r"[<>`]", lambda match: f"\\x{ord(match[0]):02X}", text).rstrip()


class _Dumper(yaml.SafeDumper):
    """Quotes what has a meaning outside of YAML, so that it can be written as an escape."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if re.search(r"[<>`\n]", text) else None
    ),
)
_Dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]


def shown_all(value: Any) -> Any:
    """The value with every path in it as `shown` has it."""
    if isinstance(value, Mapping):
        return {shown_all(key): shown_all(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [shown_all(inner) for inner in value]
    return shown(value) if isinstance(value, str) else value


def without_token(value: Any) -> Any:
    """The value without any `hub_token` that settings may hold."""
    if isinstance(value, dict):
        return {key: without_token(inner) for key, inner in value.items() if key != "hub_token"}
    return [without_token(inner) for inner in value] if isinstance(value, list) else value


def _one_line(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _escaped(text: str) -> str:
    lead, tail = (" " if text[at].isspace() else "" for at in (0, -1))
    line = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(_one_line(text), quote=False))
    # A zero-width space: some renderers make links of bare addresses, also of escaped ones.
    return lead + re.sub(r"(://|@|www(?=\.))", r"\1&#8203;", line) + tail
