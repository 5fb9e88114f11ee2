"""Verified question-answer rows: where they come from, which of them can be used, and what is held out."""

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from .errors import DataError
from .on_disk import BATCH, Numbering, write_arrow
from .presets import PRESETS, Columns, QAPreset
from .sources import SUFFIXES, Row, Source, read_file, read_hub

# Chains of 3 to 8 steps, and of 3 to 5.
TINY = {"tiny-reasoner": 8, "tiny-reasoner-short": 5}
_TINY_ROWS = 4_000
# Of files, and of Hub datasets that are no preset.
_PLAIN = QAPreset("")
_EMPTY = {"problem": "empty_question", "answer": "empty_answer", "solution": "empty_solution"}


@dataclass(frozen=True)
class QAReport:
    """What became of the rows of a question-answer source. A row that is left out is counted once.

    Args:
        rows_read (`int`):
            Rows looked at: all of them, or those up to the limit.
        kept (`int`):
            Rows used.
        unreadable (`int`):
            Rows left out because a cell cannot be read: broken JSON where a preset has JSON, or no valid text.
        non_string (`int`):
            Rows left out because a cell is neither text nor missing, a number for example.
        empty_question (`int`), empty_answer (`int`), empty_solution (`int`):
            Rows left out because that cell is missing, empty or blank.
        repeated (`int`):
            Rows left out because their question came before, outer whitespace aside.
        fingerprint (`str`):
            SHA-256 of the rows kept, in their order.
        repo (`str`, *optional*), commit (`str`, *optional*):
            The Hub dataset and its commit that was read.
        solution_column (`str`, *optional*):
            The column of the reasoning traces, if there are any in the text.
    """

    rows_read: int
    kept: int
    unreadable: int
    non_string: int
    empty_question: int
    empty_answer: int
    empty_solution: int
    repeated: int
    fingerprint: str
    repo: str | None = None
    commit: str | None = None
    solution_column: str | None = None

    def describe(self) -> str:
        """One or two sentences, for a log line or a report."""
        reasons = (
            (self.unreadable, "with a cell that cannot be read (broken JSON, or no valid text)"),
            (self.non_string, 'with a cell that is not text (write a number as text: "42", in quotes)'),
            (self.empty_question, "without a question"),
            (self.empty_answer, "without an answer"),
            (self.empty_solution, "without a reasoning trace"),
            (self.repeated, "whose question came before"),
        )
        left_out = ", ".join(f"{count:,} {reason}" for count, reason in reasons if count)
        used = f"{self.kept:,} of {self.rows_read:,} rows can be used" + (
            f"; left out: {left_out}." if left_out else "."
        )
        if self.solution_column is None:
            return used
        return f"{used} CoT-based: the text holds the reasoning traces of column {self.solution_column!r}."


def load_qa(
    source: str | Path,
    *,
    question_column: str | None = None,
    answer_column: str | None = None,
    solution_column: str | None = None,
    split: str = "train",
    revision: str | None = None,
    limit: int | None = None,
) -> tuple[datasets.Dataset, QAReport]:
    """Reads verified question-answer rows, leaves out those that cannot be used, and reports how many and why.

    Nothing is converted: a number in an answer column is not text, and its row is left out and counted. Rows are read
    one after the other and kept on disk, so that a set may be larger than memory; nothing is read behind the limit.

    Args:
        source (`str` or `Path`):
            A local `.jsonl`, `.csv` or `.parquet` file, the id of a Hub dataset, or a preset: one of `PRESETS`, or
            `"tiny-reasoner"` and `"tiny-reasoner-short"` (chains of 3 to 8, and of 3 to 5 steps), whose rows are
            generated on the spot (none that the shipped models were trained on).
        question_column (`str`, *optional*):
            The column with the questions. `None` means the preset's, otherwise `"problem"`.
        answer_column (`str`, *optional*):
            The column with the answers. `None` means the preset's, otherwise `"answer"`.
        solution_column (`str`, *optional*):
            A column with reasoning traces, to be kept, too.
        split (`str`, *optional*, defaults to `"train"`):
            The split of a Hub dataset.
        revision (`str`, *optional*):
            The revision of a Hub dataset: a branch, a tag or a commit. `None` means the preset's, otherwise `"main"`.
        limit (`int`, *optional*):
            Keep this many rows at most, the first ones. The tiny reasoner's presets make this many (4,000 without a
            limit).

    Returns:
        `tuple[datasets.Dataset, QAReport]`: the rows kept, with the text columns `problem` and `answer`, and
        `solution` if asked for; and the report.

    Raises:
        `DataError`: if the source cannot be read, lacks a column, is empty, or has no row that can be used.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; it must be at least 1, or None for all rows.")
    preset = PRESETS.get(str(source), _PLAIN)
    columns = preset.columns(question_column, answer_column, solution_column)
    if columns["problem"][0] == columns["answer"][0]:
        raise DataError(f"The questions and the answers are both to be read from column {columns['answer'][0]!r}.")
    opened = _open(source, preset, columns, split, revision, _TINY_ROWS if limit is None else limit)
    return _select(opened, columns, str(source), limit)


def load_questions(source: str | Path, question_column: str | None = None) -> Iterator[str]:
    """Reads the questions alone, to look for them elsewhere: of all rows, whatever their answers are.

    Args:
        source (`str` or `Path`), question_column (`str`, *optional*):
            As in [`load_qa`]; of a Hub dataset, the split `train`.

    Returns:
        `Iterator[str]`: one a row, in the rows' order; `""` where it is missing or not text.

    Raises:
        `DataError`: if the source cannot be read, lacks the column, or (at its end) has no question.
    """
    preset = PRESETS.get(str(source), _PLAIN)
    columns = {"problem": preset.columns(question_column)["problem"]}
    return _questions(_open(source, preset, columns), columns, str(source))


def _questions(opened: Source, columns: Columns, source: str) -> Iterator[str]:
    found = False
    for row in opened.rows:
        cells = _cells(row, columns)
        question = cells[0] if cells and isinstance(cells[0], str) else ""
        found = found or bool(question.strip())
        yield question
    if not found:
        _check_columns(opened, columns, source)
        raise DataError(f"{source} has no row with a question, as text, in column {columns['problem'][0]!r}.")


def _open(
    source: str | Path,
    preset: QAPreset,
    columns: Columns,
    split: str = "train",
    revision: str | None = None,
    tiny_rows: int = _TINY_ROWS,
) -> Source:
    wanted = [column for column, _ in columns.values()]
    if str(source) in TINY:
        opened = _tiny_rows(tiny_rows, TINY[str(source)])
    elif not preset.repo and _is_file(source):
        path = Path(source).expanduser()
        if not os.path.exists(path):
            raise DataError(
                f"There is no file {path}. Presets: {', '.join((*PRESETS, *TINY))}. "
                "A Hub dataset is spelled owner/name."
            )
        opened = read_file(path, wanted)
    else:
        opened = read_hub(
            preset.repo or str(source),
            config=preset.config,
            split=split,
            revision=revision or preset.revision,
            wanted=wanted,
        )
    _check_columns(opened, columns, str(source))
    return opened


def _check_columns(opened: Source, columns: Columns, source: str) -> None:
    missing = [column for column, _ in columns.values() if column not in opened.columns]
    # The columns of a .jsonl are known when it has been read; that it has no rows is said by the callers.
    if missing and opened.columns:
        raise DataError(
            f"{source} has no column {' and no column '.join(map(repr, missing))}. "
            f"Its columns: {', '.join(map(repr, opened.columns))}."
        )


def _select(opened: Source, columns: Columns, source: str, limit: int | None) -> tuple[datasets.Dataset, QAReport]:
    counts = dict.fromkeys(("rows_read", "kept", "unreadable", "non_string", *_EMPTY.values(), "repeated"), 0)
    digest = hashlib.sha256()

    def kept() -> Iterator[list[str]]:
        with Numbering() as questions:
            for row in opened.rows:
                counts["rows_read"] += 1
                cells = _cells(row, columns)
                reason = _reason_to_leave_out(cells)
                if reason is None and questions(cells[0].strip()) < counts["kept"]:
                    reason = "repeated"
                if reason is not None:
                    counts[reason] += 1
                    continue
                counts["kept"] += 1
                digest.update(json.dumps(cells).encode() + b"\n")
                yield cells
                if counts["kept"] == limit:
                    return

    dataset = write_arrow(kept(), pa.schema([(name, pa.string()) for name in columns]))
    if not counts["rows_read"]:
        raise DataError(f"{source} has no rows.")
    report = QAReport(
        fingerprint=digest.hexdigest(),
        repo=opened.repo,
        commit=opened.commit,
        solution_column=columns["solution"][0] if "solution" in columns else None,
        **counts,
    )
    if not report.kept:
        _check_columns(opened, columns, source)
        raise DataError(f"{source}: {report.describe()}")
    return dataset, report


def _cells(row: Row, columns: Columns) -> list[Any]:
    """The cells of a row, `""` for what is missing; nothing if one of them cannot be read."""
    cells = []
    try:
        for column, read in columns.values():
            cell = row.get(column)
            cell = None if cell is None else read(cell)
            cells.append("" if cell is None else cell)
            if isinstance(cell, str):
                cell.encode()
    except (ValueError, TypeError, LookupError):
        return []
    return cells


def _reason_to_leave_out(cells: Sequence[Any]) -> str | None:
    if not cells:
        return "unreadable"
    if not all(isinstance(cell, str) for cell in cells):
        return "non_string"
    return next((reason for cell, reason in zip(cells, _EMPTY.values(), strict=False) if not cell.strip()), None)


def hold_out(dataset: datasets.Dataset, size: int, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Splits off a held-out part by question, so that no question is on both sides. The rows keep their order.

    Args:
        dataset (`datasets.Dataset`):
            Rows with a `problem` column, as `load_qa` returns them.
        size (`int`):
            Number of questions to hold out.
        seed (`int`):
            The same seed on the same rows gives the same split.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: the rows to train on, and those held out.

    Raises:
        `DataError`: if `size` is below 1, or if no question would be left to train on.
    """
    with Numbering() as questions:
        numbers = np.fromiter(
            (
                questions(problem.strip())
                for batch in dataset.select_columns("problem").iter(BATCH)
                for problem in batch["problem"]
            ),
            dtype=np.int64,
            count=len(dataset),
        )
        distinct = len(questions)
    if not 1 <= size < distinct:
        raise DataError(
            f"Cannot hold out {size:,} of {distinct:,} questions: "
            f"at least one must be held out, and at least one left to train on."
        )
    held = np.isin(numbers, random.Random(seed).sample(range(distinct), size))
    return dataset.select(np.flatnonzero(~held)), dataset.select(np.flatnonzero(held))


def _is_file(source: str | Path) -> bool:
    """A path, rather than a Hub id (`owner/name`). Whether it is there is said elsewhere."""
    if isinstance(source, Path) or source.count("/") != 1:
        return True
    path = Path(source).expanduser()
    return path.exists() or path.suffix.lower() in SUFFIXES or source.startswith((".", "/", "~"))


def _tiny_rows(count: int, max_steps: int) -> Source:
    from .tiny.task import make_rows, training_questions

    # What the shipped models were trained on is left out, so that any part of these rows may be held out.
    rows = make_rows(count, seed=0, exclude=training_questions(), max_steps=max_steps)
    return Source(iter(rows), ("problem", "answer"))
