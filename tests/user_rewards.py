"""Reward functions as users write them, well and badly; test_limited_rewards.py has them called."""

import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy


def brevity(completions: list[Any], **columns: Any) -> Any:
    return [-len(text) for text in completions]


def pid(completions: list[Any], **columns: Any) -> Any:
    return [os.getpid()] * len(completions)


def matches(completions: list[Any], answer: list[str], level: list[float], **columns: Any) -> Any:
    return [float(text == gold) * weight for text, gold, weight in zip(completions, answer, level, strict=True)]


def given(completions: list[Any], **columns: Any) -> Any:
    Path(os.environ["GIVEN"]).write_text(json.dumps({"completions": completions, **columns}))
    return [0] * len(completions)


def numbers(completions: list[Any], **columns: Any) -> Any:
    return [True, Fraction(1, 2), Decimal("0.25"), numpy.float32(0.125), numpy.int64(7), None][: len(completions)]


def array(completions: list[Any], **columns: Any) -> Any:
    return numpy.arange(len(completions)) / 2


async def later(completions: list[Any], **columns: Any) -> Any:
    await asyncio.sleep(0.01)
    return [0.75] * len(completions)


def no_numbers(completions: list[Any], **columns: Any) -> Any:
    return [1.5, math.nan, math.inf, "2", b"2", [2], object(), None, 10**400, 2j]


def prints(completions: list[Any], **columns: Any) -> Any:
    print('{"values": [9]}')
    sys.stdout.write("no line end")
    sys.__stdout__.write("more\n")
    os.write(1, b'{"values": [8]}\n')
    subprocess.run(["echo", '{"values": [7]}'])
    return [float(sys.stdin.read() == "")] * len(completions)


def sleeps(completions: list[Any], **columns: Any) -> Any:
    if "sleep" in completions:
        time.sleep(1000)
    return [1.0] * len(completions)


def counts(completions: list[Any], **columns: Any) -> Any:
    if "count" in completions:
        while True:
            pass
    return [1.0] * len(completions)


def powers(completions: list[Any], **columns: Any) -> Any:
    if "power" in completions:
        return [9**9**9]
    return [1.0] * len(completions)


def spares_nobody(completions: list[Any], **columns: Any) -> Any:
    if "catch" in completions:
        while True:
            with contextlib.suppress(BaseException):
                time.sleep(1000)
    return [1.0] * len(completions)


def raises(completions: list[Any], **columns: Any) -> Any:
    if "bad" in completions:
        raise KeyError("no such thing \ud800")
    return [1.0] * len(completions)


def exits(completions: list[Any], **columns: Any) -> Any:
    if "bad" in completions:
        sys.exit("enough")
    return [1.0] * len(completions)


def dies(completions: list[Any], **columns: Any) -> Any:
    if "bad" in completions:
        os._exit(7)
    return [1.0] * len(completions)


def crashes(completions: list[Any], **columns: Any) -> Any:
    if "bad" in completions:
        os.kill(os.getpid(), 11)
    return [1.0] * len(completions)


def one_less(completions: list[Any], **columns: Any) -> Any:
    return [1.0] * (len(completions) - 1)


def one_more(completions: list[Any], **columns: Any) -> Any:
    return [1.0] * (len(completions) + 1)


def nothing(completions: list[Any], **columns: Any) -> Any:
    return None


def one_number(completions: list[Any], **columns: Any) -> Any:
    return 1.0


def needs_the_state(completions: list[Any], trainer_state: Any, **columns: Any) -> Any:
    return [1.0] * len(completions)


def starts_another(completions: list[Any], **columns: Any) -> Any:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    Path(os.environ["PID"]).write_text(str(other.pid))
    if "sleep" in completions:
        time.sleep(1000)
    return [1.0] * len(completions)


def forks(completions: list[Any], **columns: Any) -> Any:
    # The copy keeps the way back open, and has a session of its own.
    if os.fork() == 0:
        os.setsid()
        Path(os.environ["PID"]).write_text(str(os.getpid()))
        time.sleep(30)
        os._exit(0)
    time.sleep(1000)


def tells_its_pid(completions: list[Any], **columns: Any) -> Any:
    Path(os.environ["PID"]).write_text(str(os.getpid()))
    if "sleep" in completions:
        time.sleep(1000)
    if "power" in completions:
        return [9**9**9]
    return [1.0] * len(completions)


NUMBER = 3  # is no function
