"""Pictures of features: 800 pixels wide, in light or dark, each written as a whole PNG file.

They take plain numbers and texts, return the `Figure` as it was drawn, and shorten or escape what does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .theme import Theme, folded, legend, picture, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Curve(NamedTuple):
    """A mixture over layers, for drawing.

    Args:
        x (`np.ndarray` of shape `[points]`): Layers, on a fine grid.
        density (`np.ndarray` of shape `[points]`): The mixture's density there, of integral 1.
        means, weights (`tuple[float, ...]`): Of its components.
    """

    x: NDArray[np.float64]
    density: NDArray[np.float64]
    means: tuple[float, ...]
    weights: tuple[float, ...]


def plot_counts(
    path: Path, layers: Sequence[int], counts: Sequence[float], mixture: Curve | None, *,
    control: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None, dark: bool,
) -> Figure:  # fmt: skip
    """Reasoning features per layer, with the mixture fitted to them.

    Args:
        path (`Path`): The PNG file.
        layers (`Sequence[int]`): Layers with an SAE.
        counts (`Sequence[float]`): Features of each.
        mixture ([`Curve`], *optional*): Drawn as the counts that it expects.
        control (`tuple` of three arrays, *optional*): Mean, low and high end of a control's counts, by layer.
        dark (`bool`): Light on dark.

    Returns:
        `Figure`: the picture.
    """
    at = np.asarray(layers, dtype=float)
    with picture(path, 4.2, dark=dark) as (figure, theme):
        title(figure, "Reasoning features per layer")
        axes = figure.add_subplot()
        for layer in at[1::2]:  # shaded, so that the marks beside a bar are seen to be its own
            axes.axvspan(layer - 0.5, layer + 0.5, color=theme.grid, alpha=0.4, linewidth=0, zorder=0)
        _stems(axes, theme, at, counts, "reasoning features")
        if control is not None:
            mean, low, high = (np.broadcast_to(np.asarray(end, dtype=float), at.shape) for end in control)
            axes.vlines(at + 0.26, low, high, color=theme.null, linewidth=1.5)
            axes.scatter(
                at + 0.26, mean, s=20, marker="D", color=theme.null, label="control: mean, 95% range", zorder=3
            )
        if mixture is not None:
            _draw_mixture(axes, theme, mixture, float(np.sum(counts)) * _spacing(at))
        _layer_axis(axes, layers)
        _count_axis(axes, "features")
        legend(figure)
    return figure


def _stems(axes: Axes, theme: Theme, at: NDArray[np.float64], counts: Sequence[float], label: str) -> None:
    """Bars with a dot on top, so that a count of 0 is seen, too."""
    axes.vlines(at, 0, counts, color=theme.main, linewidth=5)
    axes.scatter(at, counts, s=30, color=theme.main, zorder=3, label=label)


def _draw_mixture(axes: Axes, theme: Theme, mixture: Curve, scale: float) -> None:
    means, weights = (
        ", ".join(f"{factor * value:.{digits}f}" for value in values)
        for values, factor, digits in ((mixture.means, 1, 1), (mixture.weights, 100, 0))
    )
    label = folded(
        f"mixture of {len(mixture.means)}, as features per layer: means (▾) {means}; weights {weights}%", 50, lines=4
    )
    axes.plot(mixture.x, scale * mixture.density, color=theme.other, linewidth=1.8, label=label, zorder=2.5)
    top = np.interp(mixture.means, mixture.x, scale * mixture.density)
    axes.scatter(mixture.means, top, s=50, marker="v", color=theme.other, edgecolor=theme.paper, zorder=5)


def _spacing(at: NDArray[np.float64]) -> float:
    """Layers from one SAE to the next: what a density is multiplied by to give a count."""
    return float(np.median(np.diff(np.sort(at)))) if len(at) > 1 else 1.0


def _layer_axis(axes: Axes, layers: Sequence[int]) -> None:
    ordered = sorted(layers)
    axes.set_xticks(ordered[:: -(-len(ordered) // 30)])
    axes.set_xlim(ordered[0] - 0.8, ordered[-1] + 0.8)
    axes.set_xlabel("layer")


def _count_axis(axes: Axes, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    top = max(1.0, axes.get_ylim()[1])
    axes.set_ylim(-0.04 * top, top)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_ylabel(label)
    axes.grid(axis="y")


def plot_effects(
    path: Path, names: Sequence[str], estimates: ArrayLike, lows: ArrayLike, highs: ArrayLike,
    null: tuple[ArrayLike, ArrayLike, ArrayLike] | None, what: str, *, dark: bool,
) -> Figure:  # fmt: skip
    """Effects of edits with their intervals; behind each, what the same edit of matched random latents does.

    Args:
        path (`Path`): The PNG file.
        names (`Sequence[str]`): Of the edits.
        estimates, lows, highs (array of shape `[edits]`): Effects and ends of their intervals. An interval with an
            end that is not finite is not drawn.
        null (`tuple` of three arrays, *optional*): Mean, low and high end of the null, each one for all edits or of
            shape `[edits]`.
        what (`str`): What was measured, with its unit.
        dark (`bool`): Light on dark.

    Returns:
        `Figure`: the picture.
    """
    estimates = np.asarray(estimates, dtype=float)
    with picture(path, 1.7 + 0.5 * len(names), dark=dark) as (figure, theme):
        title(figure, "Effect of editing latents")
        axes = figure.add_subplot()
        axes.use_sticky_edges = False
        axes.axvline(0, color=theme.muted, linewidth=1, linestyle="--", zorder=1)
        _draw_effects(axes, theme, estimates, _finite(lows, highs), null)
        axes.set_yticks(np.arange(len(names)), [folded(name, 30, lines=3) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(folded(what, 60))
        axes.grid(axis="x")
        legend(figure)
    return figure


def _draw_effects(
    axes: Axes, theme: Theme, estimates: NDArray[np.float64], intervals: Intervals,
    null: tuple[ArrayLike, ArrayLike, ArrayLike] | None,
) -> None:  # fmt: skip
    rows = np.arange(len(estimates))
    if intervals.drawn.any():
        axes.hlines(
            rows[intervals.drawn], intervals.low, intervals.high, color=theme.main, linewidth=2, label="95% interval",
            zorder=3,
        )  # fmt: skip
    outside = np.zeros(len(estimates), dtype=bool)
    if null is not None:
        mean, low, high = (np.broadcast_to(np.asarray(end, dtype=float), estimates.shape) for end in null)
        outside = (estimates < low) | (estimates > high)
        axes.vlines(mean, rows - 0.3, rows + 0.3, color=theme.null, linewidth=2, label="null: mean", zorder=2)
        axes.barh(
            rows, high - low, 0.6, left=low, facecolor=theme.grid, edgecolor=theme.null, label="null: 95% range",
            zorder=1.5,
        )  # fmt: skip
    for which, fill, label in (
        (outside, theme.main, "effect outside the null's range"),
        (~outside, theme.paper, "effect" if null is None else "effect within the null's range"),
    ):
        if which.any():
            axes.scatter(
                estimates[which], rows[which], s=45, facecolor=fill, edgecolor=theme.main, linewidth=1.5,
                label=label, zorder=4,
            )  # fmt: skip


class Intervals(NamedTuple):
    """Those intervals that can be drawn: which they are, and their ends."""

    drawn: NDArray[np.bool_]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def _finite(lows: ArrayLike, highs: ArrayLike) -> Intervals:
    low, high = np.asarray(lows, dtype=float), np.asarray(highs, dtype=float)
    drawn = np.isfinite(low) & np.isfinite(high)
    return Intervals(drawn, low[drawn], high[drawn])


def plot_scores(
    path: Path, layers: Sequence[int], scores: ArrayLike, lows: ArrayLike, highs: ArrayLike,
    base: tuple[float, float, float], counts: Sequence[float] | None, *, dark: bool,
) -> Figure:  # fmt: skip
    """Score by layer with intervals and the base's, over the counts of reasoning features.

    Args:
        path (`Path`): The PNG file.
        layers (`Sequence[int]`): Layers at which the SAE was spliced in.
        scores, lows, highs (array of shape `[layers]`): Scores as fractions of 1 and ends of their intervals. An
            interval with an end that is not finite is not drawn.
        base (`tuple[float, float, float]`): The untouched base's score and the ends of its interval.
        counts (`Sequence[float]`, *optional*): Reasoning features of each layer.
        dark (`bool`): Light on dark.

    Returns:
        `Figure`: the picture.
    """
    at = np.asarray(layers, dtype=float)
    with picture(path, 3.9 if counts is None else 5.4, dark=dark) as (figure, theme):
        title(figure, "Score by layer of the SAE" + ("" if counts is None else ", and reasoning features there"))
        heights = [3] if counts is None else [3, 1.4]
        panes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        if np.isfinite(base).all():
            panes[0].axhspan(
                100 * base[1], 100 * base[2], facecolor=theme.grid, edgecolor=theme.null, zorder=1,
                label="base: 95% interval",
            )  # fmt: skip
        panes[0].axhline(100 * base[0], color=theme.null, linestyle="--", zorder=2, label="base")
        drawn, low, high = _finite(lows, highs)
        if drawn.any():
            panes[0].vlines(
                at[drawn], 100 * low, 100 * high, color=theme.main, linewidth=2, label="95% interval", zorder=3
            )  # fmt: skip
        panes[0].scatter(at, 100 * np.asarray(scores, dtype=float), s=40, color=theme.main, label="score", zorder=4)
        panes[0].set_ylabel("score (%)")
        panes[0].grid(axis="y")
        if counts is not None:
            _stems(panes[1], theme, at, counts, "")
            _count_axis(panes[1], "features")
        _layer_axis(panes[-1], layers)
        legend(figure)
    return figure


def plot_quality(
    path: Path, layers: Sequence[int], fvu: ArrayLike, ce_recovered: ArrayLike | None, dead_share: ArrayLike | None,
    *, dark: bool,
) -> Figure:  # fmt: skip
    """How well the SAE of each layer reconstructs.

    Args:
        path (`Path`): The PNG file.
        layers (`Sequence[int]`): Layers with an SAE.
        fvu (array of shape `[layers]`): Fraction of variance unexplained.
        ce_recovered (array of shape `[layers]`, *optional*): Share of the cross-entropy recovered.
        dead_share (array of shape `[layers]`, *optional*): Share of dead latents.
        dark (`bool`): Light on dark.

    Returns:
        `Figure`: the picture.
    """
    measures = (
        ("FVU\n(less is better)", fvu), ("CE recovered\n(more is better)", ce_recovered),
        ("dead latents\n(share)", dead_share),
    )  # fmt: skip
    given = [(label, values) for label, values in measures if values is not None]
    with picture(path, 1.0 + 1.5 * len(given), dark=dark) as (figure, theme):
        title(figure, "Quality of the SAE of each layer")
        panes = figure.subplots(len(given), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (label, values) in zip(panes, given, strict=True):
            axes.plot(layers, np.asarray(values, dtype=float), color=theme.main, linewidth=1, marker="o", markersize=5)
            axes.set_ylabel(label)
            axes.grid(axis="y")
        _layer_axis(panes[-1], layers)
        figure.align_ylabels(panes)
    return figure


def plot_matching(
    path: Path, similarity: ArrayLike, null: ArrayLike, threshold: float, what: str, *, dark: bool
) -> Figure:
    """Similarity of matched latents beside that of the null.

    Args:
        path (`Path`): The PNG file.
        similarity (array of shape `[pairs]`): Of the matched latents, from -1 to 1.
        null (array of shape `[null_pairs]`): Of latents matched where nothing is shared.
        threshold (`float`): Above it a pair counts as the same latent.
        what (`str`): Kind of similarity.
        dark (`bool`): Light on dark.

    Returns:
        `Figure`: the picture.
    """
    # Rounding may leave a cosine above 1, which is outside of the last bin.
    groups = [np.clip(np.asarray(group, dtype=float), -1, 1) for group in (similarity, null)]
    bins = np.linspace(min(group.min(initial=0) for group in groups), 1, 41)
    heights = [np.histogram(group, bins)[0] / max(1, len(group)) for group in groups]
    labels = [
        f"{name}: {np.sum(group > threshold)} of {len(group)} above the threshold"
        for name, group in zip(("matched latents", "null"), groups, strict=True)
    ]
    with picture(path, 3.9, dark=dark) as (figure, theme):
        title(figure, "Latents matched across models")
        axes = figure.add_subplot()
        axes.stairs(100 * heights[0], bins, fill=True, color=theme.main, label=labels[0])
        axes.stairs(100 * heights[1], bins, color=theme.null, linewidth=2, label=labels[1])
        axes.axvline(threshold, color=theme.other, linestyle="--", label=f"threshold {threshold:.2f}")
        axes.set_xlabel(folded(what, 90))
        axes.set_ylabel("pairs (%)")
        axes.grid(axis="y")
        legend(figure)
    return figure
