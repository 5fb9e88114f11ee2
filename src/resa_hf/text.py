"""CoT-free text from question-answer rows, and its way into chunks of tokens."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import datasets

from .errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["paper", "chat"]

# The prompt of DeepSeek-R1 (huggingface.co/papers/2501.12948, table 1);
# its line breaks are the released Resa code's.
R1_PROMPT = """
A conversation between User and Assistant. The user asks a question, and the Assistant solves it.
The assistant first thinks about the reasoning process in the mind and then provides the user
with the answer. The reasoning process and answer are enclosed within <think> </think> and
<answer> </answer> tags, respectively, i.e., <think> reasoning process here </think>
<answer> answer here </answer>.
"""


@dataclass(frozen=True)
class TokenReport:
    """What became of the documents: how many tokens there are to train on.

    Args:
        documents (`int`):
            Documents read.
        tokens (`int`):
            Their tokens, the EOS at the end of each included.
        chunks (`int`):
            Rows to train on: chunks of exactly `max_length` tokens, or one a document.
        tokens_dropped (`int`):
            Tokens left out: behind the last full chunk, or behind the first `max_length` of a document.
        max_length (`int`):
            Tokens in a chunk; of a document at most.
        packed (`bool`):
            Whether documents were joined and cut into chunks.
    """

    documents: int
    tokens: int
    chunks: int
    tokens_dropped: int
    max_length: int
    packed: bool = True

    def describe(self) -> str:
        """One sentence, for a log line or a report."""
        if not self.packed:
            cut = f"{self.tokens_dropped:,} tokens cut off behind {self.max_length:,}"
            return f"{self.documents:,} documents, {self.tokens:,} tokens: one document a row, {cut}."
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens: {self.chunks:,} chunks of {self.max_length:,}, "
            f"{self.tokens_dropped:,} tokens left over."
        )


def evaluation_prompt(problem: str, *, template: Template, tokenizer: "PreTrainedTokenizerBase | None" = None) -> str:
    """The prompt of a question. It ends where the response begins, with `<think>` opened.

    The CoT-free text of the same question begins with it.

    Args:
        problem (`str`):
            The question.
        template (`str`):
            `"paper"` (the released Resa code's) or `"chat"` (the tokenizer's chat template).
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Needed for `"chat"`.

    Raises:
        `DataError`: if the template is unknown, or is `"chat"` and there is no tokenizer with a chat template.
    """
    if template == "paper":
        return f"{R1_PROMPT}User:\n {problem}\n\nAssistant:\n <think>"
    if template != "chat":
        raise DataError(f"Unknown template {template!r}. Valid: 'paper', 'chat'.")
    if tokenizer is None or not tokenizer.chat_template:
        raise DataError("Template 'chat' needs a tokenizer with a chat template. Use one, or template 'paper'.")
    message = [{"role": "user", "content": problem}]
    prompt = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    return prompt if prompt.rstrip().endswith("<think>") else f"{prompt}<think>"


def cot_free_text(
    problem: str, answer: str, *, template: Template, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> str:
    """The document that both stages train on: the question, and the answer in the place of the reasoning.

    Args:
        problem (`str`):
            The question.
        answer (`str`):
            The verified answer.
        template (`str`):
            `"paper"` or `"chat"`, as for `evaluation_prompt`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Needed for `"chat"`.

    Raises:
        `DataError`: as `evaluation_prompt` does.
    """
    prompt = evaluation_prompt(problem, template=template, tokenizer=tokenizer)
    if template == "paper":
        return f"{prompt} {answer} </think>\n<answer> Answer: {answer}</answer>"
    # Behind the chat template, not through it: DeepSeek-R1's drops everything before `</think>`.
    return f"{prompt}{answer}</think><answer>{answer}</answer>"


def add_text(
    dataset: datasets.Dataset, *, template: Template, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> datasets.Dataset:
    """Adds the column `text`, the CoT-free text of each row, to rows with `problem` and `answer`.

    Raises:
        `DataError`: as `evaluation_prompt` does.
    """
    text = [
        cot_free_text(problem, answer, template=template, tokenizer=tokenizer)
        for problem, answer in zip(dataset["problem"], dataset["answer"], strict=True)
    ]
    return dataset.add_column("text", text)


def encode_prompt(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The token ids of a prompt, with the tokenizer's BOS unless the prompt (a chat template) brings its own."""
    bos = _leading_bos(prompt, tokenizer)
    return [*bos, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]


def tokenize_and_pack(
    dataset: datasets.Dataset, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> tuple[datasets.Dataset, TokenReport]:
    """Joins documents, one EOS behind each, and cuts the stream into chunks of exactly `max_length` tokens.

    The chunks are the released code's: they may begin and end inside a document, nothing is padded, the short rest is
    left out, and where the tokenizer adds a BOS to a text, it opens each chunk and not each document. (Text from a
    chat template that writes the BOS itself keeps it, and the chunks get none.) Two differences: the released code
    writes its first EOS before the first document, and starts afresh every 2,048 documents.

    Args:
        dataset (`datasets.Dataset`):
            Documents, in the column `text`.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer, with an EOS token.
        max_length (`int`):
            Tokens in a chunk.

    Returns:
        `tuple[datasets.Dataset, TokenReport]`: the chunks, in the column `input_ids`, as `trl.SFTTrainer` and
        `Trainer` take them; and the counts.

    Raises:
        `DataError`: if the tokenizer has no EOS, or if the documents do not fill one chunk.
    """
    from trl import pack_dataset

    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("The tokenizer has no EOS token, so documents cannot be told apart. Set tokenizer.eos_token.")
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; a chunk needs at least 2 tokens.")
    texts = list(dataset["text"])
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False) if texts else {}
    documents = [ids if ids[-1:] == [eos] else [*ids, eos] for ids in encoded.get("input_ids", [])]
    tokens = sum(map(len, documents))
    bos = _leading_bos(texts[0], tokenizer) if texts else []
    length = max_length - len(bos)
    chunks = tokens // length
    if not chunks:
        raise DataError(
            f"{len(documents):,} documents of {tokens:,} tokens do not fill one chunk of {max_length:,}. "
            "Give more rows, or lower max_length."
        )
    # One batch: TRL cuts a short chunk at the end of each.
    packed = pack_dataset(
        datasets.Dataset.from_dict({"input_ids": documents}),
        length,
        "wrapped",
        {"batch_size": len(documents), "desc": "Packing"},
    ).select(range(chunks))
    if bos:
        packed = packed.map(lambda row: {"input_ids": [*bos, *row["input_ids"]]})
    return packed, TokenReport(len(documents), tokens, chunks, tokens - chunks * length, max_length)


def tokenize_documents(
    dataset: datasets.Dataset, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> tuple[datasets.Dataset, TokenReport]:
    """One document a row, with its BOS (if the tokenizer has one) and one EOS, cut at `max_length` tokens.

    For models that know single documents only; the paper joins them (`tokenize_and_pack`).

    Args, returns and errors are those of `tokenize_and_pack`; rows differ in length, so batches get padding.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("The tokenizer has no EOS token, so documents have no end. Set tokenizer.eos_token.")
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; a document needs at least 2 tokens.")
    documents = [encode_prompt(text, tokenizer) for text in dataset["text"]]
    documents = [ids if ids[-1:] == [eos] else [*ids, eos] for ids in documents]
    if not documents:
        raise DataError("There are no documents.")
    tokens = sum(map(len, documents))
    rows = [ids[:max_length] for ids in documents]
    report = TokenReport(len(rows), tokens, len(rows), tokens - sum(map(len, rows)), max_length, packed=False)
    return datasets.Dataset.from_dict({"input_ids": rows}), report


def _leading_bos(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The BOS that the tokenizer puts before a text, if it does so and the text does not begin with one."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos] or text.startswith(str(tokenizer.bos_token)):
        return []
    return [bos]
