"""The last few things that took long to load."""

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

import torch

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Keeps what was used last. A value is loaded once, for all threads that wait for it; others do not wait.

    Args:
        count (`int`): how many are kept; those that are being loaded count.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._values: OrderedDict[Hashable, Future[Value]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, load: Callable[[], Value]) -> Value:
        """The value of a key, by `load()` if it is not there; what that raises is raised, and nothing is kept."""
        mine: Future[Value] = Future()
        with self._lock:
            future = self._values.setdefault(key, mine)
            self._values.move_to_end(key)
            dropped = len(self._values) > self._count
            if dropped:
                self._values.popitem(last=False)
        if dropped:
            gc.collect()  # modules with hooks and adapters refer to each other
            torch.accelerator.empty_cache() if torch.accelerator.is_available() else None
        if future is mine:
            self._load(key, load, mine)
        return future.result()

    def _load(self, key: Hashable, load: Callable[[], Value], future: Future[Value]) -> None:
        try:
            future.set_result(load())
        except BaseException as error:
            with self._lock:
                if self._values.get(key) is future:
                    del self._values[key]
            future.set_exception(error)
