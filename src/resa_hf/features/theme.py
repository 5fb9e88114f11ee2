"""What the pictures share: their colours in light and dark, their width, text that fits, and a file that is whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 8.0  # inches; at 100 dots per inch, for which the texts are sized, 800 pixels
SAVED_DPI = 200  # sharp on screens of two dots a pixel


@dataclass(frozen=True)
class Theme:
    """Colours of a picture and of the page around it.

    Okabe and Ito's, as far as they contrast with the background by 3 to 1 (WCAG 2.2, 1.4.11); texts by 4.5 to 1.
    What differs by colour differs by shape as well.

    Args:
        paper (`str`): The background.
        ink (`str`): Text.
        muted (`str`): Text of less weight, axes.
        grid (`str`): Lines and areas that carry no data.
        main (`str`): What the picture is about.
        other (`str`): What is drawn over it: a fit, a threshold.
        null (`str`): Controls, nulls and bases.
        cells (`tuple[str, str]`): Ends of the heat map's scale.
    """

    paper: str
    ink: str
    muted: str
    grid: str
    main: str
    other: str
    null: str
    cells: tuple[str, str]


LIGHT = Theme("#ffffff", "#1f2328", "#59636e", "#dde2e7", "#0072b2", "#d55e00", "#6e7781", ("#5294c4", "#06264a"))
DARK = Theme("#0d1117", "#e6edf3", "#9198a1", "#2b323b", "#56b4e9", "#e69f00", "#8b949e", ("#2f77a8", "#dff1ff"))


@contextmanager
def picture(path: Path, height: float, *, dark: bool) -> Iterator[tuple[Figure, Theme]]:
    """A figure to draw into; where the drawing does not fail, it is written.

    Args:
        path (`Path`): The PNG file.
        height (`float`): In inches, beside a width of `WIDTH`.
        dark (`bool`): Which theme.

    Yields:
        `tuple[Figure, Theme]`: the figure, and the colours, which its axes and texts already have.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    theme = DARK if dark else LIGHT
    style = rc_context({
        "figure.facecolor": theme.paper, "axes.facecolor": theme.paper, "savefig.facecolor": "auto",
        "text.color": theme.ink, "axes.labelcolor": theme.ink, "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink, "legend.labelcolor": theme.ink, "axes.edgecolor": theme.muted,
        "xtick.color": theme.muted, "ytick.color": theme.muted, "grid.color": theme.grid, "grid.linewidth": 0.6,
        "font.family": "DejaVu Sans", "font.size": 9, "figure.titlesize": 11, "text.parse_math": False,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False,
        "figure.constrained_layout.h_pad": 0.08, "figure.constrained_layout.w_pad": 0.08,
    })  # fmt: skip
    with style:
        figure = Figure(figsize=(WIDTH, height), dpi=100, layout="constrained")
        yield figure, theme
        with whole_file(path) as draft:
            figure.savefig(draft, dpi=SAVED_DPI, format="png")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place once it is written, or goes."""
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def title(figure: Figure, text: str) -> None:
    """Writes a title over the whole width."""
    figure.suptitle(folded(text, 88), x=0.012, ha="left")


def legend(figure: Figure) -> None:
    """Explains under the axes what carries a label: there it covers no data."""
    figure.legend(loc="outside lower left", ncols=2)


def folded(text: str, width: int, lines: int = 2) -> str:
    """Text of some user in so many lines of so many letters, and `…` for the rest."""
    return "\n".join(wrap(visible(text), width, max_lines=lines, placeholder=" …", break_on_hyphens=False))


def visible(text: str) -> str:
    """Text in letters that the font has: others, and those that move the line, as their number."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    return "".join(
        letter if letter.isprintable() and font.get_char_index(ord(letter)) else f"\\u{ord(letter):04x}"
        for letter in text.replace("\n", "↵")
    )
