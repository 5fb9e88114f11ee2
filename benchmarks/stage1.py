"""Stage I: seconds, memory and FVU of a step beside sparsify's and sae-lens' own, and 8 hookpoints in one pass.

    python -m benchmarks stage1 --preset cpu [--repeats 7]

One SAE on given activations: all take turns on the same batches, from the same weights, each with its own optimiser at
its own learning rate. The time of ours is that of a step of `SAETrainer`'s whole loop (data, forward, backward,
gradient parallel to the decoder, optimiser, decoder norm, statistics), with the source model's forward replaced by its
result. What the others' steps contain is said in other_trainers.py. sparsify is left out where it is not installed.

8 hookpoints: `SAETrainer` as a user gets it, the source model's forward included, one run of all against one run each.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from resa_hf import SAETrainer, SAETrainingConfig
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.source import ActivationSource, SourceBatch

from .measure import ceiling, flops, hardware, in_fresh_process, peak_memory, ratios, resident, synchronize, table
from .other_trainers import SAELens, Sparsify, SparsifyMissing
from .presets import PRESETS, Preset

WARMUP = 2
BATCHES = 4  # different ones, in turn; one more is held out
OTHERS = ("sparsify", "sae-lens", "sae-lens, no rescaling")
STILL_TOKENS = 5.9e6  # an epoch
DOLLARS_AN_HOUR = 3.5


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def token_ids(preset: Preset, rows: int) -> Tensor:
    return torch.randint(preset.vocabulary, (rows, preset.tokens), generator=torch.Generator().manual_seed(1))


def our_trainer(
    preset: Preset, hookpoints: list[int], steps: int, folder: str, callbacks: list[TrainerCallback]
) -> SAETrainer:
    """The trainer as a user gets it, on rows of token ids in their order."""
    args = SAETrainingConfig(
        output_dir=folder,
        hookpoints=[f"layers.{index}" for index in hookpoints],
        num_latents=preset.latents,
        k=preset.k,
        max_steps=steps,
        per_device_train_batch_size=preset.sequences,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        max_length=preset.tokens,
        bf16=preset.dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
    )
    data = Dataset.from_dict({"input_ids": token_ids(preset, preset.sequences * BATCHES).tolist()})
    return SAETrainer(preset.model(device()), args, data, callbacks=callbacks)


class Given:
    """Stands where the source model was: hands out activations that were made before, in turn."""

    def __init__(self, source: ActivationSource, batches: list[Tensor]) -> None:
        self.hookpoint, self.batches, self.next = source.hookpoints[0], batches, 0

    def __call__(self, inputs: dict[str, Any], autocast: Any) -> SourceBatch:
        x = self.batches[self.next % BATCHES]
        self.next += 1
        counted = torch.ones(len(x), device=x.device)
        return SourceBatch({self.hookpoint: x}, counted, {self.hookpoint: counted})


def activations(preset: Preset) -> list[Tensor]:
    """Of the source model at the preset's hookpoint; the last batch is held out."""
    source = ActivationSource(preset.model(device()), [f"layers.{preset.hookpoint}"])
    ids = token_ids(preset, preset.sequences * (BATCHES + 1)).to(device())
    autocast = torch.autocast(device().type, enabled=False)
    batches = [source({"input_ids": rows}, autocast) for rows in ids.split(preset.sequences)]
    return [batch.activations[f"layers.{preset.hookpoint}"] for batch in batches]


def other(name: str, start: TopKSAE) -> Sparsify | SAELens:
    if name == "sparsify":
        return Sparsify(start)
    return SAELens(start) if name == "sae-lens" else SAELens(start, rescale_acts_by_decoder_norm=False)


class Turns(TrainerCallback):
    """Times each step of a `SAETrainer`; after it the others take their turn on the same batch."""

    def __init__(self, others: dict[str, Sparsify | SAELens], batches: list[Tensor]) -> None:
        self.others, self.batches = others, batches
        self.taken: dict[str, list[float]] = {name: [] for name in ("ours", *others)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        self.taken["ours"].append(time.perf_counter() - self.started)
        for name, contestant in self.others.items():
            started = time.perf_counter()
            contestant.step(self.batches[(state.global_step - 1) % BATCHES])
            synchronize()
            self.taken[name].append(time.perf_counter() - started)
        self.started = time.perf_counter()


def fvu(x: Tensor, reconstruction: Tensor) -> float:
    x = x.float()
    return float((x - reconstruction).square().sum() / (x - x.mean(0)).square().sum())


def prepared(
    preset: Preset, steps: int, folder: str, callbacks: list[TrainerCallback]
) -> tuple[SAETrainer, list[Tensor]]:
    """Our trainer on given activations, with b_dec where all trainers put it: at the mean of the first batch."""
    batches = activations(preset)
    trainer = our_trainer(preset, [preset.hookpoint], steps, folder, callbacks)
    trainer.source = Given(trainer.source, batches)  # type: ignore[assignment]
    with torch.no_grad():
        next(iter(trainer.saes.values())).b_dec.copy_(batches[0].float().mean(0))
    return trainer, batches


def compare(preset: Preset, repeats: int) -> dict[str, Any]:
    """Seconds of a step, FVU and FLOPs of all contestants."""
    others: dict[str, Sparsify | SAELens] = {}
    turns = Turns(others, [])
    with tempfile.TemporaryDirectory() as folder:
        trainer, turns.batches = prepared(preset, WARMUP + repeats, folder, [turns])
        sae = next(iter(trainer.saes.values()))
        for name in OTHERS:
            try:
                others[name] = other(name, sae)
            except SparsifyMissing as error:
                print(error, file=sys.stderr)
        turns.taken |= {name: [] for name in others}
        held_out = turns.batches[BATCHES]
        first = turns.batches[0].float()
        with torch.no_grad():
            before = fvu(held_out, sae(held_out.float()))
            expected = {
                "sparsify": fvu(first, sae(first)),
                "sae-lens": float((first - sae(first)).square().sum(1).mean()),
            }
        trainer.train()
    taken = {name: seconds[WARMUP:] for name, seconds in turns.taken.items()}
    with torch.no_grad():
        after = {"ours": fvu(held_out, sae(held_out.float()))}
    after |= {name: fvu(held_out, contestant.reconstruct(held_out)) for name, contestant in others.items()}
    return {
        "seconds": {name: statistics.median(found) for name, found in taken.items()},
        "slower": {name: ratios(taken, name, "ours") for name in others},
        "first_loss_differs_by": {
            name: abs(one.losses[0] / expected[name.partition(",")[0]] - 1) for name, one in others.items()
        },
        "fvu_before": before,
        "fvu_after": after,
        "steps": WARMUP + repeats,
        "flops": {"ours": our_flops(preset)}
        | {name: other_flops(one, turns.batches[0]) for name, one in others.items()},
    }


def other_flops(contestant: Sparsify | SAELens, x: Tensor) -> int:
    if isinstance(contestant, Sparsify):
        contestant.optimizer.train()
    return flops(lambda: contestant.step(x))


def our_flops(preset: Preset) -> int:
    with tempfile.TemporaryDirectory() as folder, FlopCounterMode(display=False) as counter:
        trainer, _ = prepared(preset, 1, folder, [])
        counted_before = counter.get_total_flops()
        trainer.train()
    return counter.get_total_flops() - counted_before


def memory(preset: Preset, name: str) -> int:
    """
    Bytes at the highest point of three steps on random activations: those, weights, gradients and optimiser included,
    imports not. For a fresh process. The source model, which `SAETrainer` wants, is next to nothing here.
    """
    small = replace(preset, layers=1, hookpoint=0, vocabulary=64, intermediate_size=64)

    def run() -> None:
        shape = (preset.tokens * preset.sequences, preset.hidden_size)
        batches = [torch.randn(shape, device=device()).to(preset.dtype) for _ in range(BATCHES)]
        if name == "ours":
            with tempfile.TemporaryDirectory() as folder:
                trainer = our_trainer(small, [0], 3, folder, [])
                trainer.source = Given(trainer.source, batches)  # type: ignore[assignment]
                trainer.train()
            return
        contestant = other(name, TopKSAE(preset.hidden_size, preset.latents, preset.k, device=device()))
        for batch in batches[:3]:
            contestant.step(batch)

    return peak_memory(run, resident())


class StepSeconds(TrainerCallback):
    """Seconds of each step, data included, but for the first."""

    def __init__(self) -> None:
        self.taken: list[float] = []
        self._before = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        now = time.perf_counter()
        if state.global_step > 1:
            self.taken.append(now - self._before)
        self._before = now


def seconds_of_run(preset: Preset, hookpoints: list[int]) -> float:
    """Seconds of a step of a short run."""
    steps = StepSeconds()
    with tempfile.TemporaryDirectory() as folder:
        our_trainer(preset, hookpoints, 3, folder, [steps]).train()
    return statistics.median(steps.taken)


def together(preset: Preset, repeats: int) -> dict[str, Any]:
    """A step of 8 hookpoints in one pass against the sum of a step of 8 runs, in turns."""
    hookpoints = [preset.layers * (number + 1) // 8 - 1 for number in range(8)]
    taken: dict[str, list[float]] = {"one pass": [], "8 runs": []}
    for _ in range(repeats):
        taken["one pass"].append(seconds_of_run(preset, hookpoints))
        taken["8 runs"].append(sum(seconds_of_run(preset, [hookpoint]) for hookpoint in hookpoints))
    share = [one / many for one, many in zip(taken["one pass"], taken["8 runs"], strict=True)]
    return {
        "hookpoints": hookpoints,
        "seconds": {name: statistics.median(found) for name, found in taken.items()},
        "share": {"median": statistics.median(share), "least": min(share), "most": max(share)},
    }


def report(preset: Preset, results: dict[str, Any]) -> str:
    found, bytes_of = results["step"], results["memory"]
    tokens = preset.tokens * preset.sequences
    rows = []
    for name, seconds in found["seconds"].items():
        slower = found["slower"].get(name)
        rows.append(
            [
                name,
                f"{seconds * 1e3:,.0f}",
                "1" if slower is None else f"{slower['median']:.2f} ({slower['least']:.2f} to {slower['most']:.2f})",
                f"{bytes_of[name] / 2**20:,.0f}",
                f"{found['flops'][name] / 1e9:,.1f}",
                f"{found['flops'][name] / seconds / results['ceiling']:.0%}",
                "" if slower is None else f"{found['first_loss_differs_by'][name]:.0e}",
                f"{found['fvu_after'][name]:.4f}",
                f"{tokens / seconds:,.0f}",
            ]
        )
    head = ["trainer", "ms a step", "times ours", "peak memory, MiB", "GFLOP", "share of ceiling"]
    head += ["first loss differs by"]
    head += [f"FVU after {found['steps']} steps ({found['fvu_before']:.4f} before)", "tokens/s"]
    eight = results["together"]
    hours = STILL_TOKENS / tokens * results["one"] / 3600
    return (
        f"{table(head, rows)}\n\n"
        f"With the source model's forward, one hookpoint (layer {preset.hookpoint}): {results['one']:.3f} s a step of "
        f"{tokens:,} tokens; an epoch of STILL {hours * 3600:,.0f} s, ${hours * DOLLARS_AN_HOUR:.2f}.\n"
        f"8 hookpoints (layers {', '.join(map(str, eight['hookpoints']))} of {preset.layers}): "
        f"{eight['seconds']['one pass']:.3f} s a step in one pass, {eight['seconds']['8 runs']:.3f} s in 8 runs: "
        f"{eight['share']['median']:.2f} ({eight['share']['least']:.2f} to {eight['share']['most']:.2f})."
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks stage1", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each")
    parser.add_argument("--memory-of", metavar="CONTESTANT", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    preset = PRESETS[args.preset]
    if args.memory_of:
        print(json.dumps(memory(preset, args.memory_of)))
        return
    results: dict[str, Any] = {"hardware": hardware(), "preset": args.preset}
    results["ceiling"] = ceiling(torch.float32, device())
    results["step"] = compare(preset, args.repeats)
    own = ["stage1", "--preset", args.preset, "--memory-of"]
    results["memory"] = {name: in_fresh_process("benchmarks", *own, name) for name in results["step"]["seconds"]}
    results["together"] = together(preset, max(3, args.repeats // 2))
    results["one"] = seconds_of_run(preset, [preset.hookpoint])
    print(f"{results['hardware']}; ceiling {results['ceiling'] / 1e9:,.0f} GFLOP/s\n\n{report(preset, results)}")
    print(json.dumps(results))
