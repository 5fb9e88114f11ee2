"""From rows to tokens: what is kept of any rows, and that no token is lost, doubled or moved. Against plain loops."""

import csv
import json
import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler

from resa_hf.data import hold_out, load_qa
from resa_hf.errors import DataError
from resa_hf.experiment.response_only import mark_responses
from resa_hf.sharding import EachRowOnce
from resa_hf.text import (
    cot_free_text,
    cot_text,
    encode_prompt,
    evaluation_prompt,
    rows_of_tokens,
    tokenize_and_pack,
    tokenize_documents,
)
from resa_hf.tuning.collator import HostCollator

documents = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=9), min_size=1, max_size=8)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
texts = st.sampled_from(["1+1", " 1+1 ", "2", "", " \n", "ü“"]) | words
cells = (
    texts
    | st.none()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.booleans()
    | st.lists(st.integers(), max_size=2)
)


def said(problem):
    """A question of letters that every tokenizer has."""
    return f"{problem!r:.20}".encode("ascii", "replace").decode()


@given(documents, st.integers(2, 7))
def test_packing_keeps_every_token_in_its_order(documents, length):
    stream = [token for document in documents for token in document]
    full = len(stream) // length
    if not full:
        with pytest.raises(DataError, match=f"{len(stream)} tokens do not fill one chunk of {length}"):
            rows_of_tokens(documents, length, pack=True)
        return
    rows, report = rows_of_tokens(documents, length, pack=True)
    assert rows["input_ids"][:] == [stream[length * i : length * (i + 1)] for i in range(full)]
    told = (report.documents, report.tokens, report.chunks, report.tokens_dropped)
    assert told == (len(documents), len(stream), full, len(stream) - full * length)


@given(documents, st.integers(2, 7))
def test_one_document_a_row_is_cut_behind_the_limit(documents, length):
    rows, report = rows_of_tokens(documents, length, pack=False)
    assert rows["input_ids"][:] == [document[:length] for document in documents]
    assert report.tokens == sum(map(len, documents))
    assert report.tokens - report.tokens_dropped == sum(map(len, rows["input_ids"]))


@given(st.lists(words, min_size=1, max_size=6), st.integers(3, 9))
def test_texts_are_joined_with_one_end_behind_each(tiny_tokenizer, texts, length):
    eos = tiny_tokenizer.eos_token_id
    ids = [tiny_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ended = [document if document[-1:] == [eos] else [*document, eos] for document in ids]
    dataset = datasets.Dataset.from_dict({"text": texts})
    rows, report = tokenize_documents(dataset, tiny_tokenizer, length)
    assert rows["input_ids"][:] == [document[:length] for document in ended]
    stream = [*chain.from_iterable(ended)]
    if len(stream) < length:
        with pytest.raises(DataError, match="do not fill one chunk"):
            tokenize_and_pack(dataset, tiny_tokenizer, length)
        return
    rows, report = tokenize_and_pack(dataset, tiny_tokenizer, length)
    assert [*chain.from_iterable(rows["input_ids"])] == stream[: len(stream) // length * length]
    assert set(map(len, rows["input_ids"])) == {length} and report.documents == len(texts)


@given(words, words, words, st.sampled_from(["paper", "chat"]))
def test_the_text_begins_with_the_prompt_of_evaluation(tiny_tokenizer, problem, answer, trace, template):
    prompt = evaluation_prompt(problem, template=template, tokenizer=tiny_tokenizer)
    text = cot_text(problem, trace, answer, template=template, tokenizer=tiny_tokenizer)
    assert text.startswith(prompt) and prompt.rstrip().endswith("<think>") and problem in prompt
    before, _, behind = text[len(prompt) :].rpartition("</think>")
    assert before.strip() == trace.strip() and behind.strip().startswith("<answer>") and answer in behind
    free = cot_free_text(problem, answer, template=template, tokenizer=tiny_tokenizer)
    assert free == cot_text(problem, answer, answer, template=template, tokenizer=tiny_tokenizer)


def expected(rows):
    """What can be used of rows, and how many are left out for which reason."""
    kept, seen, counts = [], set(), Counter()
    for problem, answer in rows:
        cells = ["" if cell is None else cell for cell in (problem, answer)]
        if not all(isinstance(cell, str) for cell in cells):
            counts["non_string"] += 1
        elif not cells[0].strip():
            counts["empty_question"] += 1
        elif not cells[1].strip():
            counts["empty_answer"] += 1
        elif cells[0].strip() in seen:
            counts["repeated"] += 1
        else:
            seen.add(cells[0].strip())
            kept.append({"problem": cells[0], "answer": cells[1]})
    return kept, counts


def check(path, rows):
    kept, counts = expected(rows)
    if not kept:
        with pytest.raises(DataError):
            load_qa(path)
        return
    found, report = load_qa(path)
    assert found.to_list() == kept and (report.rows_read, report.kept) == (len(rows), len(kept))
    reasons = ("unreadable", "non_string", "empty_question", "empty_answer", "repeated")
    assert {name: count for name in reasons if (count := getattr(report, name))} == counts
    # The first ones, and nothing behind them.
    first, _ = load_qa(path, limit=1)
    assert first.to_list() == kept[:1]


@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=8))
def test_rows_of_json_are_kept_or_counted(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        path.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in rows))
        check(path, rows)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8))
def test_every_format_gives_the_same_rows(rows):
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(
            pa.table({"problem": [p for p, _ in rows], "answer": [a for _, a in rows]}), Path(folder, "rows.parquet")
        )
        check(Path(folder, "rows.parquet"), rows)
        # What a CSV file can hold: no NUL, and line breaks as they are.
        rows = [tuple(cell.replace("\0", "") for cell in row) for row in rows]
        with Path(folder, "rows.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("problem", "answer"), *rows])
        check(Path(folder, "rows.csv"), rows)


@given(
    st.lists(st.sampled_from(["a", "b", " b", "c", "d", "e"]), min_size=1, max_size=9),
    st.integers(0, 6),
    st.integers(0, 5),
)
def test_no_question_is_on_both_sides(problems, size, seed):
    rows = datasets.Dataset.from_dict({"problem": problems, "n": list(range(len(problems)))})
    questions = {problem.strip() for problem in problems}
    if not 1 <= size < len(questions):
        with pytest.raises(DataError, match=f"hold out {size} of {len(questions)}"):
            hold_out(rows, size, seed)
        return
    train, held = hold_out(rows, size, seed)
    sides = [{problem.strip() for problem in part["problem"]} for part in (train, held)]
    assert len(sides[1]) == size and not sides[0] & sides[1]
    assert sorted([*train["n"], *held["n"]]) == list(range(len(problems)))
    assert list(train["n"]) == sorted(train["n"]) and list(held["n"]) == sorted(held["n"])
    assert list(hold_out(rows, size, seed)[1]["n"]) == list(held["n"])


@given(st.lists(st.tuples(words, words, st.booleans()), min_size=1, max_size=5))
def test_responses_are_marked_behind_their_prompts(tiny_tokenizer, asked):
    prompts = [f"{number}{said(problem)}" for number, (problem, _, _) in enumerate(asked)]
    encoded = [encode_prompt(prompt, tiny_tokenizer) for prompt in prompts]
    behind = [tiny_tokenizer(answer, add_special_tokens=False)["input_ids"] for _, answer, _ in asked]
    used = [number for number, (_, _, is_used) in enumerate(asked) if is_used]
    if not used:
        return
    rows = datasets.Dataset.from_dict({"input_ids": [encoded[n] + behind[n] for n in used]})
    marked = mark_responses(rows, prompts, tiny_tokenizer)
    assert marked["input_ids"][:] == rows["input_ids"][:]
    wanted = [[0] * len(encoded[n]) + [1] * len(behind[n]) for n in used]
    assert marked["completion_mask"][:] == wanted


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 6))
def test_every_row_goes_to_one_process(rows, batch, processes):
    batches = BatchSampler(SequentialSampler(range(rows)), batch, drop_last=False)
    shards = []
    for index in range(processes):
        shard = BatchSamplerShard(batches, processes, index, even_batches=True)
        shard.__class__ = EachRowOnce
        shards.append(list(shard))
        assert len(shard) == len(shards[-1])
    assert sorted(row for shard in shards for taken in shard for row in taken) == list(range(rows))
    # All reduce gradients together, and a round is a round of the batches in their order.
    assert len(set(map(len, shards))) == 1
    assert [taken for turn in zip(*shards, strict=True) for taken in turn if taken] == list(batches)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=4), st.data())
def test_the_positions_that_count_are_those_before_a_label(rows, data):
    labels = [[data.draw(st.sampled_from([-100, token])) for token in row] for row in rows]
    width = max(map(len, rows))
    padded = [row + [-100] * (width - len(row)) for row in labels]

    def collate(examples):
        return {"input_ids": torch.zeros(len(rows), width), "labels": torch.tensor(padded)}

    batch = HostCollator(collate, keys=False)([{"input_ids": row} for row in rows])
    wanted = [r * (width - 1) + t for r in range(len(rows)) for t in range(width - 1) if padded[r][t + 1] != -100]
    assert batch["counted"].tolist() == wanted
