"""Values that visitors give: of the right kind, and within their limits."""

import reprlib

from ..errors import ExploreError


def checked_text(name: str, value: object, longest: int) -> str:
    """A text.

    Raises:
        `ExploreError`: if it is none, or has more than `longest` characters.
    """
    if not isinstance(value, str):
        raise ExploreError(f"{name} is {reprlib.repr(value)}; it must be a text.")
    if len(value) > longest:
        raise ExploreError(f"{name} has {len(value):,} characters; at most {longest:,} are read.")
    return value


def checked_number(name: str, value: object, low: float, high: float) -> float:
    """A number.

    Raises:
        `ExploreError`: if it is none from `low` to `high`; NaN and infinity are none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ExploreError(f"{name} is {reprlib.repr(value)}; it must be a number from {low:,} to {high:,}.")
    return float(value)


def checked_whole(name: str, value: object, low: int, high: int) -> int:
    """A whole number; 3.0 is one.

    Raises:
        `ExploreError`: if it is none from `low` to `high`.
    """
    number = checked_number(name, value, low, high)
    if not number.is_integer():
        raise ExploreError(f"{name} is {number}; it must be a whole number from {low:,} to {high:,}.")
    return int(number)
