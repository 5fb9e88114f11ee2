"""Starts tests/distributed_worker.py in two processes, and compares what runs leave with what one process leaves."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TESTS = Path(__file__).parent
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs the extra `deepspeed`"
)
# What a run is not to be compared by: times; and quantiles, which are means of those of each process' batches.
_OWN = ("runtime", "per_second", "total_flos", "_p50", "_p90", "_p99", "grad_norm_", "eval_loss")


def launch(program, arguments, processes=2, cwd=TESTS, timeout=280):
    """Runs a program under torchrun; returns what it printed. It must end well."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*start, *program, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def run_jobs(kind, jobs):
    """Runs `(stage, folder, settings)` one after the other in two processes."""
    launch([str(TESTS / "distributed_worker.py")], [kind, json.dumps([[s, str(f), x] for s, f, x in jobs])])


def told(folder):
    return json.loads((Path(folder) / "told.json").read_text())


def assert_logs_agree(folder, expected):
    ours, others = told(folder), told(expected)
    pairs = zip([*ours["log"], ours["evaluated"]], [*others["log"], others["evaluated"]], strict=True)
    for entry, other in pairs:
        names = {name for name in entry.keys() | other.keys() if not any(part in name for part in _OWN)}
        assert names <= entry.keys() & other.keys()
        for name in names:
            assert entry[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), (entry.get("step"), name)


def assert_weights_agree(folder, expected, pattern, atol=1e-5):
    """The files of a pattern are those that are expected, and their tensors, too, but for `atol` in each number."""
    paths = sorted(path.relative_to(expected) for path in Path(expected).glob(pattern))
    assert paths and paths == sorted(path.relative_to(folder) for path in Path(folder).glob(pattern))
    for path in paths:
        ours, others = load_file(Path(folder) / path), load_file(Path(expected) / path)
        assert ours.keys() == others.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, others[name], rtol=0, atol=atol, msg=f"{path} {name}")
