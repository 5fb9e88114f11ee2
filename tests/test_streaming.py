"""Rows and tokens that pass through memory in batches: the same as if all were held, and memory stays flat."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_text import make_tokenizer

from resa_hf.data import hold_out, load_qa
from resa_hf.errors import DataError
from resa_hf.on_disk import BATCH, Numbering, rows_forgotten, write_arrow
from resa_hf.text import add_text, cot_free_text, tokenize_and_pack, tokenize_documents


def random_rows(count: int, seed: int) -> list[dict[str, str | None]]:
    rng = random.Random(seed)
    questions = [None, "", " ", *(f"{number}? {'x' * (number % 40)}" for number in range(count))]
    return [
        {"problem": rng.choice(questions), "answer": rng.choice(["1", "22", "3/4", "", None])} for _ in range(count)
    ]


def naive(rows: list[dict[str, Any]], limit: int | None) -> tuple[list[tuple[str, str]], str]:
    kept: dict[str, tuple[str, str]] = {}
    for row in rows:
        question, answer = row["problem"] or "", row["answer"] or ""
        if question.strip() and answer.strip() and question.strip() not in kept:
            kept[question.strip()] = (question, answer)
    pairs = list(kept.values())[:limit]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    return pairs, hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize("limit", [None, 1, BATCH, BATCH + 1])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_those_of_a_naive_reading(kind: str, limit: int | None, tmp_path: Path) -> None:
    rows = random_rows(8 * BATCH, seed=1)
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)
    dataset, report = load_qa(path, limit=limit)
    pairs, fingerprint = naive(rows, limit)
    assert len(naive(rows, None)[0]) > 2 * BATCH
    assert list(zip(dataset["problem"], dataset["answer"], strict=True)) == pairs
    assert report.fingerprint == fingerprint


@pytest.mark.parametrize("size", [1, 7, 300])
def test_held_out_questions_are_those_of_a_naive_draw(size: int) -> None:
    problems = [f"{number % 700} " if number % 3 else str(number % 700) for number in range(3 * BATCH)]
    dataset = datasets.Dataset.from_dict({"problem": problems, "row": list(range(len(problems)))})
    distinct = list(dict.fromkeys(problem.strip() for problem in problems))
    drawn = set(random.Random(5).sample(distinct, size))
    wanted = [row for row, problem in enumerate(problems) if problem.strip() in drawn]
    train, held = hold_out(dataset, size, seed=5)
    assert held["row"][:] == wanted
    assert train["row"][:] == sorted(set(range(len(problems))) - set(wanted))


@pytest.mark.parametrize("adds_bos", [False, True])
def test_tokens_are_those_of_one_long_text(adds_bos: bool) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    rows = datasets.Dataset.from_dict(
        {"problem": [f"{n}?" * (n % 9) for n in range(BATCH + 9)], "answer": ["1"] * (BATCH + 9)}
    ).select(range(1, BATCH + 6))
    texts = [cot_free_text(problem, "1", template="paper") for problem in rows["problem"]]
    with_text = add_text(rows, template="paper")
    assert with_text["text"][:] == texts

    stream = [token for text in texts for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]]
    length = 100 - adds_bos
    whole = len(stream) // length
    chunks, report = tokenize_and_pack(with_text, tokenizer, 100)
    assert chunks["input_ids"][:] == [[1] * adds_bos + stream[n * length :][:length] for n in range(whole)]
    assert (report.documents, report.tokens) == (len(texts), len(stream))

    documents, _ = tokenize_documents(with_text, tokenizer, 450)
    assert documents["input_ids"][:] == [[*tokenizer(text)["input_ids"], 2][:450] for text in texts]


def test_prose_comes_in_rows_as_long_as_those_of_the_questions(tmp_path: Path) -> None:
    from resa_hf.experiment.folder import RunFolder
    from resa_hf.experiment.prepare import prepare, tokenize_text
    from resa_hf.experiment.settings import RunArguments
    from resa_hf.models import load_tokenizer
    from resa_hf.prose import load_prose

    text = tmp_path / "prose.txt"
    text.write_text("\n\n".join(f"{number} and more, {'on ' * (number % 7)}." for number in range(400)))
    data = {"dataset": "tiny-reasoner", "limit": 90, "held_out": 20, "template": "chat", "pack": False}
    run = RunArguments(model_name_or_path="resa_hf/tiny/base", prose=str(text), **data)
    folder = RunFolder(tmp_path / "run")
    prepare(folder, run, 24, prose=True)
    train, prose = (datasets.load_from_disk(folder.data(name))["input_ids"][:] for name in ("train", "prose"))
    assert [len(ids) for ids in prose] == [len(ids) for ids in train]
    tokens, _ = tokenize_text(load_prose(text), run, load_tokenizer("resa_hf/tiny/base"), 24)
    stream = [token for ids in tokens["input_ids"] for token in ids]
    assert [token for ids in prose for token in ids] == stream[: sum(map(len, train))]

    text.write_text("Too short.")
    with pytest.raises(DataError, match=r"prose.txt has \d+ tokens of prose, but the SAE of the questions reads"):
        prepare(RunFolder(tmp_path / "other"), run, 24, prose=True)


@pytest.mark.parametrize(("suffix", "line"), [("jsonl", '{"problem": "%d", "answer": "1"}'), ("csv", "%d,1")])
def test_nothing_is_read_behind_the_limit(suffix: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    header = "problem,answer\n" if suffix == "csv" else ""
    path.write_text(header + "".join(f"{line % n}\n" for n in range(2_000)) + 'broken "{,,\n')
    assert load_qa(path, limit=1_500)[1].rows_read == 1_500
    with pytest.raises(DataError):
        load_qa(path)


def test_texts_are_numbered_in_the_order_in_which_they_come() -> None:
    rng = random.Random(0)
    texts = [str(rng.randrange(3_000)) for _ in range(9_000)]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    with Numbering() as numbering:
        assert [numbering(text) for text in texts] == [numbers[text] for text in texts]
        assert len(numbering) == len(numbers)


def test_a_disk_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(DataError, match="Rows cannot be written to .*none: .*set TMPDIR to a larger disk"):
        write_arrow([["a"]], pa.schema([("text", pa.string())]))


def test_rows_are_forgotten_where_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    schema = pa.schema([("text", pa.string())])
    kept = write_arrow([["outside"]], schema)
    with rows_forgotten():
        first = write_arrow([["a"]], schema)
        with rows_forgotten():
            assert write_arrow([["b"]], schema)["text"] == ["b"]
        assert len(list(tmp_path.iterdir())) == 2 and first["text"] == ["a"]
    assert len(list(tmp_path.iterdir())) == 1 and kept["text"] == ["outside"]


MEASURE = """
import sys, threading, time
from resa_hf.data import hold_out, load_qa
from resa_hf.models import load_tokenizer
from resa_hf.text import add_text, tokenize_and_pack

def private_mib():  # not the pages of mapped files, which the system takes back when it needs them
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

def work(path):
    rows, _ = load_qa(path)
    train, _ = hold_out(rows, 200, seed=0)
    tokenize_and_pack(add_text(train, template="chat", tokenizer=tokenizer), tokenizer, 64)

def watch():
    while running:
        peaks.append(private_mib())
        time.sleep(0.005)

tokenizer = load_tokenizer("resa_hf/tiny/base")
for path in sys.argv[1:]:
    running, peaks = True, []
    thread = threading.Thread(target=watch)
    thread.start()
    work(path)
    running = False
    thread.join()
    print(max(peaks))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    paths = []
    for count in (1_000, 5_000, 60_000):
        paths.append(tmp_path / f"{count}.jsonl")
        with paths[-1].open("w") as file:
            for number in range(count):
                file.write(json.dumps({"problem": f"{number}+" + "1+" * 40, "answer": str(number)}) + "\n")
    command = [sys.executable, "-c", MEASURE, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    _, small, large = map(float, done.stdout.split())
    # Held in memory, the tokens alone would take 50 MiB.
    assert large - small < 20
