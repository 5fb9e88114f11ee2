"""Out of memory, recognised in what others raise.

Needs the standard library alone: what runs out of it may be the import of torch.
"""

import contextlib
import errno
import gc
import io
import re
from collections.abc import Callable

# What torch says on the CPU, where it has no error of its own for it; CUDA's libraries; and the system's loader.
_SAYINGS = (
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "out of memory",
    "ALLOC_FAILED",
    "can't start new thread",
    "failed to map segment",
    "could not create a primitive",  # oneDNN, which says no more
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, says that memory was full."""
    cause: BaseException | None = error
    while cause is not None:
        known = isinstance(cause, RuntimeError | ImportError) and any(saying in str(cause) for saying in _SAYINGS)
        if known or isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM):
            return True
        cause = cause.__cause__
    return False


def what_was_asked(error: BaseException) -> str:
    """The sentence of an error that says how much memory could not be had."""
    # "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."
    sentences = re.split(r"(?<=\.)\s+", str(error).partition("\n")[0])
    told = [sentence for sentence in sentences if any(saying in sentence for saying in _SAYINGS)]
    amount = next((sentence for sentence in sentences if "ried to allocate" in sentence), None)
    asked = f"{told[0]} {amount}" if told and amount and amount not in told else (told or sentences)[0]
    return asked.strip().rstrip(".") or type(error).__name__


def predicted_memory(dry_run: Callable[[], None]) -> str:
    """What a command's `--dry_run` prints of memory, by part and in GiB; empty where it cannot tell."""
    gc.collect()  # of what has just failed
    printed = io.StringIO()
    with contextlib.suppress(Exception), contextlib.redirect_stdout(printed):
        dry_run()
    _, found, lines = printed.getvalue().rpartition("Predicted memory")
    return f"\nPredicted memory{lines.rstrip()}" if found else ""
