"""Picture of a prompt: which latents are active at which of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .theme import WIDTH, Theme, folded, picture, title, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

MOST_TOKENS = 300
MOST_LATENTS = 60


def plot_prompt(
    path: Path, tokens: Sequence[str], latent_names: Sequence[str], values: ArrayLike, cue_positions: Sequence[int],
    *, dark: bool,
) -> Figure:  # fmt: skip
    """Heat map of latents by token of a prompt; the prompt goes on in the next panel where there is room for several.

    Each latent's values are divided by its largest, since latents of different layers have different scales. At most
    `MOST_TOKENS` tokens are drawn, those nearest to the cues, and the first `MOST_LATENTS` latents; the title says so.

    Args:
        path (`Path`): The PNG file.
        tokens (`Sequence[str]`): The prompt.
        latent_names (`Sequence[str]`): Names of the columns.
        values (array of shape `[tokens, latents]`): 0 where a latent is not active.
        cue_positions (`Sequence[int]`): Places of the cues' tokens in the prompt, which are marked.
        dark (`bool`): Light on dark.

    Returns:
        `Figure`: the picture.
    """
    if not latent_names:
        with picture(path, 0.5, dark=dark) as (figure, _):
            figure.text(0.012, 0.5, "Latents by token of the prompt: there is no latent to show", va="center")
        return figure
    values = np.asarray(values, dtype=float)[:, :MOST_LATENTS]
    distance = np.abs(np.subtract.outer(np.arange(len(tokens)), cue_positions)).min(axis=1, initial=len(tokens))
    shown = np.sort(np.argsort(distance, kind="stable")[:MOST_TOKENS])
    largest = values.max(axis=0)
    shares = np.divide(values, largest, out=np.zeros_like(values), where=largest > 0)
    panels = int(np.clip(WIDTH // (1.4 + 0.14 * len(largest)), 1, max(1, len(shown) // 15)))
    parts = np.array_split(shown, panels)
    height = 1.9 + 0.15 * len(parts[0])
    with picture(path, height, dark=dark) as (figure, theme):
        heading = "Latents by token of the prompt (in bold with ▸: the cues)"
        for count, of, what in ((len(shown), len(tokens), "tokens"), (len(largest), len(latent_names), "latents")):
            heading += "" if count == of else f"; {count} of {of} {what}"
        title(figure, heading)
        panes = figure.subplots(1, panels, squeeze=False)[0]
        for axes, positions in zip(panes, parts, strict=True):
            mesh = _heat(axes, theme, shares[positions], latent_names)
            _label(axes, positions, tokens, cue_positions)
            axes.set_ylim(len(parts[0]), 0)
        figure.colorbar(
            mesh, ax=list(panes), location="bottom", aspect=60, shrink=0.6, pad=0.1 / height,
            label="value / the latent's largest value in the prompt; empty: not active",
        )  # fmt: skip
    return figure


def _heat(axes: Axes, theme: Theme, shares: NDArray[np.float64], names: Sequence[str]) -> QuadMesh:
    from matplotlib.colors import LinearSegmentedColormap

    axes.tick_params(length=0, labelsize=7.5)
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    columns = range(shares.shape[1])
    axes.set_xticks(
        [column + 0.5 for column in columns], [folded(names[i], 22, lines=1) for i in columns], rotation=90
    )
    return axes.pcolormesh(
        np.ma.masked_less_equal(shares, 0), cmap=LinearSegmentedColormap.from_list("cells", theme.cells),
        vmin=0, vmax=1, edgecolors=theme.grid, linewidth=0.5,
    )  # fmt: skip


def _label(axes: Axes, positions: NDArray[np.int64], tokens: Sequence[str], cues: Sequence[int]) -> None:
    texts = []
    for place in positions:
        token = visible(tokens[place]).replace(" ", "·")
        token = token if len(token) <= 14 else f"{token[:13]}…"
        texts.append(f"{'▸ ' if place in cues else ''}{token} {place:>3}")
    axes.set_yticks(np.arange(len(positions)) + 0.5, texts)
    for place, label in zip(positions, axes.get_yticklabels(), strict=True):
        label.set_fontweight("bold" if place in cues else "normal")
