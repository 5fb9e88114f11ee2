"""A recipe's values as values of their fields' types. argparse looks at text only, and YAML has more."""

import datetime
import enum
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_WORDS |= {dict: "a mapping", list: "a list"}


def typed(recipe: Mapping[str, Any], hints: Mapping[str, Any], where: str) -> dict[str, Any]:
    """
    Args:
        recipe (`Mapping[str, Any]`): values by key, as YAML has them.
        hints (`Mapping[str, Any]`): types by key; other keys are not looked at.
        where (`str`): names the recipe in the message.

    Returns:
        `dict[str, Any]`: the same, but that one value where a list belongs is a list of one, as it is for a flag, and
        that text in a list of numbers is a number: YAML reads 1e-4 as text. Other text is left to argparse.

    Raises:
        `ValueError`: naming the first key whose value is of another type.
    """
    return {key: _typed(key, value, hints[key], where) if key in hints else value for key, value in recipe.items()}


def _typed(key: str, given: Any, hint: Any, where: str) -> Any:
    kinds, items = _kinds(hint)
    if kinds is None:
        return given
    value = given
    if list in kinds and str not in kinds and isinstance(value, str | int | float):
        value = [value]
    if isinstance(value, list) and items in (int, float):
        value = [_number(item, items) for item in value]
    if isinstance(value, str) or _fits(value, kinds, items):
        return value
    mistaken = str in kinds and isinstance(value, int | float | datetime.date)  # `no`, 1.0, 2026-01-01
    quoted = ": put it in quotes" if mistaken else ""
    raise ValueError(f"{where}: {key} is {given!r}; it must be {_told(kinds, items)}{quoted}.")


def _number(item: Any, kind: type) -> Any:
    """Text that is a number as one; anything else as it is."""
    try:
        return kind(item) if isinstance(item, str) else item
    except ValueError:
        return item


def _fits(value: Any, kinds: set[type], items: Any) -> bool:
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
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            kind = str  # by which a recipe names its members
        if kind not in (*_WORDS, type(None)):
            return None, None
        found.add(kind)
    return found, items


def _told(kinds: set[type], items: Any) -> str:
    words = [word for kind, word in _WORDS.items() if kind in kinds]
    of = "" if items is None or items not in _WORDS else f", each {_WORDS[items]}"
    return " or ".join(words) + of
