"""Whether a recipe's values are of the types of their fields. argparse looks at text only, and YAML has more."""

import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_WORDS |= {dict: "a mapping", list: "a list"}


def check_types(recipe: Mapping[str, Any], hints: Mapping[str, Any], where: str) -> None:
    """
    Args:
        recipe (`Mapping[str, Any]`): values by key, as YAML has them.
        hints (`Mapping[str, Any]`): types by key; other keys are not looked at.
        where (`str`): names the recipe in the message.

    Raises:
        `ValueError`: naming the first key whose value is of another type. Text is left to argparse, which parses it.
    """
    for key, value in recipe.items():
        if key in hints and not isinstance(value, str) and not _fits(value, hints[key]):
            quoted = ": put it in quotes" if hints[key] in (str, str | None) and isinstance(value, int | float) else ""
            raise ValueError(f"{where}: {key} is {value!r}; it must be {_told(hints[key])}{quoted}.")


def _fits(value: Any, hint: Any) -> bool:
    kinds, items = _kinds(hint)
    if kinds is None:
        return True
    if isinstance(value, list):
        return list in kinds and (items is None or all(_fits_in_list(item, items) for item in value))
    if isinstance(value, int) and not isinstance(value, bool):
        return bool({int, float} & kinds)
    return type(value) in kinds


def _fits_in_list(item: Any, hint: Any) -> bool:
    # A hookpoint may be a number.
    return hint is Any or type(item) is hint or (hint in (str, float) and type(item) is int)


def _kinds(hint: Any) -> tuple[set[type] | None, Any]:
    """The plain types that a hint leaves, and that of a list's items; `None` where anything may be right."""
    found: set[type] = set()
    items: Any = None
    for part in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        kind = get_origin(part) or part
        if kind is list and get_args(part):
            (items,) = get_args(part)
        if kind not in (*_WORDS, type(None)):
            return None, None
        found.add(kind)
    return found, items


def _told(hint: Any) -> str:
    kinds, items = _kinds(hint)
    words = [word for kind, word in _WORDS.items() if kind in (kinds or ())]
    of = "" if items is None or items not in _WORDS else f", each {_WORDS[items]}"
    return " or ".join(words) + of
