"""Stage II: seconds, memory and loss of a step of `SAETuningTrainer` beside a plain loop and TRL's divergence.

    python -m benchmarks stage2 --preset cpu [--repeats 7]

All take turns on the same batches, from the same adapter, with the same SAE, LoRA, optimiser and dtype. The trainer's
time is that of its whole loop with its default settings: data, clipping and optimiser included. Losses are compared
step by step in a short run before. With "cached" the teacher's states come from the disk, as they do from the second
epoch on.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from resa_hf import SAETuningConfig, SAETuningTrainer
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.tiny.tokenizer import build_tokenizer

from .measure import ceiling, flops, hardware, in_fresh_process, peak_memory, ratios, resident, synchronize, table
from .plain_loop import PlainLoop
from .presets import PRESETS, Preset, lora

WARMUP, EQUAL_STEPS = 2, 5
MODES: dict[str, dict[str, Any]] = {
    "stop": {"sae_gradient": "stop"},
    "flow": {"sae_gradient": "flow"},
    "stop, cached": {"sae_gradient": "stop"},
    "flow, cached": {"sae_gradient": "flow"},
}
STILL_TOKENS = 5.9e6  # an epoch
DOLLARS_AN_HOUR = 3.5


class Turns(TrainerCallback):
    """Times each step of a Trainer; after it the others take their turn on the same batch."""

    def __init__(self, others: dict[str, PlainLoop], ids: torch.Tensor) -> None:
        self.others, self.ids = others, ids
        self.taken: dict[str, list[float]] = {name: [] for name in ("ours", *others)}
        self.losses: list[float] = []
        self.flops = 0
        self._stack = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == state.max_steps:  # the last is counted, not timed
            self._counter = self._stack.enter_context(FlopCounterMode(display=False))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "kl" in logs:
            self.losses.append(logs["kl"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        if state.global_step == state.max_steps:
            self._stack.close()
            self.flops = self._counter.get_total_flops()
            return
        self.taken["ours"].append(time.perf_counter() - self.started)
        for name, other in self.others.items():
            started = time.perf_counter()
            other.step(self.ids[(state.global_step - 1) % len(self.ids)][None])
            synchronize()
            self.taken[name].append(time.perf_counter() - started)
        self.started = time.perf_counter()


class Profiled(TrainerCallback):
    """Says where the time of the fourth step goes, the fifteen largest first."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.profiler = profile()
            self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            synchronize()
            self.profiler.stop()
            key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            print(self.profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=50))


def parts(preset: Preset) -> tuple[PeftModel, TopKSAE]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = get_peft_model(preset.model(device), lora(), autocast_adapter_dtype=False)
    sae = TopKSAE(
        preset.hidden_size,
        preset.latents,
        preset.k,
        hookpoint=f"layers.{preset.hookpoint}",
        dtype=preset.dtype,
        device=device,
    )
    return model, sae.requires_grad_(False)


def token_ids(preset: Preset, rows: int) -> torch.Tensor:
    ids = torch.randint(preset.vocabulary, (rows, preset.tokens), generator=torch.Generator().manual_seed(1))
    return ids.to("cuda" if torch.cuda.is_available() else "cpu")


def our_trainer(
    preset: Preset, rows: int, steps: int, folder: str, callback: Any, mode: str, logging_steps: int = 10
) -> SAETuningTrainer:
    """The trainer as a user gets it, on rows of token ids in their order."""
    model, sae = parts(preset)
    args = SAETuningConfig(
        output_dir=folder,
        learning_rate=1e-3,
        max_steps=steps,
        per_device_train_batch_size=1,
        logging_steps=logging_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        packing=False,
        max_length=preset.tokens,
        bf16=preset.dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        teacher_cache=f"{folder}/teacher" if "cached" in mode else None,
        **MODES[mode],
    )
    data = Dataset.from_dict({"input_ids": token_ids(preset, rows).tolist()})
    return SAETuningTrainer(model, args, data, sae=sae, processing_class=build_tokenizer(), callbacks=[callback])


def compare(preset: Preset, mode: str, repeats: int) -> dict[str, Any]:
    """One mode: seconds of a step, loss and FLOPs of ours, the plain loop and TRL's divergence."""
    rows = repeats + WARMUP
    skipped = rows if "cached" in mode else WARMUP  # the first epoch fills the cache
    gradient = MODES[mode]["sae_gradient"]
    others, ids = {}, token_ids(preset, rows)
    for name, loss in (("plain", "softmax"), ("trl", "trl")):
        model, sae = parts(preset)
        others[name] = PlainLoop(model, sae, preset.hookpoint, gradient, loss)
    with tempfile.TemporaryDirectory() as folder:
        equal = Turns({"plain": others["plain"]}, ids)
        our_trainer(preset, rows, EQUAL_STEPS + 1, folder, equal, mode, logging_steps=1).train()
        pairs = list(zip(equal.losses, others["plain"].losses, strict=False))
        turns = Turns(others, ids)
        our_trainer(preset, rows, skipped + repeats + 1, f"{folder}/timed", turns, mode).train()
    taken = {name: seconds[skipped : skipped + repeats] for name, seconds in turns.taken.items()}
    return {
        "seconds": {name: statistics.median(found) for name, found in taken.items()},
        "faster_than_plain": ratios(taken, "plain", "ours"),
        "faster_than_trl": ratios(taken, "trl", "ours"),
        "flops": {"ours": turns.flops, "plain": flops(lambda: others["plain"].step(turns.ids[:1]))},
        "largest_difference_of_loss": max(abs(ours / plain - 1) for ours, plain in pairs),
    }


def memory(preset: Preset, contestant: str, mode: str) -> int:
    """Bytes at the highest point of three steps, model and SAE included, imports not. For a fresh process."""
    before = resident()

    def run() -> None:
        if contestant == "ours":
            with tempfile.TemporaryDirectory() as folder:
                our_trainer(preset, 3, 3, folder, TrainerCallback(), mode).train()
            return
        model, sae = parts(preset)
        loop = PlainLoop(model, sae, preset.hookpoint, MODES[mode]["sae_gradient"], contestant)
        for row in token_ids(preset, 3):
            loop.step(row[None])

    return peak_memory(run, before)


def report(preset: Preset, results: dict[str, Any]) -> str:
    """The table, and what two epochs of STILL would take."""
    highest = results["ceiling"]
    rows = []
    for mode, found in results["modes"].items():
        bytes_of = found["memory"]
        rate = preset.tokens / found["seconds"]["ours"]
        hours = 2 * STILL_TOKENS / rate / 3600
        share = found["flops"]["ours"] / found["seconds"]["ours"] / highest
        fast, trl = found["faster_than_plain"], found["faster_than_trl"]
        rows.append(
            [
                mode,
                *(f"{found['seconds'][name]:.3f}" for name in ("ours", "plain", "trl")),
                f"{fast['median']:.2f} ({fast['least']:.2f} to {fast['most']:.2f})",
                f"{trl['median']:.2f}",
                f"{bytes_of['ours'] / 2**20:,.0f} / {bytes_of['plain'] / 2**20:,.0f} MiB"
                f" = {bytes_of['ours'] / bytes_of['plain']:.2f}",
                f"{share:.0%}",
                f"{found['largest_difference_of_loss']:.0e}",
                f"{rate:,.0f}",
                f"{hours * 3600:,.0f} s, ${hours * DOLLARS_AN_HOUR:.2f}",
            ]
        )
    head = [
        "gradient",
        "ours, s",
        "plain, s",
        "TRL's loss, s",
        "plain / ours",
        "TRL / ours",
        "peak memory, ours / plain",
    ]
    head += ["peak memory, ours / plain", "share of ceiling", "loss differs by", "tokens/s", "two epochs of STILL"]
    return table(head, rows)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks stage2", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--profile", action="store_true", help="only where the time of one of our steps goes, by mode")
    parser.add_argument("--memory-of", nargs=2, metavar=("CONTESTANT", "MODE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    preset = PRESETS[args.preset]
    if args.memory_of:
        print(json.dumps(memory(preset, *args.memory_of)))
        return
    if args.profile:
        for mode in args.modes:
            with tempfile.TemporaryDirectory() as folder:
                print(mode, flush=True)
                our_trainer(preset, 4, 5, folder, Profiled(), mode).train()
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {"hardware": hardware(), "preset": args.preset, "modes": {}}
    results["ceiling"] = ceiling(preset.dtype, device)
    for mode in args.modes:
        print(f"{mode} ...", file=sys.stderr)
        found = compare(preset, mode, args.repeats)
        own = ["stage2", "--preset", args.preset, "--memory-of"]
        found["memory"] = {
            name: in_fresh_process("benchmarks", *own, contestant, mode)
            for name, contestant in (("ours", "ours"), ("plain", "softmax"))
        }
        results["modes"][mode] = found
    print(f"{results['hardware']}; ceiling {results['ceiling'] / 1e9:,.0f} GFLOP/s\n\n{report(preset, results)}")
    print(json.dumps(results))
