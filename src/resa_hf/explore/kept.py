"""The last few things that took long to load."""

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Keeps what was used last. A value is loaded once, for all threads that wait for it.

    Args:
        count (`int`): how many are kept; while another is loaded there is one more.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._looking = threading.Lock()
        self._loading = threading.Lock()

    def get(self, key: Hashable, load: Callable[[], Value]) -> Value:
        """The value of a key, by `load()` if it is not there; what that raises is raised, and nothing is kept."""
        found = self._found(key)
        if found is not None:
            return found
        with self._loading:
            found = self._found(key)
            if found is not None:
                return found
            value = load()
            with self._looking:
                self._values[key] = value
                dropped = len(self._values) > self._count
                if dropped:
                    self._values.popitem(last=False)
        if dropped:
            gc.collect()  # modules with hooks and adapters refer to each other
            torch.accelerator.empty_cache() if torch.accelerator.is_available() else None
        return value

    def values(self) -> list[Value]:
        """All that is kept."""
        with self._looking:
            return list(self._values.values())

    def _found(self, key: Hashable) -> Value | None:
        with self._looking:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)
