"""Times, memory and the machine's own ceiling, measured alike for every contestant."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[[], object]


def synchronize() -> None:
    """Waits for the device, where there is one to wait for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(step: Step) -> float:
    synchronize()
    started = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - started


def interleaved(steps: dict[str, Step], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each contestant, all taking turns, so that what else the machine does hits them alike."""
    for _ in range(warmup):
        for step in steps.values():
            step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            taken[name].append(seconds(step))
    return taken


def ratios(taken: dict[str, list[float]], slow: str, fast: str) -> dict[str, float]:
    """How many times `slow` takes what `fast` takes, turn by turn: median, least and most."""
    pairs = [a / b for a, b in zip(taken[slow], taken[fast], strict=True)]
    return {"median": statistics.median(pairs), "least": min(pairs), "most": max(pairs)}


def flops(step: Step) -> int:
    """Floating-point operations of the matrix products of a step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large matrix product here, best of five: what no step can exceed."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    left @ right
    return 2 * size**3 / min(seconds(lambda: left @ right) for _ in range(5))


def peak_memory(step: Step, before: int = 0) -> int:
    """Bytes at the highest point of a step: of the device, or else resident ones of this process above `before`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest point so far
    step()
    return resident("VmHWM") - before


def resident(which: str = "VmRSS") -> int:
    """Bytes of this process that are in memory now (`VmRSS`) or were at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def in_fresh_process(module: str, *arguments: str) -> Any:
    """What `python -m module` prints last, read as JSON: of memory, nothing of another contestant stays."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, check=True, env=os.environ
    )
    return json.loads(done.stdout.splitlines()[-1])


def hardware() -> str:
    """The machine in words, and the date."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(": ")[2] if models else platform.processor()
        name += f", {torch.get_num_threads()} threads"
    load = os.getloadavg()[0]
    return f"{datetime.now(UTC):%Y-%m-%d}, {name}, torch {torch.__version__}, load {load:.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
