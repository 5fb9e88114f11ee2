"""The data of a run: split by question, written as text, packed, and reported before anything is trained."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from ..arguments import DataArguments
from ..data import QAReport, hold_out, load_qa
from ..errors import DataError
from ..models import check_same_vocabulary, load_tokenizer
from ..on_disk import BATCH, write_arrow
from ..prose import load_prose
from ..text import Template, TokenReport, add_text, evaluation_prompt, tokenize_and_pack, tokenize_documents
from ..writing import writing
from .folder import RunFolder, read_json, reading_files, write_json
from .loading import load_answering_tokenizer
from .settings import RunArguments

MEASURED_DOCUMENTS = (
    256  # held-out documents on which FVU and KL are measured; the verdict uses all held-out questions
)


def prepare(
    folder: RunFolder, run: RunArguments, max_length: int, prose: bool = False, source_teaches: bool = False
) -> dict[str, Any]:
    """Writes the tokens of the training and held-out text, and the questions, unless they are there.

    Args:
        folder (`RunFolder`): where.
        run (`RunArguments`): which data.
        max_length (`int`): tokens in a row.
        prose (`bool`, *optional*, defaults to `False`): whether plain text is needed, too.
        source_teaches (`bool`, *optional*, defaults to `False`): whether the source is some arm's teacher, or writes
            its text; its special tokens must then be the target's, too.

    Returns:
        `dict`: what was read, kept, left out and counted; also in `data/data.json`.

    Raises:
        `DataError`: if the data cannot be used.
        `ValueError`: if source and target have different tokenizers.
    """
    rows, qa = load_rows(run)
    trigger, trigger_qa = rows, qa
    if run.trigger_dataset is not None:
        trigger, trigger_qa = load_rows(replace(run, dataset=run.trigger_dataset, dataset_revision=None))
    if folder.data("data.json").is_file() and folder.data("questions.json").is_file():
        report: dict[str, Any] = read_json(folder.data("data.json"))
        with reading_files(folder.data("data.json")):
            before, has_prose = (report["fingerprint"], report["trigger_fingerprint"]), "prose" in report["tokens"]
        if before != (qa.fingerprint, trigger_qa.fingerprint):
            raise DataError(
                f"{run.dataset} has changed since the run in {folder.root} was started. Choose another "
                "--output_dir, or delete the folder."
            )
        if not prose or has_prose:
            return report
    tokenizer = load_tokenizer(run.model_name_or_path, revision=run.model_revision)
    _check_tokenizers(run, tokenizer, source_teaches)
    train, held_out, selection = split_rows(rows, run, run.selection)
    assert held_out is not None, "checked with the settings"
    questions = {"held_out": _questions(held_out, run.template, load_answering_tokenizer(run))}
    if selection is not None:
        questions["selection"] = _questions(selection, run.template, tokenizer)
    parts = {"train": train, "held_out": held_out.select(range(min(len(held_out), MEASURED_DOCUMENTS)))}
    if run.trigger_dataset is not None:
        kept_out = {question["problem"].strip() for split in questions.values() for question in split}
        parts["trigger"] = trigger.filter(lambda problem: problem.strip() not in kept_out, input_columns="problem")
    tokens = {name: _write_tokens(folder, name, part, run, tokenizer, max_length) for name, part in parts.items()}
    if prose:
        tokens["prose"] = _write_prose(folder, run, tokenizer, max_length)
    report = _read(run, qa, trigger_qa) | {
        "train_rows": len(train),
        "held_out_rows": len(held_out),
        "selection_rows": len(questions.get("selection", [])),
        "tokens": tokens,
    }
    write_json(folder.data("questions.json"), questions)
    write_json(folder.data("data.json"), report)
    return report


def split_rows(
    rows: datasets.Dataset, data: DataArguments, selection: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset | None, datasets.Dataset | None]:
    """Rows to train on, the first `train_rows` of those that are left; held-out ones; and so many for `selection`.

    Where none are asked for, they are `None`. The same numbers give the same questions, whoever asks.
    """
    held_out = chosen_on = None
    if data.held_out:
        rows, held_out = hold_out(rows, data.held_out, data.split_seed)
    if selection:
        rows, chosen_on = hold_out(rows, selection, data.split_seed)
    if data.train_rows is not None:
        rows = rows.select(range(min(len(rows), data.train_rows)))
    return rows, held_out, chosen_on


def told_of(data: DataArguments, qa: QAReport) -> dict[str, str]:
    """What was read, in words, as the reports of single stages have it."""
    told = {"dataset": data.dataset, "fingerprint": qa.fingerprint, "rows": qa.describe()}
    return told | {f"dataset_{name}": part for name, part in (("repo", qa.repo), ("commit", qa.commit)) if part}


def training_questions(run: RunArguments, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """The training questions, each with its `answer` and the `prompt` that evaluation would give."""
    train, _, _ = split_rows(load_rows(run)[0], run, run.selection)
    return _questions(train, run.template, tokenizer)


def _read(run: RunArguments, qa: QAReport, trigger_qa: QAReport) -> dict[str, Any]:
    """What was read."""
    return {
        "dataset": run.dataset,
        "dataset_repo": qa.repo,
        "dataset_commit": qa.commit,
        "trigger_dataset": run.trigger_dataset,
        "trigger_dataset_repo": trigger_qa.repo,
        "trigger_dataset_commit": trigger_qa.commit,
        "solution_column": run.solution_column,
        "rows": qa.describe(),
        "rows_read": qa.rows_read,
        "kept": qa.kept,
        "fingerprint": qa.fingerprint,
        "trigger_fingerprint": trigger_qa.fingerprint,
    }


def _check_tokenizers(run: RunArguments, tokenizer: PreTrainedTokenizerBase, source_teaches: bool) -> None:
    # A source that is read, and a sibling that is moved to, may name their special tokens otherwise (Table 5's do).
    others = (
        (run.source_model, run.source_revision, source_teaches),
        (run.evaluate_on, run.evaluate_on_revision, False),
    )
    for name, revision, added in others:
        if name is not None:
            check_same_vocabulary(tokenizer, load_tokenizer(name, revision=revision), added=added)


def _write_tokens(
    folder: RunFolder,
    name: str,
    rows: datasets.Dataset,
    run: RunArguments,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> dict[str, Any]:
    tokenized, counted = tokenize(rows, run, tokenizer, max_length)
    save_rows(tokenized, folder.data(name))
    return {
        "rows": len(rows),
        "tokens": counted.tokens,
        "chunks": counted.chunks,
        "describe": counted.describe(),
    }


def _write_prose(
    folder: RunFolder, run: RunArguments, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Any]:
    """Prose in rows as many and as long as those of the questions: an SAE that saw more would not be matched."""
    questions = read_rows(folder.data("trigger" if run.trigger_dataset else "train"))
    tokenized, _ = tokenize_text(load_prose(run.prose), run, tokenizer, max_length)
    available, tokens = (sum(len(ids) for ids in _token_rows(rows)) for rows in (tokenized, questions))
    if available < tokens:
        raise DataError(
            f"{run.prose} has {available:,} tokens of prose, but the SAE of the questions reads {tokens:,}: name "
            "a longer text in `prose`."
        )
    stream = chain.from_iterable(_token_rows(tokenized))
    rows = ([list(islice(stream, len(ids)))] for ids in _token_rows(questions))
    save_rows(write_arrow(rows, questions.features.arrow_schema), folder.data("prose"))
    told = f"{tokens:,} tokens of prose."
    return {"rows": len(questions), "tokens": tokens, "chunks": len(questions), "describe": told}


def _token_rows(rows: datasets.Dataset) -> Iterator[list[int]]:
    return chain.from_iterable(batch["input_ids"] for batch in rows.iter(BATCH))


def load_rows(data: DataArguments) -> tuple[datasets.Dataset, QAReport]:
    """The rows that the arguments name, as `load_qa` reads them."""
    return load_qa(
        data.dataset,
        question_column=data.question_column,
        answer_column=data.answer_column,
        solution_column=data.solution_column,
        split=data.dataset_split,
        revision=data.dataset_revision,
        limit=data.limit,
    )


def tokenize(
    rows: datasets.Dataset, data: DataArguments, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[datasets.Dataset, TokenReport]:
    """The text of rows, as `add_text` writes it, as tokens: chunks of exactly `max_length`, or one document a row."""
    return tokenize_text(add_text(rows, template=data.template, tokenizer=tokenizer), data, tokenizer, max_length)


def tokenize_text(
    text: datasets.Dataset, data: DataArguments, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[datasets.Dataset, TokenReport]:
    """Rows with a column `text` as tokens: chunks of exactly `max_length`, or one document a row."""
    return (tokenize_and_pack if data.pack else tokenize_documents)(text, tokenizer, max_length)


def _questions(rows: datasets.Dataset, template: Template, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    return [
        {**row, "prompt": evaluation_prompt(row["problem"], template=template, tokenizer=tokenizer)} for row in rows
    ]


def save_rows(tokenized: datasets.Dataset, path: Path) -> None:
    """Writes rows of tokens into a folder, in the place of what is there."""
    with writing(path):
        shutil.rmtree(path, ignore_errors=True)
        tokenized.save_to_disk(path)


def read_rows(path: Path) -> datasets.Dataset:
    """The rows that `save_rows` wrote.

    Raises:
        `DataError`: if they are damaged.
    """
    try:
        rows = datasets.load_from_disk(path).with_format(None)
        rows.data.table.validate(full=True)
        if not len(rows) or "input_ids" not in rows.column_names:
            raise ValueError("no rows of tokens")
    except Exception as error:  # broken files break `datasets` and Arrow in any way
        raise DataError(
            f"The rows in {path} are missing or damaged ({type(error).__name__}: {error}). Delete {path.parent}, and "
            "start the same command again: it makes them anew."
        ) from error
    return rows


def describe(report: dict[str, Any]) -> str:
    """The report in three lines, for people."""
    return (
        f"Data: {report['rows']}\n"
        f"  train: {report['train_rows']:,} rows; {report['tokens']['train']['describe']}\n"
        f"  held out: {report['held_out_rows']:,} rows for the verdict, "
        f"{report['selection_rows']:,} for the learning rate."
    )
