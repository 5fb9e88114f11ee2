"""
Does the count of reasoning latents at a layer predict the score of the model tuned there? The paper's own numbers.

    python examples/table_6/layers_of_table_6.py --output_dir runs/table_6

Reads `layers.csv` beside it (table 6 of huggingface.co/papers/2506.09967: latents of Tina-STILL by layer, numbered
from 1, and the average score of the model tuned there), prints a table and leaves `report.json`, `counts.png` and
`scores.png`. Takes seconds.
"""

import argparse
import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from resa_hf.features.mixture import count_correlation, fit_mixture, layer_entropy, mixture_correlation
from resa_hf.features.plots import Curve, plot_counts, plot_scores

TABLE = Path(__file__).with_name("layers.csv")
BASE = 41.18  # the untouched model's average, in the same table
# Means, weights in percent and entropy. The counts that the paper fits are the base model's, which it does not print.
STATED = {
    "counts": ((4.9, 14.5, 22.7), (41, 37, 22), 3.194),
    "scores": ((5.6, 15.1, 23.0), (39, 37, 24), 3.202),
}


def examine(seed: int = 0, permutations: int = 2000) -> dict[str, Any]:
    """The mixtures of counts and scores, and the correlations of both with their permutation p-values."""
    with TABLE.open() as file:
        rows = list(csv.DictReader(file))
    layers, counts, scores = (np.array([float(row[name]) for row in rows]) for name in ("layer", "latents", "average"))
    weights = {"counts": counts, "scores": scores, "scores above the base": scores - BASE}
    return {
        "layers": layers.tolist(),
        "counts": counts.tolist(),
        "scores": scores.tolist(),
        "mixtures": {
            name: {**asdict(fit_mixture(layers, weight, 3, seed=seed)), "entropy": layer_entropy(weight)}
            for name, weight in weights.items()
        },
        "bic": {number: fit_mixture(layers, counts, number, seed=seed).bic for number in range(1, 7)},
        "correlations": {
            "counts and scores, Spearman": asdict(count_correlation(counts, scores, seed=seed)),
            **{
                f"mixtures of counts and {name}": asdict(
                    mixture_correlation(layers, counts, weight, components=3, seed=seed, permutations=permutations)
                )
                for name, weight in weights.items()
                if name != "counts"
            },
        },
    }


def describe(found: dict[str, Any]) -> str:
    """Tables in Markdown."""
    lines = ["| mixture of 3 | means | weights, % | entropy |", "|---|---|---|---|"]
    for name, (means, weights, entropy) in STATED.items():
        whose = " (of the base model)" if name == "counts" else ""
        lines.append(f"| the paper's {name}{whose} | {_joined(means)} | {_joined(weights, 0)} | {entropy} |")
    for name, one in found["mixtures"].items():
        weights = [100 * weight for weight in one["weights"]]
        lines.append(
            f"| {name}, fitted here | {_joined(one['means'])} | {_joined(weights, 0)} | {one['entropy']:.3f} |"
        )
    lines += ["", "| correlation over the layers | estimate | p |", "|---|---|---|"]
    lines += [
        f"| {name} | {one['estimate']:+.2f} | {one['p_value']:.2g} |" for name, one in found["correlations"].items()
    ]
    best = min(found["bic"], key=found["bic"].get)
    bics = ", ".join(f"{number}: {value:.1f}" for number, value in found["bic"].items())
    return "\n".join([*lines, "", f"BIC of the counts by components: {bics}. The lowest: {best}."])


def _joined(values: Any, digits: int = 1) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def draw(found: dict[str, Any], folder: Path) -> None:
    """Both pictures, light."""
    layers, fitted = found["layers"], found["mixtures"]["counts"]
    x = np.linspace(1.5, 27.5, 400)
    density = fit_mixture(layers, found["counts"], 3).density(x)
    curve = Curve(x, density, fitted["means"], fitted["weights"])
    numbers = [int(layer) for layer in layers]
    plot_counts(folder / "counts.png", numbers, found["counts"], curve, dark=False)
    unknown, scores = np.full(len(layers), np.nan), np.array(found["scores"]) / 100
    base = (BASE / 100, np.nan, np.nan)  # one number each: the paper gives no intervals
    plot_scores(folder / "scores.png", numbers, scores, unknown, unknown, base, found["counts"], dark=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/table_6"))
    folder = parser.parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    found = examine()
    print(describe(found))
    (folder / "report.json").write_text(json.dumps(found, indent=1))
    draw(found, folder)
    print(f"\nReport: {folder / 'report.json'}, counts.png, scores.png.")


if __name__ == "__main__":
    main()
