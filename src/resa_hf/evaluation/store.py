"""Completions on disk, so that an evaluation that was interrupted goes on where it stopped."""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..writing import writing
from .engine import Completion, Sampling

Key = tuple[int, int]


class Store:
    """The completions of one evaluation, by problem and sample.

    The file is JSONL: what they are answers to and by whom, then a line for each batch, which is on disk before the
    next one begins. A last line that was cut off is dropped.

    Args:
        path (`Path`, *optional*):
            The file. `None` keeps nothing.
        engine (`Mapping[str, str]`):
            What else than prompts and sampling the completions depend on.
        prompts (sequence of `str`):
            One a problem.
        sampling (`Sampling`):
            The settings; `batch_size` may differ from one run to the next.

    Raises:
        `DataError`: if the file holds other completions (the message tells what differs) or is damaged.
    """

    def __init__(
        self, path: Path | None, engine: Mapping[str, str], prompts: Sequence[str], sampling: Sampling
    ) -> None:
        self.done: dict[Key, Completion] = {}
        self._path = path
        self._shape = len(prompts), sampling.samples
        self._since = time.perf_counter()
        if path is None:
            return
        settings = {key: value for key, value in asdict(sampling).items() if key != "batch_size"}
        header = {**engine, **settings, "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()}
        found, *lines = _whole_lines(path) or [header]
        different = [key for key in header.keys() | found.keys() if header.get(key) != found.get(key)]
        if different:
            values = ", ".join(f"{key} {found.get(key)!r}, now {header.get(key)!r}" for key in sorted(different))
            raise DataError(f"{path} holds completions of another evaluation: {values}. Delete it, or name another.")
        try:
            for line in lines:
                self.done |= {(problem, sample): _completion(kept) for problem, sample, kept in line["completions"]}
        except (LookupError, TypeError, ValueError) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or not path.stat().st_size:
            self._append(header)

    def add(self, completions: Mapping[Key, Completion]) -> None:
        """Keeps completions; what is killed later loses none of them."""
        self.done.update(completions)
        if self._path is not None and completions:
            now = time.perf_counter()
            rows = [[*key, asdict(completion)] for key, completion in completions.items()]
            self._append({"seconds": now - self._since, "completions": rows})
            self._since = now

    def answers(self) -> list[list[Completion]]:
        """`[problems][samples]`, once all are there."""
        problems, samples = self._shape
        return [[self.done[problem, sample] for sample in range(samples)] for problem in range(problems)]

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self._path is not None
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def stored_seconds(path: Path) -> float:
    """Seconds that the completions in a file took, those before an interruption included."""
    try:
        return float(sum(line["seconds"] for line in _whole_lines(path)[1:]))
    except (LookupError, TypeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _completion(kept: dict[str, Any]) -> Completion:
    made = Completion(**kept)
    numbers = [made.length, *made.tokens]
    if not isinstance(made.text, str) or not all(isinstance(number, int) for number in numbers):
        raise TypeError(f"{kept!r:.80} is no completion")
    return made


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, none if there is none. What stands behind the last line break is cut off the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if wrong := [number for number, line in enumerate(lines, start=1) if not isinstance(line, dict)]:
        raise _damaged(path, f"line {wrong[0]} is no JSON object")
    return lines


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is damaged, and no store of completions: {reason}. Delete it.")
