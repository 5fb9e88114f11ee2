"""Memory and open files of one process that does Stage I, Stage II and an evaluation again and again.

    python -m benchmarks soak [--minutes 120] [--output_dir runs/soak]

Every round is a whole `resa-hf run` on the tiny reasoner in a new folder, with another seed. After each, a line goes
to soak.jsonl in the output folder; at the end, the slope over the second half of the rounds is printed, and the
picture goes to soak.png there. Linux only.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from matplotlib.figure import Figure

from resa_hf.cli import main as resa_hf

from .measure import hardware, resident, table

MIB = 2**20
COUNTED = {
    "resident": "resident memory, MiB",
    "files": "open files",
    "threads": "threads",
    "temporary": "temporary files",
}
RECIPE = {
    "model_name_or_path": "resa_hf/tiny/base",
    "source_model": "resa_hf/tiny/source",
    "dtype": "float32",
    "dataset": "tiny-reasoner",
    "limit": 400,
    "held_out": 40,
    "template": "chat",
    "pack": False,
    "stage1": {
        "hookpoints": ["layers.1", "layers.2"],
        "num_latents": 512,
        "k": 16,
        "max_length": 128,
        "max_steps": 20,
        "save_strategy": "steps",
        "save_steps": 10,
    },
    "stage2": {
        "sae_id": "layers.2",
        "learning_rate": 1e-3,
        "max_length": 128,
        "max_steps": 20,
        "save_strategy": "steps",
        "save_steps": 10,
    },
    "sampling": {"max_new_tokens": 48, "batch_size": 20},
    "arms": {"SAE-Tuning": {}, "random SAE": {"control": "random_sae"}},
}


def run_once(folder: Path, seed: int) -> None:
    """One round, silent; its files go afterwards."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"seeds": [seed], "output_dir": str(folder / "run")}))
    with (folder / "log.txt").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        status = resa_hf(["run", "--config", str(recipe)])
    if status:
        sys.exit((folder / "log.txt").read_text())


def held() -> dict[str, float]:
    """What the process holds now."""
    return {
        "resident": resident() / MIB,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "temporary": sum(1 for _ in Path(tempfile.gettempdir()).rglob("*")),
    }


def soak(minutes: float, output: Path) -> list[dict[str, float]]:
    """Rounds until the time is over, with what was held after each."""
    started, rounds = time.monotonic(), []
    tempfile.tempdir = str(output / "tmp")
    shutil.rmtree(tempfile.tempdir, ignore_errors=True)
    Path(tempfile.tempdir).mkdir(parents=True)
    with (output / "soak.jsonl").open("w") as log:
        while time.monotonic() - started < 60 * minutes:
            folder = output / "round"
            folder.mkdir()
            run_once(folder, len(rounds))
            shutil.rmtree(folder)
            rounds.append({"minutes": (time.monotonic() - started) / 60, **held()})
            print(json.dumps(rounds[-1]), file=log, flush=True)
    return rounds


def slope(rounds: Sequence[dict[str, float]], what: str) -> tuple[float, float]:
    """By how much it grows in a hundred rounds, and the standard error of that."""
    hundreds = np.arange(len(rounds)) / 100  # not the time: rounds take as long as other processes let them
    (grown, _), covariance = np.polyfit(hundreds, [entry[what] for entry in rounds], 1, cov=True)
    return float(grown), float(covariance[0, 0]) ** 0.5


def draw(rounds: Sequence[dict[str, float]], path: Path) -> None:
    figure = Figure(figsize=(9, 2 * len(COUNTED)), layout="constrained")
    for axes, (what, name) in zip(figure.subplots(len(COUNTED), sharex=True), COUNTED.items(), strict=True):
        axes.plot([entry["minutes"] for entry in rounds], [entry[what] for entry in rounds], ".-", linewidth=0.8)
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0, top=1.2 * max(1, *(entry[what] for entry in rounds)))
        axes.grid(alpha=0.3)
    axes.set_xlabel(f"minutes; {len(rounds)} rounds of Stage I, Stage II and evaluation in one process")
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/soak"))
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rounds = soak(args.minutes, args.output_dir.resolve())
    second = rounds[len(rounds) // 2 :]
    if len(second) < 4:
        sys.exit(f"{len(rounds)} rounds are too few for a slope: more --minutes.")
    rows = []
    for what, name in COUNTED.items():
        grown, error = slope(second, what)
        ends = [f"{entry[what]:,.0f}" for entry in (rounds[0], second[0], rounds[-1])]
        rows.append([name, *ends, f"{grown:+.2f} ± {2 * error:.2f}"])
    print(hardware(), f"{len(rounds)} rounds in {rounds[-1]['minutes']:.0f} minutes", "", sep="\n")
    print(table(["held", "first round", "half-time", "last round", "in 100 rounds, second half"], rows))
    draw(rounds, args.output_dir / "soak.png")
