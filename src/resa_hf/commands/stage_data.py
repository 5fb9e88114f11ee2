"""The text of a single stage: read, split, packed, and reported before training starts."""

import datasets
from transformers import PreTrainedTokenizerBase

from ..arguments import DataArguments
from ..data import hold_out, load_qa
from ..text import add_text, tokenize_and_pack, tokenize_documents


def packed_text(
    data: DataArguments, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[datasets.Dataset, datasets.Dataset | None, dict[str, str]]:
    """Returns the packed training and held-out text (`None` if nothing is held out) and what was read, in sentences.

    Raises:
        `DataError`: if the data cannot be used.
    """
    rows, qa = load_qa(
        data.dataset,
        question_column=data.question_column,
        answer_column=data.answer_column,
        split=data.dataset_split,
        revision=data.dataset_revision,
        limit=data.limit,
    )
    told = {"dataset": data.dataset, "fingerprint": qa.fingerprint, "rows": qa.describe()}
    parts = {"train": rows}
    if data.held_out:
        parts["train"], parts["held_out"] = hold_out(rows, data.held_out, data.split_seed)
    packed = {}
    for name, part in parts.items():
        text = add_text(part, template=data.template, tokenizer=tokenizer)
        packed[name], counted = (tokenize_and_pack if data.pack else tokenize_documents)(text, tokenizer, max_length)
        told[name] = counted.describe()
    for name, sentence in told.items():
        print(f"{name}: {sentence}", flush=True)
    return packed["train"], packed.get("held_out"), told
