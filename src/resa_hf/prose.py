"""Plain text to train an SAE on that has seen no reasoning task: the `prose_sae` control."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import datasets
from datasets.exceptions import DatasetsError

from .errors import DataError
from .sources import SUFFIXES

PYTHON_DOCS = "python-docs"


def load_prose(source: str | Path = PYTHON_DOCS) -> datasets.Dataset:
    """Reads plain text.

    Args:
        source (`str` or `Path`, *optional*, defaults to `"python-docs"`):
            A text file in UTF-8, whose paragraphs are the documents; the id of a Hub dataset with a column `text` and
            a split `train`, whose rows are; or `"python-docs"`, the paragraphs of the language reference that comes
            with Python (about 460,000 characters, mostly English; it differs between Python versions).

    Returns:
        `datasets.Dataset`: the documents that are not blank, in the column `text`.

    Raises:
        `DataError`: if the source cannot be read, lacks the column, or has no text.
    """
    path = Path(source).expanduser()
    documents: Iterable[object]
    if source == PYTHON_DOCS:
        from pydoc_data.topics import topics

        documents = _paragraphs("\n\n".join(topics.values()))
    elif path.suffix.lower() in SUFFIXES:
        raise DataError(f"{source} holds rows; prose is read from a text file, a Hub dataset, or {PYTHON_DOCS!r}.")
    elif os.path.isfile(path):
        try:
            documents = _paragraphs(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{source} cannot be read as text in UTF-8: {error}") from error
    else:
        documents = _hub_texts(str(source))
    kept = [text for text in documents if isinstance(text, str) and text.strip()]
    if not kept:
        raise DataError(f"{source} has no text.")
    return datasets.Dataset.from_dict({"text": kept})


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text)


def _hub_texts(repo: str) -> Iterable[object]:
    try:
        dataset = datasets.load_dataset(repo, split="train")
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"There is no file {repo}, and no Hub dataset of that name can be loaded: {error} "
            f"Without a network, {PYTHON_DOCS!r} is always there."
        ) from error
    if "text" not in dataset.column_names:
        raise DataError(f"{repo} has no column 'text'. Its columns: {', '.join(map(repr, dataset.column_names))}.")
    return dataset["text"]
