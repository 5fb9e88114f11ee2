"""CoT-free text from question-answer rows, and its way into chunks of tokens."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import datasets
import pyarrow as pa

from .errors import DataError
from .on_disk import BATCH, write_arrow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["paper", "chat"]

_TOKENS = pa.schema([("input_ids", pa.list_(pa.int32()))])

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
    return cot_text(problem, answer, answer, template=template, tokenizer=tokenizer)


def cot_text(
    problem: str, trace: str, answer: str, *, template: Template, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> str:
    """The document of the paper's CoT-based SFT ablation: a reasoning trace stands between the think tags.

    Args:
        trace (`str`):
            The reasoning.

    The other args and the errors are those of `cot_free_text`.
    """
    prompt = evaluation_prompt(problem, template=template, tokenizer=tokenizer)
    if template == "paper":
        return f"{prompt} {trace} </think>\n<answer> Answer: {answer}</answer>"
    # Behind the chat template, not through it: DeepSeek-R1's drops everything before `</think>`.
    return f"{prompt}{trace}</think><answer>{answer}</answer>"


def add_text(
    dataset: datasets.Dataset, *, template: Template, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> datasets.Dataset:
    """Adds the column `text` to rows with `problem` and `answer`: CoT-based where they have `solution`, else CoT-free.

    Raises:
        `DataError`: as `evaluation_prompt` does.
    """
    trace = "solution" if "solution" in dataset.column_names else "answer"

    def rows() -> Iterator[list[str]]:
        for batch in dataset.iter(BATCH):
            for cells in zip(*batch.values(), strict=True):
                row = dict(zip(batch, cells, strict=True))
                text = cot_text(row["problem"], row[trace], row["answer"], template=template, tokenizer=tokenizer)
                yield [*cells, text]

    return write_arrow(rows(), dataset.features.arrow_schema.append(pa.field("text", pa.string())))


def encode_prompt(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The token ids of a prompt, with the tokenizer's BOS unless the prompt (a chat template) brings its own."""
    bos = _leading_bos(prompt, tokenizer)
    return [*bos, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]


def trl_prompt(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """A prompt as TRL's trainers that generate are to get it, so that they read what `encode_prompt` gives.

    They let the tokenizer add its BOS, also to a chat template that has written it already.

    Raises:
        `DataError`: if the tokenizer adds other tokens, too.
    """
    wanted = encode_prompt(prompt, tokenizer)
    for given in (prompt, prompt.removeprefix(str(tokenizer.bos_token))):
        if tokenizer(given)["input_ids"] == wanted:
            return given
    raise DataError(
        f"The tokenizer {tokenizer.name_or_path!r} adds special tokens around a prompt that are not there when "
        "answers are evaluated. Use another template or tokenizer."
    )


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
    _check(tokenizer, max_length)
    bos = _leading_bos(dataset[0]["text"], tokenizer) if len(dataset) else []
    return _packed((ids for _, ids in _documents(dataset, tokenizer)), bos, max_length)


def tokenize_documents(
    dataset: datasets.Dataset, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> tuple[datasets.Dataset, TokenReport]:
    """One document a row, with its BOS (if the tokenizer has one) and one EOS, cut at `max_length` tokens.

    For models that know single documents only; the paper joins them (`tokenize_and_pack`).

    Args, returns and errors are those of `tokenize_and_pack`; rows differ in length, so batches get padding.
    """
    _check(tokenizer, max_length)
    documents = _documents(dataset, tokenizer)
    return _cut(([*_leading_bos(text, tokenizer), *ids] for text, ids in documents), max_length)


def rows_of_tokens(
    documents: Iterable[list[int]], max_length: int, *, pack: bool
) -> tuple[datasets.Dataset, TokenReport]:
    """Documents that are tokens, such as what a model wrote, as rows to train on; nothing is added to them.

    Args:
        documents (iterable of `list[int]`):
            The tokens.
        max_length (`int`):
            Tokens in a chunk; of a document at most.
        pack (`bool`):
            Join them and cut them into chunks, or one document a row.

    Returns and errors are those of `tokenize_and_pack`.
    """
    return _packed(documents, [], max_length) if pack else _cut(documents, max_length)


def _packed(documents: Iterable[list[int]], bos: list[int], max_length: int) -> tuple[datasets.Dataset, TokenReport]:
    length = max_length - len(bos)
    counts: Counter[str] = Counter()

    def chunks() -> Iterator[list[list[int]]]:
        # Not TRL's packing: it cuts a short chunk at the end of each batch.
        rest: list[int] = []
        for ids in documents:
            counts.update(documents=1, tokens=len(ids))
            rest += ids
            full = len(rest) // length * length
            yield from ([[*bos, *rest[start : start + length]]] for start in range(0, full, length))
            del rest[:full]

    packed = write_arrow(chunks(), _TOKENS)
    count, tokens = counts["documents"], counts["tokens"]
    if not len(packed):
        raise DataError(
            f"{count:,} documents of {tokens:,} tokens do not fill one chunk of {max_length:,}. "
            "Give more rows, or lower max_length."
        )
    return packed, TokenReport(count, tokens, len(packed), tokens - len(packed) * length, max_length)


def _cut(documents: Iterable[list[int]], max_length: int) -> tuple[datasets.Dataset, TokenReport]:
    counts: Counter[str] = Counter()

    def rows() -> Iterator[list[list[int]]]:
        for ids in documents:
            counts.update(tokens=len(ids), dropped=max(0, len(ids) - max_length))
            yield [ids[:max_length]]

    cut = write_arrow(rows(), _TOKENS)
    if not len(cut):
        raise DataError("There are no documents.")
    report = TokenReport(len(cut), counts["tokens"], len(cut), counts["dropped"], max_length, packed=False)
    return cut, report


def _check(tokenizer: "PreTrainedTokenizerBase", max_length: int) -> None:
    if tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no EOS token, so documents have no end. Set tokenizer.eos_token.")
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; it must be at least 2 tokens.")


def _documents(dataset: datasets.Dataset, tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[str, list[int]]]:
    """Each text with its token ids, one EOS at the end of them and no BOS in front."""
    eos = tokenizer.eos_token_id
    for batch in dataset.select_columns("text").iter(BATCH):
        texts = batch["text"]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for text, ids in zip(texts, encoded, strict=True):
            yield text, ids if ids[-1:] == [eos] else [*ids, eos]


def _leading_bos(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The BOS that the tokenizer puts before a text, if it does so and the text does not begin with one."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos] or text.startswith(str(tokenizer.bos_token)):
        return []
    return [bos]
