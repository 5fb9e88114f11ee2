"""Work in a forked process that is killed at one of its file operations."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

# What Python tells its audit hooks of: before the operation is done.
_OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def run_killed(work: Callable[[], object], folder: Path, at: int | None = None) -> int | None:
    """Runs `work` in a child that gets SIGKILL just before its `at`-th file operation below `folder`, counted from 1.

    Returns how many of them it did until its end, `None` if it was killed.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with os.fdopen(reading) as pipe:
            told = pipe.read()
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
        return None if os.WIFSIGNALED(status) else int(told)
    seen = 0

    def hook(event, args):
        nonlocal seen
        if event in _OPERATIONS and str(folder) in str(args[0]):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    code = 1
    try:
        sys.addaudithook(hook)
        work()
        os.write(writing, str(seen).encode())
        code = 0
    finally:
        os._exit(code)
