"""Rows of `.jsonl`, `.csv` and `.parquet` files and of Hub datasets, one after the other, none of them kept."""

import contextlib
import csv
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx

from .errors import DataError
from .on_disk import BATCH

SUFFIXES = (".jsonl", ".csv", ".parquet")
_COMMIT = re.compile("[0-9a-f]{40}")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """An opened file or dataset.

    Args:
        rows (`Iterator[Mapping]`):
            Its rows, each once.
        columns (`Collection[str]`):
            Its columns; of a `.jsonl` file those of the rows that were read.
        repo (`str`, *optional*), commit (`str`, *optional*):
            Where on the Hub it comes from.
    """

    rows: Iterator[Row]
    columns: Collection[str]
    repo: str | None = None
    commit: str | None = None


def read_file(path: Path, wanted: Sequence[str] | None = None) -> Source:
    """Opens a `.jsonl`, `.csv` or `.parquet` file.

    Args:
        path (`Path`):
            The file.
        wanted (`Sequence[str]`, *optional*):
            Columns to read, where the format allows to leave others unread.

    Raises:
        `DataError`: if it is of another kind or cannot be read; while rows are drawn, too.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        raise DataError(f"{path} is a folder; give one file: {', '.join(SUFFIXES)}.")
    if suffix not in SUFFIXES:
        raise DataError(f"{path} cannot be read; only {', '.join(SUFFIXES)} files can.")
    if suffix == ".jsonl":
        columns: dict[str, None] = {}
        return Source(_json_rows(path, columns), columns)
    if suffix == ".csv":
        with _read_errors(path), _open_csv(path) as reader:
            return Source(_csv_rows(path), list(reader.fieldnames or ()))
    with _read_errors(path):
        names = pq.read_schema(path).names
    return Source(_parquet_rows(path, [name for name in names if wanted is None or name in wanted]), names)


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as {path.suffix.lower()}: {error}") from error


def _json_rows(path: Path, columns: dict[str, None]) -> Iterator[Row]:
    with _read_errors(path), path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"Line {number} of {path} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"Line {number} of {path} is not a JSON object with one entry a column.")
            columns.update(dict.fromkeys(row))
            yield row


@contextlib.contextmanager
def _open_csv(path: Path) -> "Iterator[csv.DictReader[str]]":
    # Not pandas: every cell stays text, and "NA" is an answer. Excel writes a byte order mark, hence utf-8-sig.
    with path.open(encoding="utf-8-sig", newline="") as lines:
        yield csv.DictReader(lines, strict=True)


def _csv_rows(path: Path) -> Iterator[Row]:
    with _read_errors(path), _open_csv(path) as reader:
        for number, row in enumerate(reader, start=1):
            if None in row:
                raise DataError(
                    f"Row {number} of {path} has more cells than the header has columns. "
                    'A cell with a comma in it must be in quotes: "1,000".'
                )
            yield row


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[Row]:
    with _read_errors(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH, columns=columns):
            yield from batch.to_pylist()


def read_hub(
    repo: str, *, config: str | None = None, split: str, revision: str | None, wanted: Sequence[str]
) -> Source:
    """Loads a Hub dataset into the cache of `datasets`, or finds it there, and opens it.

    A branch is resolved to a commit first, so that it may move meanwhile. Where the Hub does not answer, `datasets`
    takes the newest in its cache; that is refused here if it is not the revision asked for.

    Args:
        repo (`str`), config (`str`, *optional*), split (`str`), revision (`str`, *optional*):
            Which dataset.
        wanted (`Sequence[str]`):
            Columns to read.

    Raises:
        `DataError`: if it cannot be loaded, or is in the cache at another commit only.
    """
    told = f"Hub dataset {repo!r} (split {split!r}, revision {revision or 'main'!r})"
    try:
        commit = _resolve(repo, revision)
        dataset = datasets.load_dataset(repo, config, split=split, revision=commit)
    except (OSError, ValueError, DatasetsError, httpx.HTTPError) as error:
        if is_gated(error):
            raise DataError(gated_message(repo)) from error
        raise DataError(
            f"{told} cannot be loaded, and there is no file of that name: {' '.join(str(error).split())} If it is "
            "private, log in with `hf auth login`. Without network, only what was loaded before can be read."
        ) from error
    cached = _cached_commit(dataset)
    if commit is not None and cached not in (None, commit):
        raise DataError(f"{told} is commit {commit}, but the cache has {cached} only. Load it once with network.")
    present = [column for column in wanted if column in dataset.column_names]
    return Source(_hub_rows(dataset.select_columns(present)), dataset.column_names, repo, cached or commit)


def _resolve(repo: str, revision: str | None) -> str | None:
    """The commit of a revision; `None` without network, if none was asked for."""
    if _COMMIT.fullmatch(revision or ""):
        return revision
    try:
        return HfApi().dataset_info(repo, revision=revision).sha
    except (OfflineModeIsEnabled, httpx.TransportError):
        if revision is not None:
            raise
        return None


def _hub_rows(dataset: datasets.Dataset) -> Iterator[Row]:
    for table in dataset.with_format("arrow").iter(BATCH):
        yield from table.to_pylist()


def _cached_commit(dataset: datasets.Dataset) -> str | None:
    """The commit that a dataset was made of: its folder in the cache of `datasets` has that name."""
    folders = [Path(file["filename"]).parent.name for file in dataset.cache_files]
    return next(filter(_COMMIT.fullmatch, folders), None)


def gated_message(repo: str) -> str:
    """What to do about a gated dataset without access."""
    return (
        f"{repo} is a gated dataset, and this account has no access to it. "
        f"Accept its terms at https://huggingface.co/datasets/{repo}, then log in with `hf auth login`."
    )


def is_gated(error: Exception) -> bool:
    """Whether a dataset could not be loaded because it is gated; datasets 5 says so in its message only."""
    return isinstance(error, GatedRepoError) or "is a gated dataset" in str(error)
