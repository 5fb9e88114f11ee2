"""A process that was started to do a part of a command's work ends when the command is killed."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

# What sweep and run start, with a job that says who does it; and what torchrun starts.
WORKERS = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from resa_hf.experiment.schedule import start_worker

def work():
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    pool = ProcessPoolExecutor(2, get_context("spawn"), start_worker, (1,))
    futures = [pool.submit(work) for _ in range(2)]
    [future.result() for future in futures]
"""
LAUNCHED = """
import os, subprocess, sys, time
command = [sys.executable, "-c", "import os, time; from resa_hf import cli; cli.main(['--version']);"
           "print(os.getpid(), flush=True); time.sleep(60)"]
subprocess.run(command, env={**os.environ, "LOCAL_RANK": "1"}, start_new_session=True)
"""


def ended(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("script", "number"), [pytest.param(WORKERS, 2, marks=pytest.mark.slow), (LAUNCHED, 1)], ids=["pool", "launched"]
)
def test_what_a_killed_process_has_started_ends_too(tmp_path, script, number):
    path = tmp_path / "parent.py"
    path.write_text(script)
    parent = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True)
    told = (line.strip() for line in parent.stdout)
    workers = [int(next(line for line in told if line.isdecimal())) for _ in range(number)]
    try:
        time.sleep(1.5)  # while the parent lives, nothing ends them
        assert not any(map(ended, workers))
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 10
        while not all(map(ended, workers)):
            assert time.monotonic() < deadline, "they live on"
            time.sleep(0.05)
    finally:
        for worker in workers:
            if not ended(worker):
                os.kill(worker, signal.SIGKILL)
