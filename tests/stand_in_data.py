"""Stand-ins for the data sets of the recipes and the benchmarks: real names, commits, files, columns and splits."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from gpqa_rows import gpqa_rows
from hub_server import HubServer

from resa_hf.evaluation.benchmarks import BENCHMARKS
from resa_hf.presets import PRESETS

Rows = list[dict[str, Any]]
PARQUET = "data/train-00000-of-00001.parquet"
# To questions that all have the same, for models that know no other.
ONE_ANSWER = "7"


def serve_datasets(hub: HubServer, rows: int, *, one_answer: bool = False) -> None:
    """Puts training sets of so many rows on the Hub, and the six benchmarks with all of theirs.

    Args:
        hub (`HubServer`): where.
        rows (`int`): of a training set.
        one_answer (`bool`, *optional*, defaults to `False`): whether all of them have `ONE_ANSWER`.
    """
    question = _question_with_one_answer if one_answer else _question
    for name, make in _TRAINING.items():
        preset = PRESETS[name]
        licence = f"license: {preset.licence}\n" if preset.licence else ""
        path, content, more = make([question(number) for number in range(rows)])
        files = {path: content, "README.md": f"---\n{licence}{more}---\n# {name}\n"}
        hub.create_repo(preset.repo, "dataset", files=files, commit=preset.revision)
    for name, (path, columns) in _BENCHMARKS.items():
        benchmark = BENCHMARKS[name]
        found = [columns(number) for number in range(benchmark.size)] if name != "gpqa_diamond" else gpqa_rows(198)
        files = {path: _packed(path, found), "README.md": _GPQA_CARD if name == "gpqa_diamond" else "# A benchmark\n"}
        hub.create_repo(
            benchmark.repo, "dataset", files=files, commit=benchmark.revision, gated=name == "gpqa_diamond"
        )


def _question(number: int) -> tuple[str, str]:
    # Long enough for 64 of them to fill a chunk of 2,048 tokens.
    return f"There are ${number}$ apples and ${number % 7}$ more. What is their sum?", str(number + number % 7)


def _question_with_one_answer(number: int) -> tuple[str, str]:
    return f"There are ${number}$ apples in each of ${ONE_ANSWER}$ baskets. How many baskets are there?", ONE_ANSWER


def _packed(path: str, rows: Rows) -> bytes | str:
    if path.endswith(".parquet"):
        target = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), target)
        return target.getvalue()
    if path.endswith(".csv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
    return json.dumps(rows) if path.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)


def _file(path: str, row: Callable[[str, str], dict[str, Any]], more: str = "") -> Callable[[Sequence[Any]], Any]:
    """A data set of one file."""
    return lambda questions: (path, _packed(path, [row(*pair) for pair in questions]), more)


def _messages(question: str, answer: str | None = None) -> Rows:
    turns = [{"role": "user", "content": question}]
    return (
        turns
        if answer is None
        else [*turns, {"role": "assistant", "content": f"<think>\nCounting.\n</think>\n{answer}"}]
    )


def _openr1(question: str, answer: str) -> dict[str, Any]:
    return {
        "problem": question,
        "solution": f"It is ${answer}$.",
        "answer": answer,
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "olympiads",
        "uuid": "a5b1d9cf",
        "is_reasoning_complete": [True, True],
        "generations": ["<think>\nCounting.\n</think>", "<think>\nAgain.\n</think>"],
        "correctness_math_verify": [True, True],
        "correctness_llama": None,
        "finish_reasons": None,
        "correctness_count": 2,
        "messages": _messages(question, answer),
    }


_TRAINING: dict[str, Callable[[Sequence[Any]], Any]] = {
    "still": _file(PARQUET, lambda question, answer: {"question": question, "answer": answer}),
    # Some of its solutions are empty.
    "deepscaler": _file(
        "deepscaler.json",
        lambda question, answer: {
            "problem": question,
            "answer": answer,
            "solution": "" if answer.endswith("50") else f"Counting on from there gives $\\boxed{{{answer}}}$.",
        },
    ),
    "open-s1": _file(
        PARQUET,
        lambda question, answer: {
            "problem": question,
            "solution": f"It is ${answer}$.",
            "answer": answer,
            "source": "s1",
            "messages": _messages(question, answer),
        },
    ),
    "open-rs": _file(
        PARQUET,
        lambda question, answer: {
            "problem": question,
            "solution": f"It is ${answer}$.",
            "answer": answer,
            "level": "Easy",
        },
    ),
    "limr": _file("limr.json", lambda question, answer: {"prompt": question, "answer": answer}),
    "ii-thought": _file(
        PARQUET,
        lambda question, answer: {
            "messages": _messages(question),
            "verification_info": json.dumps({"type": "math_verifiable", "answer": {"value": answer}}),
        },
    ),
    "openr1-math": _file(
        "data/train-00000-of-00001.parquet",
        _openr1,
        "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n",
    ),
}

_GPQA_CARD = "---\nconfigs:\n- config_name: gpqa_diamond\n  data_files: gpqa_diamond.csv\n---\n# GPQA\n"


def _aime(number: int) -> dict[str, Any]:
    question, answer = _question(number + 10_000)
    return {"id": number, "problem": question, "solution": answer, "answer": answer, "url": "", "year": "2024"}


def _math_500(number: int) -> dict[str, Any]:
    question, answer = _question(number + 20_000)
    own = {"subject": "Algebra", "level": 1, "unique_id": f"test/{number}.json"}
    return {"problem": question, "solution": f"$\\boxed{{{answer}}}$", "answer": answer, **own}


def _plain(first: int) -> Callable[[int], dict[str, Any]]:
    return lambda number: dict(zip(("problem", "answer"), _question(number + first), strict=True))


_BENCHMARKS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "aime24": (PARQUET, _aime),
    "aime25": (PARQUET, lambda number: _aime(number + 1_000)),
    "amc23": (PARQUET, _plain(30_000)),
    "math_500": ("test.jsonl", _math_500),
    "gpqa_diamond": ("gpqa_diamond.csv", _plain(0)),
    "minerva": (PARQUET, _plain(40_000)),
}
