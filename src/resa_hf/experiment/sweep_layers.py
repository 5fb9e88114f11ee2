"""Scores by layer beside the reasoning features there: do the features tell where to put the SAE?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from ..evaluation.tables import markdown, points
from ..features.mixture import Correlation, Mixture, count_correlation, fit_mixture, mixture_correlation
from ..features.plots import plot_scores
from ..features.reasoning import CUES, R1_PROMPT, cued_prompt, reasoning_latents
from ..hookpoints import layer_index
from ..models import load_skeleton, load_tokenizer
from ..precision import runnable_device
from ..sae.checkpoint import load_sae
from .arms import BASE
from .loading import load_sae_source, load_target
from .sweep import FeatureSettings, Point, Sweep
from .sweep_results import Line

# [points][seeds]
Counts = list[list[int]]


@dataclass(frozen=True)
class LayerReport:
    """What a sweep over hookpoints tells of layers.

    Args:
        text (`str`): Markdown.
        plain (`dict`): the same as JSON can hold it, by arm.
        pictures (`dict[str, str]`): files in the sweep's folder, and their alternative texts.
    """

    text: str = ""
    plain: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)


def report_layers(sweep: Sweep, lines: Mapping[str, Sequence[Line]]) -> LayerReport:
    """Draws the scores of each arm whose SAE moves from layer to layer, controls left out, and counts the features.

    Args:
        sweep ([`Sweep`]): over hookpoints.
        lines (`Mapping[str, Sequence[Line]]`): by arm, the base's among them.
    """
    run = sweep.points[0].settings.run
    skeleton = load_skeleton(run.model_name_or_path, revision=run.model_revision)
    texts: list[str] = []
    plain: dict[str, Any] = {}
    pictures: dict[str, str] = {}
    for name, found in lines.items():
        arm = found[0].result.arm
        if arm.sae_from == "none" or arm.is_control or "sae_id" in arm.tuning:
            continue
        layers = [layer_index(skeleton, _hookpoint(line.point)) for line in found]
        counts = None if sweep.features is None else count_features(found, sweep.features)
        stem = f"report-{arm.slug}" if pictures else "report"
        for suffix, dark in (("", False), ("-dark", True)):
            _draw(sweep.root / f"{stem}{suffix}.png", layers, lines[BASE.name][0], found, counts, dark)
        pictures[f"{stem}.png"] = f"{name}: accuracy by layer, with the interval of its difference to the base"
        plain[name] = {"hookpoints": [_hookpoint(line.point) for line in found], "layers": layers}
        if sweep.features is not None and counts is not None:
            text, numbers = _compared(layers, found, counts, sweep.features.components)
            texts.append(f"## {name}: reasoning features and scores\n\n{text}")
            plain[name] |= {"features": counts} | numbers
    return LayerReport("\n\n".join(texts), plain, pictures)


def _draw(
    path: Path, layers: Sequence[int], base: Line, lines: Sequence[Line], counts: Counts | None, dark: bool
) -> None:
    """The interval at each score is that of its difference to the base: both have answered the same problems."""
    level = base.result.compared.accuracy.estimate
    differences = [line.result.compared.difference for line in lines]
    ends = np.array([(d.estimate, d.low, d.high) for d in differences if d is not None])
    scores, lows, highs = level + ends.T
    means = None if counts is None else [float(np.mean(seeds)) for seeds in counts]
    plot_scores(path, layers, scores, lows, highs, (level, math.nan, math.nan), means, dark=dark)


def _hookpoint(point: Point) -> str:
    (hookpoint,) = point.values.values()
    return str(hookpoint)


def count_features(lines: Sequence[Line], features: FeatureSettings) -> Counts:
    """Reasoning features at the hookpoint of each point of an arm, with the SAE of each seed.

    Read on the model that Stage I has read; a pretrained SAE is read on the target, and is the same with every seed.
    """
    arm, settings = lines[0].result.arm, lines[0].point.settings
    run, source = settings.run, settings.sae_source(arm.sae_from)
    pretrained = run.sae if arm.sae_from == "pretrained" else None
    model = load_sae_source(run, source, run.seeds[0]) if pretrained is None else load_target(run)
    torch.nn.Module.to(model, runnable_device(bool(settings.stage2.get("use_cpu", False))))
    tokenizer = load_tokenizer(run.model_name_or_path, revision=run.model_revision)
    prompt = cued_prompt(tokenizer, features.prompt or R1_PROMPT, features.cues or CUES)
    by_seed = []
    for seed in run.seeds if pretrained is None else run.seeds[:1]:
        saes = {
            hookpoint: partial(load_sae, point.folder.sae(source, seed), hookpoint)
            if pretrained is None
            else partial(load_sae, pretrained, hookpoint, revision=run.sae_revision)
            for point in (line.point for line in lines)
            for hookpoint in [_hookpoint(point)]
        }
        by_seed.append([len(layer.latents) for layer in reasoning_latents(model, saes, prompt)])
    return [list(seeds) for seeds in zip(*by_seed, strict=True)]


def _compared(
    layers: Sequence[int], lines: Sequence[Line], counts: Counts, components: int | None
) -> tuple[str, dict[str, Any]]:
    """What counts and scores have to do with each other, in words and as JSON can hold it."""
    accuracies = [line.result.compared.accuracy for line in lines]
    means, scores = [float(np.mean(seeds)) for seeds in counts], [accuracy.estimate for accuracy in accuracies]
    rows = [
        [_hookpoint(line.point), f"{mean:.4g}", ", ".join(map(str, seeds)), *points(accuracy)]
        for line, mean, seeds, accuracy in zip(lines, means, counts, accuracies, strict=True)
    ]
    table = markdown(["hookpoint", "reasoning features", "by seed", "accuracy %", "95% interval"], rows)
    if not any(means):
        return f"{table}\n\nThe prompt shows no reasoning feature at any layer: there is nothing to compare.", {}
    totals = [sum(seeds) for seeds in counts]  # the BIC needs counts
    try:
        of_counts = fit_mixture(layers, totals, components)
        of_scores = fit_mixture(layers, scores, len(of_counts.means))
        ranks = count_correlation(totals, scores)
        curves = mixture_correlation(layers, totals, scores, components=components)
    except DataError as error:
        return f"{table}\n\nFeatures and scores cannot be compared: {error}", {}
    text = (
        f"- Mixture of the counts over layers (numbered from 0): {_mixture(of_counts)}.\n"
        f"- Mixture of the scores: {_mixture(of_scores)}.\n"
        f"- Counts and scores, Spearman's correlation: {_correlation(ranks)}.\n"
        f"- Both mixtures' curves, Pearson's correlation: {_correlation(curves)}. Two smooth curves over few layers "
        "correlate by chance, so each permutation's scores are fitted anew."
    )
    plain = {"count_mixture": asdict(of_counts), "score_mixture": asdict(of_scores)}
    return f"{table}\n\n{text}", plain | {"spearman": asdict(ranks), "mixture_correlation": asdict(curves)}


def _mixture(mixture: Mixture) -> str:
    parts = zip(mixture.means, mixture.weights, strict=True)
    return ", ".join(f"mean {mean:.1f} (weight {weight:.0%})" for mean, weight in parts)


def _correlation(found: Correlation) -> str:
    return f"{found.estimate:+.2f}, p = {found.p_value:.2g} ({found.permutations:,} permutations of the scores)"
