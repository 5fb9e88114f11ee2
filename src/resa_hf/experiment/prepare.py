"""The data of a run: split by question, written as CoT-free text, packed, and reported before anything is trained."""

import shutil
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from ..arguments import DataArguments
from ..data import QAReport, hold_out, load_qa
from ..errors import DataError
from ..models import check_same_vocabulary, load_tokenizer
from ..text import Template, TokenReport, add_text, evaluation_prompt, tokenize_and_pack, tokenize_documents
from .folder import RunFolder, read_json, write_json
from .settings import RunArguments

MEASURED_DOCUMENTS = (
    256  # held-out documents on which FVU and KL are measured; the verdict uses all held-out questions
)


def prepare(folder: RunFolder, run: RunArguments, max_length: int) -> dict[str, Any]:
    """Writes the packed training and held-out text and the questions, unless they are there.

    Returns:
        `dict`: what was read, kept, left out and counted; also in `data/data.json`.

    Raises:
        `DataError`: if the data cannot be used.
        `ValueError`: if source and target have different tokenizers.
    """
    rows, qa = load_rows(run)
    if folder.data("data.json").is_file():
        report: dict[str, Any] = read_json(folder.data("data.json"))
        if report["fingerprint"] != qa.fingerprint:
            raise DataError(
                f"{run.dataset} has changed since the run in {folder.root} was started. Choose another "
                "--output_dir, or delete the folder."
            )
        return report
    tokenizer = load_tokenizer(run.model_name_or_path, revision=run.model_revision)
    if run.source_model is not None:
        check_same_vocabulary(tokenizer, load_tokenizer(run.source_model, revision=run.source_revision))
    train, held_out = hold_out(rows, run.held_out, run.split_seed)
    questions = {"held_out": _questions(held_out, run.template, tokenizer)}
    if run.selection:
        train, selection = hold_out(train, run.selection, run.split_seed)
        questions["selection"] = _questions(selection, run.template, tokenizer)
    tokens = {}
    measured = held_out.select(range(min(len(held_out), MEASURED_DOCUMENTS)))
    for name, part in (("train", train), ("held_out", measured)):
        tokenized, counted = tokenize(part, run, tokenizer, max_length)
        _save(tokenized, folder.data(name))
        tokens[name] = {"tokens": counted.tokens, "chunks": counted.chunks, "describe": counted.describe()}
    report = {
        "dataset": run.dataset,
        "rows": qa.describe(),
        "rows_read": qa.rows_read,
        "kept": qa.kept,
        "fingerprint": qa.fingerprint,
        "train_rows": len(train),
        "held_out_rows": len(held_out),
        "selection_rows": len(questions.get("selection", [])),
        "tokens": tokens,
    }
    write_json(folder.data("questions.json"), questions)
    write_json(folder.data("data.json"), report)
    return report


def load_rows(data: DataArguments) -> tuple[datasets.Dataset, QAReport]:
    """The rows that the arguments name, as `load_qa` reads them."""
    return load_qa(
        data.dataset,
        question_column=data.question_column,
        answer_column=data.answer_column,
        split=data.dataset_split,
        revision=data.dataset_revision,
        limit=data.limit,
    )


def tokenize(
    rows: datasets.Dataset, data: DataArguments, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[datasets.Dataset, TokenReport]:
    """The CoT-free text of rows as tokens: chunks of exactly `max_length`, or one document a row."""
    text = add_text(rows, template=data.template, tokenizer=tokenizer)
    return (tokenize_and_pack if data.pack else tokenize_documents)(text, tokenizer, max_length)


def _questions(rows: datasets.Dataset, template: Template, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    return [
        {**row, "prompt": evaluation_prompt(row["problem"], template=template, tokenizer=tokenizer)} for row in rows
    ]


def _save(packed: datasets.Dataset, path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    packed.save_to_disk(path)


def describe(report: dict[str, Any]) -> str:
    """The report in three lines, for people."""
    return (
        f"Data: {report['rows']}\n"
        f"  train: {report['train_rows']:,} rows; {report['tokens']['train']['describe']}\n"
        f"  held out: {report['held_out_rows']:,} rows for the verdict, "
        f"{report['selection_rows']:,} for the learning rate."
    )
