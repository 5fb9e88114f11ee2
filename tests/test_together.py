"""Several processes and one list of tasks: each is done once, also where a process is killed in the middle of one."""

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

from resa_hf.experiment.together import Task, work_through

# Each task adds a line with its name and process; `slow` waits in the process that is told so.
WORKER = """
import os, sys, time
from functools import partial
from pathlib import Path
from resa_hf.experiment.together import Task, work_through

root, waits, names = Path(sys.argv[1]), sys.argv[2] == "waits", sys.argv[3:]

def do(name):
    with (root / "begun").open("a") as file:
        file.write(f"{name} {os.getpid()}\\n")
    if name == "slow" and waits:
        time.sleep(600)
    if name.startswith("quick"):
        time.sleep(0.2)
    (root / name).write_text(str(os.getpid()))

def unless_done(name):
    if not (root / name).exists():
        do(name)

failed = work_through([Task(name, partial(unless_done, name)) for name in names], root / "locks", 0.0, pause=0.05)
print(sorted(failed))
"""


def start(root, waits, *names):
    command = [sys.executable, "-c", WORKER, str(root), "waits" if waits else "goes on", *names]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def begun(root: Path) -> list[list[str]]:
    path = root / "begun"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_processes_do_each_task_once_and_both_end_when_all_are_done(tmp_path):
    names = [f"quick{number}" for number in range(8)]
    workers = [start(tmp_path, False, *names) for _ in range(2)]
    assert [worker.communicate(timeout=60)[0] for worker in workers] == ["[]\n", "[]\n"]
    assert sorted(name for name, _ in begun(tmp_path)) == names


def test_what_a_killed_process_held_is_done_by_another(tmp_path):
    first = start(tmp_path, True, "slow", "other")
    wait_until(lambda: begun(tmp_path))
    second = start(tmp_path, False, "slow", "other")
    wait_until((tmp_path / "other").exists)
    time.sleep(0.3)
    assert second.poll() is None and not (tmp_path / "slow").exists()  # it waits for what the first one holds
    os.kill(first.pid, signal.SIGKILL)
    assert second.communicate(timeout=60)[0] == "[]\n"
    first.communicate()
    assert (tmp_path / "slow").read_text() == str(second.pid)
    assert begun(tmp_path) == [["slow", str(first.pid)], ["other", str(second.pid)], ["slow", str(second.pid)]]


def test_a_failure_is_written_down_and_takes_along_what_needs_it(tmp_path):
    ran = []

    def fail():
        ran.append("bad")
        raise ValueError("there is no such layer")

    tasks = [
        Task("bad", fail),
        Task("needs bad", lambda: ran.append("never"), frozenset({"bad"})),
        Task("good", lambda: ran.append("good")),
        Task("needs good", lambda: ran.append("needs good"), frozenset({"good"})),
    ]
    since = time.time() - 1
    failed = work_through(tasks, tmp_path, since)
    assert failed == {"bad": "there is no such layer", "needs bad": "there is no such layer"}
    assert ran == ["bad", "good", "needs good"]
    # Another process that was started beside it does not try again; one that is started later does.
    assert work_through(tasks[:1], tmp_path, since) == {"bad": "there is no such layer"} and ran.count("bad") == 1
    assert "bad" in work_through(tasks[:1], tmp_path, time.time() + 60) and ran.count("bad") == 2
    assert work_through([Task("bad", lambda: None)], tmp_path, time.time() + 60) == {}
    assert work_through([Task("bad", lambda: None)], tmp_path, since) == {}


def test_of_several_ways_to_one_thing_one_that_is_done_is_enough(tmp_path):
    ran = []

    def fail():
        raise ValueError("no such file")

    def task(name, *needs, run=None):
        return Task(name, run or (lambda: ran.append((name, needs))), frozenset(needs))

    tasks = [
        task("data a", run=fail), task("base", "data a"), task("a", "data a", "base"),
        task("data b"), task("base", "data b"), task("b", "data b", "base"),
        task("data c"), task("base", "data c"), task("c", "data c", "base"),
    ]  # fmt: skip
    assert work_through(tasks, tmp_path, 0.0, pause=0.01) == dict.fromkeys(["data a", "a"], "no such file")
    assert [needs for name, needs in ran if name == "base"] == [("data b",)]
    assert {name for name, _ in ran} == {"data b", "base", "b", "data c", "c"}
    # Without any that is done, what needs it fails.
    assert set(work_through(tasks[:3], tmp_path / "other", 0.0, pause=0.01)) == {"data a", "base", "a"}


def test_a_mistake_in_the_code_is_no_failure_of_the_task(tmp_path):
    def broken():
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        work_through([Task("a", broken)], tmp_path, 0.0)
    assert work_through([Task("a", lambda: None)], tmp_path, 0.0) == {}  # its lock is free again


def test_what_a_failed_task_held_is_gone_before_the_next_begins(tmp_path):
    class Model:
        pass

    seen = []

    def fail():
        model = Model()
        model.itself = model  # as hooks and callbacks refer to what they belong to
        seen.append(weakref.ref(model))
        raise ValueError("no")

    tasks = [Task("first", fail), Task("second", lambda: seen.append(seen[0]()))]
    gc.disable()
    try:
        assert work_through(tasks, tmp_path, since=time.time()) == {"first": "no"}
    finally:
        gc.enable()
    assert seen[1] is None
