"""SIGTERM, with which schedulers announce that a machine will be taken away: an end with a code of its own.

Needs the standard library alone, so that a command handles the signal from its first line on.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

# EX_TEMPFAIL of sysexits.h: nothing is wrong, try again.
EXIT_CODE = 75


class Preempted(SystemExit):
    """SIGTERM has come: the process ends with status 75. What is finished is kept, and a rerun goes on from there."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)

    def __reduce__(self) -> tuple[type["Preempted"], tuple[()]]:
        return Preempted, ()  # from a worker process to its parent


class Preemption:
    """
    A handler of SIGTERM that raises [`Preempted`] at once, or waits while a step of training is to be finished.

    It may raise anywhere, since every file of ours is written whole or not at all. The signal stays known: whatever
    asks [`check_preemption`] later is stopped there.
    """

    def __init__(self) -> None:
        self.received = False
        self._held = 0
        self._process = os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked helper, of a data loader or such, has nothing to save
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = True
        if not self._held:
            raise Preempted

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """In the block the signal is noted, and raises nothing."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1


def handle_preemption() -> None:
    """Makes SIGTERM end this process by [`Preempted`]. Elsewhere than in a main thread nothing can be handled."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, Preemption())


@contextlib.contextmanager
def preemption_handled() -> Iterator[None]:
    """SIGTERM ends the block by [`Preempted`]; afterwards it does what it did before."""
    before = signal.getsignal(signal.SIGTERM)
    handle_preemption()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def preemption_handler() -> Preemption | None:
    """What handles SIGTERM in this process, if it is ours."""
    handler = signal.getsignal(signal.SIGTERM)
    return handler if isinstance(handler, Preemption) else None


def check_preemption() -> None:
    """Raises [`Preempted`] if SIGTERM has come, and was held back."""
    handler = preemption_handler()
    if handler is not None and handler.received:
        raise Preempted


@contextlib.contextmanager
def preempting_workers() -> Iterator[None]:
    """What ends the block early by [`Preempted`] is told to the processes that this one has started: a scheduler may
    have signalled the first one only, and waiting for the others would take as long as their jobs."""
    try:
        yield
    except Preempted:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
