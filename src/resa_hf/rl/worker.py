"""A process for a user's function, which `limited` starts and talks to in lines of JSON. Imports nothing of ours."""

import asyncio
import faulthandler
import importlib
import inspect
import json
import math
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO

_LONGEST = 1000  # characters of an error
_GRACE = 5.0  # s after a limit, at which our caller, were it alive, would long have stopped us


def _own_channels() -> tuple[TextIO, TextIO]:
    """Where requests come from and replies go to; what the function reads and prints is kept away from both."""
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return requests, replies


def _read(requests: TextIO, received: "queue.SimpleQueue[str]") -> None:
    for line in requests:
        received.put(line)
    # The caller has ended. Whatever the function is at, it ends too, with all that it started.
    os.killpg(0, signal.SIGKILL)


def _imported(path: str) -> tuple[Callable[..., Any] | None, str | None]:
    """The function, or what is wrong."""
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except BaseException as error:  # whatever the module does, SystemExit too
        return None, f"importing {module!r} raised {type(error).__name__}: {error}"
    return (function, None) if callable(function) else (None, f"module {module!r} has no function {name!r}")


def _number(value: Any) -> float | None:
    if value is None:
        return None
    try:
        return math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def _called(function: Callable[..., Any], columns: dict[str, Any]) -> dict[str, Any]:
    try:
        returned = function(**columns)
        if inspect.iscoroutine(returned):
            returned = asyncio.run(returned)
        return {"values": [_number(value) for value in returned]}
    except BaseException as error:  # whatever the function does, SystemExit too
        return {"error": f"raised {type(error).__name__}: {error}"[:_LONGEST]}


def _within(seconds: float, function: Callable[..., Any], *values: Any) -> Any:
    """What a function returns. A watchdog thread in C ends a process stuck in C whose caller was killed."""
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(seconds + _GRACE, exit=True, file=nowhere)
        returned = function(*values)
        faulthandler.cancel_dump_traceback_later()
    return returned


def main() -> None:
    """Reads where the function is, then columns, a line each; answers each with a line, until its input ends."""
    requests, replies = _own_channels()
    received: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests, received), daemon=True).start()
    task = json.loads(received.get())
    sys.path[:] = dict.fromkeys(task["sys_path"])
    function, problem = _within(task["import_seconds"], _imported, task["function"])
    print(json.dumps({"error": problem}), file=replies, flush=True)
    if function is None:
        os._exit(1)  # the usual way out would wait for the thread that reads
    while True:
        reply = _within(task["seconds"], _called, function, json.loads(received.get()))
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
