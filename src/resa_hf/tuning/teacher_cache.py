"""The teacher's states on the disk: from the second epoch on they are read there, and the teacher does not run.

One file for one teacher, data set and set of settings, whose hash is its name, so that other runs with them (other
seeds, learning rates, SAEs) read it, too. Nothing in it is executed, and a file that was cut is made anew.
"""

import hashlib
import mmap
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from ..writing import writing


def row_key(input_ids: Sequence[int]) -> str:
    """What a row is known by: a hash of its tokens, whatever its place in an epoch."""
    return hashlib.blake2b(np.asarray(input_ids, dtype=np.int64).tobytes(), digest_size=16).hexdigest()


def teacher_fingerprint(teacher: nn.Module, **settings: Any) -> str:
    """
    A hash of the weights that do not train, the versions and `settings`: all that the states depend on, but the data.

    Args:
        teacher (`torch.nn.Module`): the model that runs as the teacher; adapters that train are off in it.
        settings: more that they depend on, such as the precision; with a `repr` that tells all.
    """
    told = hashlib.sha256(repr((sorted(settings.items()), torch.__version__, transformers.__version__)).encode())
    for name, tensor in [*teacher.named_parameters(), *teacher.named_buffers()]:
        if not tensor.requires_grad:
            told.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            told.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return told.hexdigest()


class _Place(NamedTuple):
    number: int
    start: int  # in bytes
    tokens: int


class TeacherCache:
    """
    States of the rows of a data set, written as they come, `[tokens, width]` a row and width.

    A row counts as written when its states are on the disk: a process that is killed loses at most the row at hand.
    Processes may share a file: what they write of a row is the same.

    Args:
        folder (`str` or `Path`):
            Made if missing; the file in it is kept when training ends.
        fingerprint (`str`):
            Of [`teacher_fingerprint`].
        rows (iterable of sequences of `int`):
            Token ids of the data set.
        examples (sequence of `torch.Tensor`):
            States of some batch, whose widths and dtypes all have: those that the LM head reads, and those at the
            hookpoint where they are shared.

    Raises:
        `OSError`: if the folder cannot be written, or has too little room; the message says how much is needed.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: str,
        rows: Iterable[Sequence[int]],
        examples: Sequence[Tensor],
    ) -> None:
        self._kinds = [(state.shape[-1], state.dtype) for state in examples]
        self._places: dict[str, _Place] = {}
        end = 0
        for ids in rows:
            key = row_key(ids)
            if key not in self._places:
                place = self._places[key] = _Place(len(self._places), end, len(ids))
                end += sum(self._sizes(place))
        told = hashlib.sha256(repr((fingerprint, list(self._places), self._kinds)).encode()).hexdigest()
        self.path = Path(folder, f"teacher-{told[:32]}.bin")
        self.bytes = end + len(self._places)
        self._map = self._open()
        every = torch.frombuffer(self._map, dtype=torch.uint8)
        # A byte a row behind the states: whether it is there.
        self._states, self._written = every[:end], every[end:]

    def _open(self) -> mmap.mmap:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        there = self.path.stat().st_size if self.path.exists() else 0
        if there != self.bytes:
            room = shutil.disk_usage(self.path.parent).free
            if room + there < self.bytes:
                raise OSError(
                    f"teacher_cache needs {self.bytes / 1e9:,.2f} GB in {self.path.parent}, which has "
                    f"{room / 1e9:,.2f} GB free: name another folder, or leave teacher_cache out."
                )
            self.path.unlink(missing_ok=True)
        with writing(self.path), open(self.path, "a+b") as file:
            # All room at once: a map that finds none later ends the process without a word.
            if sys.platform == "linux":
                os.posix_fallocate(file.fileno(), 0, self.bytes)
            file.truncate(self.bytes)
            return mmap.mmap(file.fileno(), self.bytes)

    @property
    def complete(self) -> bool:
        """Whether every row is there."""
        return bool(self._written.all())

    def _sizes(self, place: _Place) -> list[int]:
        """Bytes of a row's states, each up to where any dtype may begin."""
        return [-(-place.tokens * width * dtype.itemsize // 8) * 8 for width, dtype in self._kinds]

    def read(self, keys: Sequence[str], length: int) -> list[Tensor] | None:
        """
        The states of a batch, `[batch, length, width]` for each width, zero behind a row's end.

        Args:
            keys (sequence of `str`): the [`row_key`] of each row.
            length (`int`): tokens of the batch, padding included.

        Returns:
            `list[torch.Tensor]`, or `None` if a row is not there.
        """
        places = [self._places[key] for key in keys if key in self._places]
        if len(places) < len(keys) or not all(self._written[place.number] for place in places):
            return None
        states = [torch.zeros(len(keys), length, width, dtype=dtype) for width, dtype in self._kinds]
        for index, place in enumerate(places):
            for state, stored in zip(states, self._views(place), strict=True):
                state[index, : len(stored)] = stored[:length]
        return states

    def write(self, keys: Sequence[str], states: Sequence[Tensor]) -> None:
        """
        Keeps the states of a batch; rows that are not of the data set, as in evaluation, are passed over.

        Args:
            keys (sequence of `str`): the [`row_key`] of each row.
            states (sequence of `torch.Tensor`): `[batch, tokens, width]` for each width, padded on the right.
        """
        for index, key in enumerate(keys):
            if key not in self._places:
                continue
            place = self._places[key]
            for state, stored in zip(states, self._views(place), strict=True):
                stored[: state.shape[1]] = state[index, : place.tokens]
            start = place.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.flush(start, place.start + sum(self._sizes(place)) - start)
            self._written[place.number] = 1

    def _views(self, place: _Place) -> list[Tensor]:
        views, start = [], place.start
        for (width, dtype), size in zip(self._kinds, self._sizes(place), strict=True):
            used = self._states[start : start + place.tokens * width * dtype.itemsize]
            views.append(used.view(dtype).view(place.tokens, width))
            start += size
        return views
