"""A reward function of the user's own, in a process that can be stopped."""

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_IMPORT_LIMIT = 300.0  # s; torch on a busy machine takes a minute
_MOST_WARNINGS = 5


class LimitedReward:
    r"""
    A reward that calls a function of one's own in a process of its own, under a limit of time.

    The function is called as [`~trl.GRPOTrainer`] calls it, `brevity(prompts=..., completions=..., **columns)`, except
    that what is not JSON (`trainer_state`, `log_extra`, `log_metric`, images) is left out. It may be asynchronous. Its
    module is found where the caller's are, or in the current folder. What it prints goes to the standard error.

    It never raises for a batch. When the function is too slow, even in the middle of an operation in C, its process
    and those that it started are killed, and the batch scores 0; so too when it raises, when it ends its process, and
    when it returns the wrong number of values. The next batch finds a new process. A single value that is no finite
    number scores 0; `None` stays `None`, TRL's "no opinion". For each batch two metrics are logged:
    `rewards/<name>/timed_out`, 0 or 1, and `rewards/<name>/failed`, the share of completions that scored 0 for one of
    the other reasons.

    Args:
        path (`str`):
            Where the function is: `my_package.rewards.brevity`. Its last part is the reward's name.
        seconds (`float`):
            The limit for a batch.

    Raises:
        `ValueError`: if there is no such function, or its module cannot be imported.
    """

    def __init__(self, path: str, seconds: float) -> None:
        self.__name__ = path.rpartition(".")[2]
        self._path = path
        self._seconds = seconds
        self._warned: set[str] = set()
        self._process, problem = self._start()
        if problem:
            raise ValueError(f"The reward function {path!r} cannot be used: {problem}.")

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Returns a reward for each completion; see the class."""
        columns |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        values, problem = self._values(_as_json(columns), len(completions))
        timed_out = values is None and not problem
        if values is None:
            values = [0.0 if timed_out else math.nan] * len(completions)
        failed = [value is not None and not math.isfinite(value) for value in values]
        if timed_out:
            self._warn(f"took more than {self._seconds:g} s for a batch, and was stopped")
        elif any(failed):
            self._warn(problem or "returned something else than finite numbers")
        if log_metric is not None and completions:
            log_metric(f"rewards/{self.__name__}/timed_out", float(timed_out))
            log_metric(f"rewards/{self.__name__}/failed", sum(failed) / len(failed))
        return [0.0 if bad else value for value, bad in zip(values, failed, strict=True)]

    def _values(self, request: str, wanted: int) -> tuple[list[float | None] | None, str]:
        """The values, NaN where there is no number, or else what the problem was: nothing at all if it is the time."""
        if self._process.poll() is not None:
            self._process, problem = self._start()
            if problem:
                return None, problem
        reply = _exchange(self._process, request, self._seconds)
        if reply is None:
            return None, ""
        if not reply:
            return None, f"ended its process ({_stop(self._process)})"
        answer = json.loads(reply)
        if "error" in answer:
            return None, answer["error"]
        values: list[float | None] = answer["values"]
        if len(values) != wanted:
            return None, f"returned {len(values)} values for {wanted} completions"
        return values, ""

    def _start(self) -> tuple[subprocess.Popen[str], str]:
        """The process, and what is wrong with it, if anything is."""
        # -P: our own folder must not come before the standard library's modules. A session of its own, so that Ctrl-C
        # does not reach it, and that what it starts can be killed with it.
        process = subprocess.Popen(
            [sys.executable, "-u", "-P", str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        places = [*(place or os.getcwd() for place in sys.path), os.getcwd()]
        limits = {"seconds": self._seconds, "import_seconds": _IMPORT_LIMIT}
        task = {"function": self._path, "sys_path": places, **limits}
        reply = _exchange(process, json.dumps(task), _IMPORT_LIMIT)
        if reply is None:
            problem = f"its module was not imported within {_IMPORT_LIMIT:g} s"
        else:
            problem = json.loads(reply)["error"] if reply else "importing its module ended the process"
        if problem:
            _stop(process)
        return process, problem

    def _warn(self, problem: str) -> None:
        # Once each, and not for ever: an exception may name what it was given.
        if problem not in self._warned and len(self._warned) < _MOST_WARNINGS:
            self._warned.add(problem)
            logger.warning("The reward function %s %s. What it did not score counts 0.", self._path, problem)


def _as_json(columns: dict[str, Any]) -> str:
    parts = []
    for name, values in columns.items():
        try:
            parts.append(f"{json.dumps(name)}: {json.dumps(values)}")
        except (TypeError, ValueError, RecursionError):
            continue
    return f"{{{', '.join(parts)}}}"


def _exchange(process: subprocess.Popen[str], request: str, seconds: float) -> str | None:
    """The line that answers a line: empty if the process has ended, `None` if it took too long and was stopped."""
    replies: list[str] = []

    def exchange() -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            replies.append(process.stdout.readline())
        except (OSError, ValueError):  # it ended before it had read everything
            replies.append("")

    # In a thread, as both writing and reading may block: the function need not read, and what it started may go on.
    thread = threading.Thread(target=exchange, daemon=True)
    thread.start()
    thread.join(seconds)
    if not replies:
        _stop(process)
        return None
    return replies[0]


def _stop(process: subprocess.Popen[str]) -> str:
    """Kills a process with all that it started, and returns how it had ended, if it had."""
    try:
        code = process.wait(0.1)
    except subprocess.TimeoutExpired:
        code = None
    # Its group is there as long as anything that it started is.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return "it closed its output" if code is None else f"exit status {code}"
