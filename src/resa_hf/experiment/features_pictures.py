"""The pictures of `resa-hf features`, each in light and dark."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..features.mixture import Mixture
from ..features.page import Pictures
from ..features.plots import Curve, plot_counts, plot_effects, plot_matching, plot_quality
from ..features.prompt_plot import plot_prompt

Part = dict[str, Any]
Draw = Callable[[Path, bool], Any]


def draw_pictures(folder: Path, tokens: Sequence[str], cues: Sequence[int], found: Part) -> Pictures:
    """Draws what there is to show.

    Args:
        folder (`Path`): for `NAME.png` and `NAME-dark.png`.
        tokens (sequence of `str`), cues (sequence of `int`): the prompt, and the places of its cues' tokens.
        found (`dict`): as in report.json.

    Returns:
        `Mapping[str, tuple[Path, Path, str]]`: as [`~resa_hf.features.page.write_page`] takes them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, (draw, alt) in _drawings(tokens, cues, found).items():
        light, dark = folder / f"{name}.png", folder / f"{name}-dark.png"
        draw(light, False)
        draw(dark, True)
        drawn[f"pictures/{name}.png"] = (light, dark, alt)
    return drawn


def _drawings(tokens: Sequence[str], cues: Sequence[int], found: Part) -> dict[str, tuple[Draw, str]]:
    layers = found["layers"]
    counts = [len(layer["latents"]) for layer in layers]
    drawings: dict[str, tuple[Draw, str]] = {
        "counts": (_counts(layers, counts, found["mixture"]), f"Reasoning latents by layer: {_said(layers, counts)}."),
        "quality": (_quality(layers, found["quality"]), "FVU, CE recovered and share of dead latents by layer."),
    }
    if any(counts):
        alt = f"Heat map of {sum(counts)} reasoning latents by token of the prompt; they are active at the cues only."
        drawings["prompt"] = (_prompt(tokens, cues, layers), alt)
    # Patching everywhere moves so much more that beside it the others could not be told apart.
    if edits := [edit for edit in found["effects"]["edits"] if not edit["change"].startswith("patch")]:
        drawings["effects"] = (_effects(edits), "KL of each edit with its interval, beside matched random latents.")
    if "decoder" in found.get("matching", {}):
        drawings["matching"] = (_matching(found["matching"]["decoder"]), "Decoder cosines of matched latents.")
    return drawings


def _said(layers: Sequence[Part], counts: Sequence[int]) -> str:
    return ", ".join(f"{count} at {layer['hookpoint']}" for layer, count in zip(layers, counts, strict=True))


def _counts(layers: Sequence[Part], counts: Sequence[int], mixture: Part | None) -> Draw:
    numbers = [layer["layer"] for layer in layers]
    curve = None
    if mixture is not None:
        fields = {name: tuple(mixture[name]) for name in ("means", "sds", "weights")}
        fitted = Mixture(**fields, log_likelihood=mixture["log_likelihood"], bic=mixture["bic"])
        x = np.linspace(min(numbers) - 0.5, max(numbers) + 0.5, 400)
        curve = Curve(x, fitted.density(x), fitted.means, fitted.weights)
    mean, low, high = ([layer["same_frequency"][name] for layer in layers] for name in ("mean", "low", "high"))
    return lambda path, dark: plot_counts(path, numbers, counts, curve, control=(mean, low, high), dark=dark)


def _quality(layers: Sequence[Part], quality: dict[str, Part]) -> Draw:
    numbers = [layer["layer"] for layer in layers]
    fvu, recovered, dead = (
        [np.nan if (value := quality[layer["hookpoint"]][name]) is None else value for layer in layers]
        for name in ("fvu", "ce_recovered", "dead_share")
    )
    return lambda path, dark: plot_quality(path, numbers, fvu, recovered, dead, dark=dark)


def _prompt(tokens: Sequence[str], cues: Sequence[int], layers: Sequence[Part]) -> Draw:
    names = [f"{layer['hookpoint']} #{latent}" for layer in layers for latent in layer["latents"]]
    values = np.array([row for layer in layers for row in layer["values"]]).T
    return lambda path, dark: plot_prompt(path, tokens, names, values, cues, dark=dark)


def _effects(edits: Sequence[Part]) -> Draw:
    names = [f"{edit['change']}: {', '.join(map(str, edit['latents']))}" for edit in edits]
    estimates, lows, highs = ([edit["kl"][name] for edit in edits] for name in ("estimate", "low", "high"))
    null = tuple([edit["nulls"]["kl"][name] for edit in edits] for name in ("mean", "low", "high"))
    what = "KL(untouched || edited) of the next token (nats a token)"
    return lambda path, dark: plot_effects(path, names, estimates, lows, highs, null, what, dark=dark)  # type: ignore[arg-type]


def _matching(part: Part) -> Draw:
    similarity, null, threshold = part["similarity"], np.ravel(part["null_similarity"]), part["threshold"]
    return lambda path, dark: plot_matching(path, similarity, null, threshold, "cosine of decoder rows", dark=dark)
