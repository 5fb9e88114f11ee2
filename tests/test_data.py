"""Question-answer rows: what is read, what is left out, what is held out."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from resa_hf.data import hold_out, load_qa, load_questions
from resa_hf.errors import DataError

PAIRS = [("What is 1+1?", "2"), ('Say "a, b"\nand stop.', "NA"), ("Solve $x^2=4$ ×", "\\{-2, 2\\}")]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pd.DataFrame(rows).to_parquet(path)
    return path


def columns(dataset: datasets.Dataset) -> list[tuple[str, str]]:
    return list(zip(dataset["problem"], dataset["answer"], strict=True))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_reads_columns_of_any_name(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"mine{suffix}", [{"id": "7", "frage": q, "antwort": a} for q, a in PAIRS])
    dataset, report = load_qa(path, question_column="frage", answer_column="antwort")
    assert dataset.column_names == ["problem", "answer"]
    assert columns(dataset) == PAIRS
    assert (report.rows_read, report.kept) == (3, 3)
    assert report.describe() == "3 of 3 rows can be used."
    assert columns(load_qa(str(path), question_column="frage", answer_column="antwort")[0]) == PAIRS


def test_each_bad_row_is_counted_once_and_left_out(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"problem": "a", "answer": "1"},
        {"problem": "b", "answer": 2},
        {"problem": "c", "answer": 2.5},
        {"problem": ["d"], "answer": "1"},
        {"problem": "e", "answer": True},
        {"problem": "", "answer": 3},
        {"problem": " \n", "answer": "1"},
        {"problem": None, "answer": "1"},
        {"answer": "1"},
        {"problem": "f", "answer": None},
        {"problem": "g", "answer": "\t"},
        {"problem": "a ", "answer": "9"},
        {"problem": "a", "answer": "1"},
        {"problem": "h", "answer": "0"},
    ]
    dataset, report = load_qa(write(tmp_path / "rows.jsonl", rows))
    assert columns(dataset) == [("a", "1"), ("h", "0")]
    assert (report.rows_read, report.kept, report.non_string) == (14, 2, 5)
    assert (report.empty_question, report.empty_answer, report.repeated) == (3, 2, 2)
    for words in ("2 of 14 rows", "5 with a cell that is not text", "3 without a question", "in quotes"):
        assert words in report.describe()


def test_numbers_in_a_parquet_column_are_not_turned_into_text(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", [{"problem": "a", "answer": 1}, {"problem": "b", "answer": 2}])
    with pytest.raises(DataError, match=r"0 of 2 rows can be used; left out: 2 with a cell that is not text"):
        load_qa(path)


def test_csv_keeps_numbers_and_na_as_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("\ufeffproblem,answer\r\na,007\r\nb,NA\r\nc,1e3\r\nd,\r\ne\r\n".encode())
    dataset, report = load_qa(path)
    assert columns(dataset) == [("a", "007"), ("b", "NA"), ("c", "1e3")]
    assert report.empty_answer == 2


def test_limit_keeps_the_first_usable_rows(tmp_path: Path) -> None:
    rows = [{"problem": "a", "answer": ""}, *({"problem": str(i), "answer": "1"} for i in range(5))]
    dataset, report = load_qa(write(tmp_path / "rows.jsonl", rows), limit=2)
    assert dataset["problem"][:] == ["0", "1"]
    assert (report.rows_read, report.kept, report.empty_answer) == (3, 2, 1)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_without_a_trace_are_left_out_if_traces_are_asked_for(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"problem": problem, "answer": "1", "why": trace}
        for problem, trace in (("a", "Because."), ("b", ""), ("c", None), ("b", "So."), ("b", "Again."))
    ]
    path = write(tmp_path / f"rows{suffix}", rows)
    dataset, report = load_qa(path, solution_column="why")
    assert dataset[:] == {"problem": ["a", "b"], "answer": ["1", "1"], "solution": ["Because.", "So."]}
    assert (report.rows_read, report.empty_solution, report.repeated, report.solution_column) == (5, 2, 1, "why")
    assert report.describe() == (
        "2 of 5 rows can be used; left out: 2 without a reasoning trace, 1 whose question came before. "
        "CoT-based: the text holds the reasoning traces of column 'why'."
    )
    assert load_qa(path)[0].column_names == ["problem", "answer"]
    with pytest.raises(DataError, match="no column 'trace'"):
        load_qa(path, solution_column="trace")


def test_text_that_is_no_unicode_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "\\ud800", "answer": "1"}\n{"problem": "a", "answer": "1"}\n')
    dataset, report = load_qa(path)
    assert (dataset["problem"][:], report.unreadable) == (["a"], 1)


def test_fingerprint_is_of_the_rows_kept(tmp_path: Path) -> None:
    rows = [{"problem": q, "answer": a} for q, a in PAIRS]
    first = load_qa(write(tmp_path / "a.jsonl", rows))[1].fingerprint
    text = "".join(json.dumps([q, a]) + "\n" for q, a in PAIRS)
    assert first == hashlib.sha256(text.encode()).hexdigest()
    assert load_qa(write(tmp_path / "b.csv", [*rows, {"problem": "x", "answer": ""}]))[1].fingerprint == first
    assert load_qa(write(tmp_path / "c.jsonl", rows[::-1]))[1].fingerprint != first


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_questions_are_those_of_all_rows_whatever_the_answers(tmp_path: Path, suffix: str) -> None:
    rows = [{"frage": q, "antwort": a} for q, a in (("a", 1), ("b", 2), ("a", 3), ("", 4))]
    path = write(tmp_path / f"mine{suffix}", rows)
    for source in (path, str(path)):
        assert list(load_questions(source, "frage")) == ["a", "b", "a", ""]
    with pytest.raises(DataError, match=r"has no column 'problem'. Its columns: 'frage', 'antwort'"):
        list(load_questions(path))


def test_questions_keep_the_places_of_rows_without_one(tmp_path: Path) -> None:
    rows = [{"problem": None}, {"problem": 7}, {"answer": "1"}, {"problem": "a", "answer": ""}]
    assert list(load_questions(write(tmp_path / "rows.jsonl", rows))) == ["", "", "", "a"]
    for content in ([], rows[:3], [{"problem": " "}]):
        with pytest.raises(DataError, match="no row with a question, as text, in column 'problem'"):
            list(load_questions(write(tmp_path / "none.jsonl", content)))
    with pytest.raises(DataError, match="There is no file"):
        load_questions(tmp_path / "missing.jsonl")
    assert list(load_questions("tiny-reasoner"))[:9] == load_qa("tiny-reasoner", limit=9)[0]["problem"][:]


def test_tiny_reasoner_rows_are_verified_and_new_to_the_shipped_models() -> None:
    from resa_hf.tiny.task import training_questions

    dataset, report = load_qa("tiny-reasoner", limit=200)
    assert report.kept == report.rows_read == 200
    assert not set(dataset["problem"]) & training_questions()
    for question, answer in columns(dataset):
        value, chain = int(question[0]), question.removesuffix(" mod 10")[1:]
        for symbol, digit in zip(chain[::2], chain[1::2], strict=True):
            value = {"+": value + int(digit), "-": value - int(digit), "*": value * int(digit)}[symbol] % 10
        assert answer == str(value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "There is no file .*none.jsonl. Presets: still, deepscaler, .*limr, tiny-reasoner"),
        ("rows.xlsx", b"x", "only .jsonl, .csv, .parquet files can"),
        ("rows.jsonl", b"", r"rows.jsonl has no rows"),
        ("rows.jsonl", b'{"question": "a", "answer": "1"}', r"no column 'problem'. Its columns: 'question', 'answer'"),
        ("rows.jsonl", b'{"problem": "a", "answer": "1"}\n\n{oops\n', "Line 3 of .* is not JSON"),
        ("rows.jsonl", b'["a", "1"]', "Line 1 of .* is not a JSON object"),
        ("rows.jsonl", b'{"problem": "\xff"}', "cannot be read as .jsonl"),
        ("rows.csv", b"", r"rows.csv has no rows"),
        ("rows.csv", b"problem,answer\n", "has no rows"),
        ("rows.csv", b"problem;answer\na;1\n", r"Its columns: 'problem;answer'"),
        ("rows.csv", b"problem,answer\na,1,000\n", "Row 1 of .* more cells than the header"),
        ("rows.csv", b'problem,answer\n"a,1\n', "cannot be read as .csv"),
        ("rows.parquet", b"PAR1 no more", "cannot be read as .parquet"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_qa(tmp_path / name)


def test_other_bad_sources_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder; give one file"):
        load_qa(tmp_path)
    with pytest.raises(DataError, match="There is no file stil. Presets"):
        load_qa("stil")
    with pytest.raises(
        DataError, match=r"Hub dataset 'no-one/nothing' \(split 'train', revision 'main'\) cannot be loaded"
    ):
        load_qa("no-one/nothing")
    with pytest.raises(DataError, match="Hub dataset 'RUC-AIBOX/STILL-3-Preview-RL-Data'"):
        load_qa("still")
    with pytest.raises(DataError, match="limit is 0"):
        load_qa("tiny-reasoner", limit=0)
    with pytest.raises(DataError, match="both to be read from column 'answer'"):
        load_qa("tiny-reasoner", question_column="answer")


def test_hold_out_is_seeded_and_complete() -> None:
    dataset = datasets.Dataset.from_dict({"problem": [str(i) for i in range(50)], "answer": ["1"] * 50})
    train, held = hold_out(dataset, 10, seed=3)
    assert (len(train), len(held)) == (40, 10)
    assert sorted([*train["problem"], *held["problem"]], key=int) == dataset["problem"][:]
    assert train["problem"][:] == sorted(train["problem"], key=int)
    assert hold_out(dataset, 10, seed=3)[1]["problem"][:] == held["problem"][:]
    assert hold_out(dataset, 10, seed=4)[1]["problem"][:] != held["problem"][:]


def test_hold_out_keeps_a_question_on_one_side() -> None:
    dataset = datasets.Dataset.from_dict({"problem": ["a", "b", "a ", "c"] * 5, "answer": ["1", "2", "3", "4"] * 5})
    for seed in range(10):
        train, held = hold_out(dataset, 1, seed)
        assert len(train) + len(held) == 20
        assert not {q.strip() for q in train["problem"]} & {q.strip() for q in held["problem"]}


@pytest.mark.parametrize("size", [0, -1, 3, 4])
def test_hold_out_refuses_sizes_that_leave_nothing(size: int) -> None:
    dataset = datasets.Dataset.from_dict({"problem": ["a", "b", "c"], "answer": ["1"] * 3})
    with pytest.raises(DataError, match=f"Cannot hold out {size} of 3 questions"):
        hold_out(dataset, size, seed=0)
