"""Seconds of `import resa_hf` and of `resa-hf --help`, each in a fresh process.

python -m benchmarks import [--repeats 11]
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from .measure import hardware, seconds, table

LIMITS = {"import resa_hf": 0.3, "resa-hf --help": 0.6}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks import", description=__doc__)
    parser.add_argument("--preset", choices=["cpu"], default="cpu", help="no GPU has a part in it")
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args(argv)
    commands = {
        "python alone": [sys.executable, "-c", "pass"],
        "import resa_hf": [sys.executable, "-c", "import resa_hf"],
        "resa-hf --help": [str(Path(sys.executable).with_name("resa-hf")), "--help"],
    }
    rows, found = [], {}
    for name, command in commands.items():
        taken = [
            seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))  # noqa: B023
            for _ in range(args.repeats + 1)
        ][1:]
        found[name] = taken
        limit = f"{LIMITS[name]}" if name in LIMITS else ""
        rows.append([name, *(f"{value:.3f}" for value in (statistics.median(taken), min(taken), max(taken))), limit])
    print(f"{hardware()}\n\n{table(['', 'median, s', 'least', 'most', 'goal'], rows)}")
    print(json.dumps(found))
