"""Rows on disk instead of in memory: an Arrow file that is mapped, and a numbering of texts, however many."""

import atexit
import contextlib
import hashlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import datasets
import pyarrow as pa

from .errors import DataError

BATCH = 1_000  # rows held in memory at a time; that of `datasets`

_forgotten: ContextVar[list[str] | None] = ContextVar("_forgotten", default=None)


@contextlib.contextmanager
def rows_forgotten() -> Iterator[None]:
    """The files of rows that the block writes go at its end; none of its datasets may be read afterwards."""
    folders: list[str] = []
    before = _forgotten.get()
    _forgotten.set(folders)
    try:
        yield
    finally:
        # Not by `reset`, which can fail: https://github.com/python/cpython/issues/148891.
        _forgotten.set(before)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def write_arrow(rows: Iterable[Sequence[Any]], schema: pa.Schema) -> datasets.Dataset:
    """Writes rows to a file and maps it: memory holds one batch of them, however many there are.

    The file lies in the system's temporary folder (`TMPDIR`) and goes when the process ends, or [`rows_forgotten`].

    Args:
        rows (`Iterable[Sequence]`):
            The cells of each row, in the order of the schema.
        schema (`pyarrow.Schema`):
            Names and types of the columns.

    Returns:
        `datasets.Dataset`: the rows.

    Raises:
        `DataError`: if the file cannot be written.
    """
    rows = iter(rows)
    try:
        folder = tempfile.mkdtemp(prefix="resa-hf-")
        if (folders := _forgotten.get()) is not None:
            folders.append(folder)
        else:
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        path = str(Path(folder, "rows.arrow"))
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            while batch := list(islice(rows, BATCH)):
                columns = zip(zip(*batch, strict=True), schema.types, strict=True)
                arrays = [pa.array(cells, kind) for cells, kind in columns]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
    except (OSError, sqlite3.Error) as error:
        raise DataError(
            f"Rows cannot be written to {tempfile.gettempdir()}: {error}. Make room, or set TMPDIR to a larger disk."
        ) from error
    return datasets.Dataset.from_file(path)


class Numbering:
    """Numbers texts from 0 in the order in which they first come; equal texts get the same number.

    What came before is kept as 128-bit digests in SQLite's temporary database: 2 MB in memory, the rest on disk.
    """

    def __init__(self) -> None:
        self._count = 0
        self._database = sqlite3.connect("")
        self._database.execute("CREATE TABLE texts (digest BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID")

    def __enter__(self) -> "Numbering":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def __len__(self) -> int:
        return self._count

    def __call__(self, text: str) -> int:
        """The number of a text."""
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if self._database.execute("INSERT OR IGNORE INTO texts VALUES (?, ?)", (digest, self._count)).rowcount:
            self._count += 1
            return self._count - 1
        found: tuple[int] = self._database.execute("SELECT number FROM texts WHERE digest = ?", (digest,)).fetchone()
        return found[0]
