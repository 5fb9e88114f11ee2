"""How fast the explorer starts and answers, how much memory it takes, and whether visitors at once meet.

    OMP_NUM_THREADS=1 python benchmarks/explorer.py [--requests 500] [--output_dir DIR]

The app runs in a process of its own, on the tiny reasoner and an SAE of random weights. Start: seconds from the
process's start to the first page that is answered, median of 5. First token: of /solve on a warm server, from asking
to the first step of the stream, median of 20. Memory: the server's resident set every 25 of the mixed requests (solve,
look, latent, change, accuracy of 10), and its slope over all but the first 100, with a 95% interval. Visitors: 20 at
once, each with another problem, strength and seed; their answers must be those that each gets alone.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from scipy.stats import linregress, t

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from explorer_load import PROBLEMS, at_once, connect, megabytes, requests, seconds_to_first_token, write_sae  # noqa: E402
from explorer_server import ExplorerServer  # noqa: E402

EVERY, SETTLING = 25, 100


def start(folder: Path) -> tuple[ExplorerServer, float]:
    """The explorer, and the seconds until it answered."""
    started = time.perf_counter()
    server = ExplorerServer([], folder / "log.txt", RESA_SAES=str(folder / "sae"), HF_HUB_OFFLINE="1")
    return server, time.perf_counter() - started


def memory(server: ExplorerServer, count: int) -> list[tuple[int, float]]:
    """Requests so far, and MB."""
    client, found = connect(server.url), [(0, megabytes(server.process.pid))]
    for number, request in enumerate(islice(requests(), count), start=1):
        client.predict(**request)
        if number % EVERY == 0:
            found.append((number, megabytes(server.process.pid)))
    return found


def slope(points: list[tuple[int, float]]) -> tuple[float, float]:
    """KB a request, once it has settled, and the half width of its 95% interval."""
    late = [point for point in points if point[0] >= SETTLING]
    line = linregress(*zip(*late, strict=True))
    return 1000 * line.slope, 1000 * line.stderr * t.ppf(0.975, len(late) - 2)


def visitors(url: str, count: int = 20) -> dict[str, float]:
    """Seconds until all have their answer, errors, and answers that are not those of the same request alone."""
    visits: list[dict[str, Any]] = [
        {"api_name": "/solve", "problem": PROBLEMS[n % len(PROBLEMS)], "seed": n, "strength": round(n / 10 - 1, 1)}
        for n in range(count)
    ]
    started = time.perf_counter()
    together = at_once(url, visits)
    seconds = time.perf_counter() - started
    client = connect(url)
    errors = sum(isinstance(answer, Exception) for answer in together)
    wrong = sum(client.predict(**visit) != answer for visit, answer in zip(visits, together, strict=True))
    return {"seconds": seconds, "errors": errors, "other answers": wrong}


def plot(points: list[tuple[int, float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(*zip(*points, strict=True), marker="o", markersize=3)
    axes.set(xlabel="requests", ylabel="resident set, MB", ylim=(0, 1.1 * max(mb for _, mb in points)))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500, help="For the memory.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/explorer"), help="For JSON and the plot.")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    load, starts = [os.getloadavg()[0]], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sae(folder / "sae")
        for _ in range(5):
            server, seconds = start(folder)
            starts.append(seconds)
            server.kill()
        server, _ = start(folder)
        with server:
            client = connect(server.url)
            seconds_to_first_token(client, 0)  # after the server's own warming up
            first = [seconds_to_first_token(client, seed) for seed in range(20)]
            together = visitors(server.url)
            points = memory(server, args.requests)
    growth, margin = slope(points)
    load.append(os.getloadavg()[0])
    rows = [
        ("first page, s", f"{statistics.median(starts):.2f} ({min(starts):.2f} to {max(starts):.2f})"),
        ("first token, s", f"{statistics.median(first):.3f} ({min(first):.3f} to {max(first):.3f})"),
        ("20 visitors at once, s", f"{together['seconds']:.1f}"),
        ("errors; other answers", f"{together['errors']}; {together['other answers']}"),
        ("memory, MB", f"{points[0][1]:.0f}; most {max(mb for _, mb in points):.0f}; at the end {points[-1][1]:.0f}"),
        ("growth, KB a request", f"{growth:.1f} ± {margin:.1f}"),
        ("load, before and after", ", ".join(f"{one:.1f}" for one in load)),
    ]
    print("| measured | |\n|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    numbers = {"starts": starts, "first_token": first, "visitors": together, "memory": points, "load": load}
    (args.output_dir / "explorer.json").write_text(json.dumps(numbers, indent=1))
    plot(points, args.output_dir / "memory.png")


if __name__ == "__main__":
    main()
