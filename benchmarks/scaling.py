"""Cost against tokens, sequence length, latents and hookpoints, with fits; memory against the tokens of a run.

    python -m benchmarks scaling --preset cpu [--repeats 2]

Seconds are medians over steps and repeats, all points of a series taking turns. Stage I against tokens and latents is
the step of one SAE on random activations (loss, backward, decoder's parallel gradient, optimiser, decoder norm);
everything else is a step of the trainers as a user gets them. The picture goes to scaling.png beside this file.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import TrainerCallback

from resa_hf import SAETuningConfig, SAETuningTrainer
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.objective import sae_step
from resa_hf.sae.signum import ScheduleFreeSignum
from resa_hf.tiny.tokenizer import build_tokenizer

from .measure import hardware, in_fresh_process, resident, seconds, table
from .presets import PRESETS, Preset
from .stage1 import StepSeconds, device
from .stage1 import our_trainer as stage1_trainer
from .stage2 import parts, token_ids

PICTURE = Path(__file__).with_name("scaling.png")
MIB = 2**20
MEMORY_STEPS = 60


@dataclass
class Series:
    """Points of one curve, and the polynomial fitted to them."""

    title: str
    unit: str
    x: list[int]
    y: list[float]
    degree: int = 1

    def fit(self) -> np.ndarray:
        return np.polyfit(self.x, self.y, self.degree)

    def r_squared(self) -> float:
        y = np.array(self.y)
        return float(1 - np.square(y - np.polyval(self.fit(), self.x)).sum() / np.square(y - y.mean()).sum())

    def formula(self) -> str:
        """Milliseconds, with x in thousands, so that the coefficients can be read."""
        thousands = 1000 if max(self.x) >= 1000 else 1
        name = self.unit + (" / 1,000" if thousands > 1 else "")
        powers = range(self.degree, -1, -1)
        terms = [
            f"{coefficient * 1e3 * thousands**power:.3g}" + ("", " x", " x²")[power]
            for coefficient, power in zip(self.fit(), powers, strict=True)
        ]
        return f"{' + '.join(terms).replace('+ -', '- ')} ms, x = {name}"


def in_turns(measured: Callable[[int], float], x: Sequence[int], repeats: int) -> list[float]:
    """Median seconds at each x."""
    taken: dict[int, list[float]] = {value: [] for value in x}
    for _ in range(repeats):
        for value in x:
            taken[value].append(measured(value))
    return [statistics.median(found) for found in taken.values()]


def stage1_step(preset: Preset, tokens: int, latents: int) -> float:
    """Seconds of a step of one SAE, median of three after one."""
    sae = TopKSAE(preset.hidden_size, latents, preset.k, device=device())
    optimizer = ScheduleFreeSignum(sae.parameters(), lr=5e-3)
    x = torch.randn(tokens, preset.hidden_size, device=device()).to(preset.dtype)
    ones = torch.ones(tokens, device=device())

    def step() -> None:
        optimizer.zero_grad()
        sae_step(sae, x, ones).loss.backward()
        sae.remove_parallel_decoder_gradient()
        optimizer.step()
        sae.unit_norm_decoder()

    step()
    return statistics.median(seconds(step) for _ in range(3))


def stage1_hookpoints(preset: Preset, hookpoints: int) -> float:
    """Seconds of a step of SAETrainer; the deepest hookpoint, and so the forward, is always the same."""
    chosen = [preset.layers - 1 - number * preset.layers // 8 for number in range(hookpoints)]
    steps = StepSeconds()
    with tempfile.TemporaryDirectory() as folder:
        stage1_trainer(preset, chosen, 4, folder, [steps]).train()
    return statistics.median(steps.taken)


def stage2_trainer(
    preset: Preset, sequences: int, steps: int, folder: str, callback: TrainerCallback
) -> SAETuningTrainer:
    model, sae = parts(preset)
    args = SAETuningConfig(
        output_dir=folder,
        sae_gradient="flow",
        max_steps=steps,
        per_device_train_batch_size=sequences,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        packing=False,
        max_length=preset.tokens,
        bf16=preset.dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
    )
    data = Dataset.from_dict({"input_ids": token_ids(preset, 2 * sequences).tolist()})
    return SAETuningTrainer(model, args, data, sae=sae, processing_class=build_tokenizer(), callbacks=[callback])


def stage2_step(preset: Preset, sequences: int) -> float:
    steps = StepSeconds()
    with tempfile.TemporaryDirectory() as folder:
        stage2_trainer(preset, sequences, 4, folder, steps).train()
    return statistics.median(steps.taken)


@dataclass
class Curve:
    """What is to be measured: seconds at each x. `scale` times x is what is drawn."""

    title: str
    unit: str
    x: list[int]
    seconds: Callable[[int], float]
    degree: int = 1
    scale: int = 1

    def series(self, repeats: int) -> Series:
        print(f"{self.title} ...", file=sys.stderr)
        taken = in_turns(self.seconds, self.x, repeats)
        return Series(self.title, self.unit, [self.scale * x for x in self.x], taken, self.degree)


def curves(preset: Preset) -> list[Curve]:
    tokens, quarter = preset.tokens * preset.sequences, preset.tokens // 4
    few = replace(preset, sequences=preset.sequences // 4)
    counts = [tokens * eighths // 8 for eighths in (1, 2, 4, 8, 12, 16)]
    latents = [preset.latents * quarters // 4 for quarters in (1, 2, 4, 6, 8)]
    lengths = [preset.tokens * eighths // 8 for eighths in (1, 2, 4, 8, 16)]
    return [
        Curve("Stage I: tokens a step", "tokens", counts, lambda x: stage1_step(preset, x, preset.latents)),
        Curve("Stage I: latents", "latents", latents, lambda x: stage1_step(preset, tokens // 2, x)),
        Curve(
            "Stage I: hookpoints in one pass", "hookpoints", [1, 2, 3, 4, 6, 8], lambda x: stage1_hookpoints(few, x)
        ),
        Curve(
            f"Stage II: tokens a step, sequences of {quarter}",
            "tokens",
            [1, 2, 3, 4, 6],
            lambda x: stage2_step(replace(preset, tokens=quarter), x),
            scale=quarter,
        ),
        Curve(
            "Stage II: sequence length",
            "tokens",
            lengths,
            lambda x: stage2_step(replace(preset, tokens=x), 1),
            degree=2,  # attention looks at pairs of tokens
        ),
    ]


class HighestPoint(TrainerCallback):
    """Most bytes that the process, or the device, held up to each step."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_device = torch.cuda.is_available()
        self.bytes.append(torch.cuda.max_memory_allocated() if on_device else resident("VmHWM"))


def memory(preset: Preset, stage: str) -> tuple[list[int], list[int]]:
    """For a fresh process: tokens seen and highest point after each step of one run."""
    found = HighestPoint()
    small = replace(preset, sequences=preset.sequences // 4, tokens=preset.tokens // 2)
    with tempfile.TemporaryDirectory() as folder:
        if stage == "stage1":
            stage1_trainer(small, [preset.hookpoint], MEMORY_STEPS, folder, [found]).train()
        else:
            stage2_trainer(small, 1, MEMORY_STEPS, folder, found).train()
    tokens = small.tokens * (small.sequences if stage == "stage1" else 1)
    return [tokens * (step + 1) for step in range(len(found.bytes))], found.bytes


def memory_against_tokens(name: str, stage: str) -> tuple[list[int], list[int]]:
    print(f"{stage}: memory ...", file=sys.stderr)
    return tuple(in_fresh_process("benchmarks", "scaling", "--preset", name, "--memory-of", stage))


def draw(series: list[Series], memories: dict[str, tuple[list[int], list[int]]], told: str) -> None:
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for ax, one in zip(axes, series, strict=False):
        line = np.linspace(0, max(one.x), 200)
        ax.plot(line, np.polyval(one.fit(), line), color="#999999", linewidth=1.5)
        ax.plot(one.x, one.y, "o", color="#1f4e8c", markersize=6)
        ax.set_title(f"{one.title}\nR² = {one.r_squared():.4f}", fontsize=11)
        ax.set_xlabel(one.unit)
        ax.set_ylabel("seconds a step")
    last = axes[len(series)]
    for (name, (tokens, found)), colour in zip(memories.items(), ("#1f4e8c", "#b5541c"), strict=True):
        last.plot(tokens, np.array(found) / MIB, color=colour, linewidth=2, label=name)
    last.set_title("Highest memory up to then, in one run", fontsize=11)
    last.set_xlabel("tokens of the run")
    last.set_ylabel("MiB")
    last.legend(frameon=False)
    for ax in axes:
        ax.set_xlim(left=0)
        ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(told, fontsize=9)
    figure.savefig(PICTURE, dpi=110)


def report(series: list[Series], memories: dict[str, tuple[list[int], list[int]]]) -> str:
    rows = [
        [
            one.title,
            ", ".join(f"{x:,}: {y * 1e3:,.0f}" for x, y in zip(one.x, one.y, strict=True)),
            one.formula(),
            f"{one.r_squared():.4f}",
        ]
        for one in series
    ]
    for name, (tokens, found) in memories.items():
        first, half = len(found) // 10, len(found) // 2
        rows.append(
            [
                f"{name}: memory against tokens of the run",
                f"MiB after {tokens[first]:,}, {tokens[half]:,} and {tokens[-1]:,} tokens: "
                + ", ".join(f"{found[place] / MIB:,.1f}" for place in (first, half, -1)),
                f"second half of the run: {found[-1] / found[half] - 1:+.2%}",
                "",
            ]
        )
    return table(["cost", "ms at each point", "least squares", "R²"], rows)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each point")
    parser.add_argument("--memory-of", metavar="STAGE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    preset = PRESETS[args.preset]
    if args.memory_of:
        print(json.dumps(memory(preset, args.memory_of)))
        return
    series = [curve.series(args.repeats) for curve in curves(preset)]
    memories = {
        name: memory_against_tokens(args.preset, stage)
        for name, stage in (("Stage I", "stage1"), ("Stage II", "stage2"))
    }
    told = f"{args.preset}: {hardware()}"
    draw(series, memories, told)
    print(f"{told}\n\n{report(series, memories)}\n\n{PICTURE}")
