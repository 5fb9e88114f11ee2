"""The benchmarks of the paper, and GSM8K: where their rows come from, and which rows those are. Imports no lighteval.

With the environment variable `RESA_DATA_DIR` they are read from that folder, without network: `<name>.jsonl`, `.csv`
or `.parquet`, or `<name>_test.*` (`math500` is `math_500` too), with the columns `problem` and `answer`;
`gpqa_diamond` in GPQA's own columns. Otherwise they come from the Hub.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError

from ..errors import DataError
from ..sources import SUFFIXES, gated_message, is_gated, read_file

logger = logging.getLogger(__name__)

DATA_DIR = "RESA_DATA_DIR"
Kind = Literal["math", "minerva", "choice"]


@dataclass(frozen=True)
class Benchmark:
    """A dataset of problems with verified answers.

    Args:
        kind (`str`):
            How an answer is scored, see [`~resa_hf.evaluation.scoring.score`].
        repo (`str`), subset (`str`), split (`str`):
            Where it lies on the Hub.
        size (`int`):
            Its number of problems.
        revision (`str`, *optional*):
            Commit of `repo`. `None` where no public record of a full commit hash was found; then `fingerprint` tells
            whether the rows are those that this task was made for.
        fingerprint (`str`, *optional*):
            [`fingerprint`] of the rows.
    """

    kind: Kind
    repo: str
    size: int
    revision: str | None = None
    subset: str = "default"
    split: str = "train"
    fingerprint: str | None = None


@dataclass(frozen=True)
class FileTasks:
    """How tasks are made of files.

    Args:
        question_column (`str`, *optional*), answer_column (`str`, *optional*):
            Their columns, as in [`~resa_hf.data.load_qa`].
        prompt (`str`, *optional*, defaults to `"paper"`):
            `"paper"`, its prompt for mathematics, which asks for a boxed answer; or `"plain"`, the problem alone.

    Raises:
        `ValueError`: for another prompt.
    """

    question_column: str | None = None
    answer_column: str | None = None
    prompt: str = "paper"

    def __post_init__(self) -> None:
        if self.prompt not in ("paper", "plain"):
            raise ValueError(f"file_prompt is {self.prompt!r}; it must be one of paper, plain.")


BENCHMARKS: Mapping[str, Benchmark] = {
    "aime24": Benchmark("math", "HuggingFaceH4/aime_2024", 30, "2fe88a2f1091d5048c0f36abc874fb997b3dd99a"),
    "aime25": Benchmark("math", "yentinglin/aime_2025", 30, "6f71d77b0b89b9dabe07ab466c51df33f514df7f"),
    "amc23": Benchmark(
        *("math", "knoveleng/AMC-23", 40),
        fingerprint="3cd04b74a4efa8b252d7396ca031cd8736d02b70a2802bce6215a118138b7a9a",
    ),
    "math_500": Benchmark(
        "math", "HuggingFaceH4/MATH-500", 500, "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", split="test"
    ),
    "gpqa_diamond": Benchmark(
        "choice", "Idavidrein/gpqa", 198, "633f5ee89ab8ad4522a9f850766b73f62147ffdd", subset="gpqa_diamond"
    ),
    "minerva": Benchmark(
        *("minerva", "knoveleng/Minerva-Math", 272),
        fingerprint="036f2232feac4855364ca2f1a7a5ae2039a94cb3f408302d974089687be6a5fc",
    ),
    "gsm8k": Benchmark(
        "math", "openai/gsm8k", 1319, "740312add88f781978c0658806c59bc2815b9866", subset="main", split="test"
    ),
}


def task_revisions(tasks: Iterable[str]) -> dict[str, dict[str, str | None]]:
    """`name` and `commit` of the benchmarks among tasks, by the tasks' names, as they are pinned."""
    if os.environ.get(DATA_DIR):
        return {}
    known = {task: BENCHMARKS[name] for task in tasks if (name := task.removeprefix("resa:")) in BENCHMARKS}
    return {task: {"name": benchmark.repo, "commit": benchmark.revision} for task, benchmark in known.items()}


def load_benchmark(name: str) -> datasets.Dataset:
    """Reads a benchmark, from the folder `RESA_DATA_DIR` if that is set and else from the Hub.

    Args:
        name (`str`):
            A key of `BENCHMARKS`.

    Returns:
        `datasets.Dataset`: text columns `problem` and `answer`, in the source's order; for GPQA also `choices`, four
        texts, and `answer` is the letter of the right one.

    Raises:
        `DataError`: if it is not in the folder, cannot be read or loaded, is gated, has no rows, or is not the
        benchmark.
    """
    benchmark = BENCHMARKS[name]
    folder = os.environ.get(DATA_DIR)
    source = str(_local_file(Path(folder).expanduser(), name)) if folder else benchmark.repo
    rows = read_file(Path(source)).rows if folder else _hub_rows(benchmark)
    read = _gpqa_row if benchmark.kind == "choice" else _maths_row
    try:
        dataset = datasets.Dataset.from_list([read(row) for row in rows])
    except KeyError as error:
        raise DataError(f"{source} is not {name}: it has no column {error}.") from error
    except (AttributeError, TypeError, UnicodeError, pa.ArrowException) as error:
        raise DataError(f"{source} is not {name}: a problem or an answer is no text ({error}).") from error
    if not len(dataset):
        raise DataError(f"{source} has no rows: there is nothing to evaluate {name} on.")
    _check(dataset, name, source, local=bool(folder))
    return dataset


def fingerprint(dataset: datasets.Dataset) -> str:
    """SHA-256 of the problems, whatever their order; of their lower-case letters and digits, so that mirrors agree."""
    texts = sorted(re.sub(r"[^a-z0-9]", "", problem.lower()) for problem in dataset["problem"])
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _local_file(folder: Path, name: str) -> Path:
    stems = dict.fromkeys(stem + part for stem in (name, name.replace("_", "")) for part in ("", "_test"))
    for stem in stems:
        for suffix in SUFFIXES:
            if (folder / (stem + suffix)).is_file():
                return folder / (stem + suffix)
    names = ", ".join(stem + SUFFIXES[0] for stem in stems)
    raise DataError(
        f"{DATA_DIR} is {folder}, which has none of {names} (or {', '.join(SUFFIXES[1:])}). "
        f"Unset {DATA_DIR} to load {name} from the Hub."
    )


def _hub_rows(benchmark: Benchmark) -> Iterator[Mapping[str, Any]]:
    repo = benchmark.repo
    try:
        yield from datasets.load_dataset(repo, benchmark.subset, split=benchmark.split, revision=benchmark.revision)
    except (OSError, ValueError, DatasetsError) as error:
        if is_gated(error):
            raise DataError(gated_message(repo)) from error
        raise DataError(
            f"Hub dataset {repo!r} (revision {benchmark.revision or 'main'}) cannot be loaded: {error}. "
            f"Without network, set {DATA_DIR} to a folder that holds it."
        ) from error


def _check(dataset: datasets.Dataset, name: str, source: str, *, local: bool) -> None:
    """The Hub must give the whole benchmark; a local file may be a part of it, which is said."""
    benchmark = BENCHMARKS[name]
    if len(dataset) != benchmark.size:
        difference = f"{source} has {len(dataset):,} problems; {name} has {benchmark.size:,}."
        if not local:
            raise DataError(difference)
        logger.warning("%s The score is not one of the whole benchmark.", difference)
    elif benchmark.fingerprint and fingerprint(dataset) != benchmark.fingerprint:
        logger.warning(
            "The problems of %s are not word for word those that %s was made for (fingerprint %s, not %s): "
            "compare its score with scores on the same rows only.",
            *(source, name, fingerprint(dataset), benchmark.fingerprint),
        )


def _maths_row(row: Mapping[str, Any]) -> dict[str, Any]:
    r"""GSM8K's question and `#### answer`, MATH's solution with its `\boxed`, or `problem` and `answer`."""
    problem = row["problem"] if "problem" in row else row["question"]
    answer = row["answer"] if "answer" in row else row["solution"]
    if not isinstance(problem, str) or answer is None:
        raise TypeError(f"{problem!r:.80}: {answer!r:.80}")
    return {"problem": problem, "answer": str(answer).rpartition("####")[2].strip()}


def _gpqa_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The options in an order that depends on the question and the options only, not on the row or on a seed."""
    problem, right = row["Question"].strip(), row["Correct Answer"].strip()
    options = [right, *(row[f"Incorrect Answer {number}"].strip() for number in (1, 2, 3))]
    options.sort(key=lambda option: hashlib.sha256(f"{problem}\n{option}".encode()).digest())
    return {"problem": problem, "answer": "ABCD"[options.index(right)], "choices": options}
