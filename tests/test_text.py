"""CoT-free text and its packing, against the released code's way of cutting a joined text."""

import math
from typing import TYPE_CHECKING

import datasets
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from resa_hf.errors import DataError
from resa_hf.text import (
    add_text,
    cot_free_text,
    cot_text,
    encode_prompt,
    evaluation_prompt,
    rows_of_tokens,
    tokenize_and_pack,
    tokenize_documents,
)

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import ModelFactory

CHARACTERS = "\n 0123456789abcdefghijklmnopqrstuvwxyz<>/:.+?"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# DeepSeek-R1's, in what matters here: it writes the BOS, opens `<think>`, and drops an assistant's reasoning.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}{% else %}"
    "<assistant>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)


def make_tokenizer(*, adds_bos: bool = False, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a character; `adds_bos` as Llama's and DeepSeek's tokenizers do."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )
    assert tokenizer("a")["input_ids"] == ([1] if adds_bos else []) + [vocabulary["a"]]
    return tokenizer


def released_chunks(texts: list[str], tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[list[int]]:
    """The released code's way: one text joined by EOS, tokenised with truncation, the last chunk dropped.

    Only its EOS before the first document is put behind the last instead.
    """
    joined = "".join(text + tokenizer.eos_token for text in texts)
    overflowing = {"truncation": True, "max_length": max_length, "return_overflowing_tokens": True}
    chunks = tokenizer([joined], **overflowing)["input_ids"]
    return chunks if len(chunks[-1]) == max_length else chunks[:-1]


def with_texts(texts: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": texts})


def test_paper_template_is_the_released_one() -> None:
    assert cot_free_text("1+1?", "2", template="paper") == (
        "\nA conversation between User and Assistant. The user asks a question, and the Assistant solves it.\n"
        "The assistant first thinks about the reasoning process in the mind and then provides the user\n"
        "with the answer. The reasoning process and answer are enclosed within <think> </think> and\n"
        "<answer> </answer> tags, respectively, i.e., <think> reasoning process here </think>\n"
        "<answer> answer here </answer>.\n"
        "User:\n 1+1?\n\nAssistant:\n <think> 2 </think>\n<answer> Answer: 2</answer>"
    )


def test_a_trace_stands_between_the_think_tags() -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    for template in ("paper", "chat"):
        free = cot_free_text("1+1?", "2", template=template, tokenizer=tokenizer)
        based = cot_text("1+1?", "One more.", "2", template=template, tokenizer=tokenizer)
        assert based == free.replace("2", "One more.", 1)
    assert cot_text("1+1?", "One more.", "2", template="paper").endswith(
        "Assistant:\n <think> One more. </think>\n<answer> Answer: 2</answer>"
    )
    rows = datasets.Dataset.from_dict({"problem": ["a", "b"], "answer": ["1", "2"], "solution": ["x", "y"]})
    assert add_text(rows, template="paper")["text"][:] == [
        cot_text("a", "x", "1", template="paper"),
        cot_text("b", "y", "2", template="paper"),
    ]


def test_chat_template_opens_think_once() -> None:
    closed, opened = make_tokenizer(chat_template=CHATML), make_tokenizer(chat_template=R1)
    assert cot_free_text("1+1?", "2", template="chat", tokenizer=closed) == (
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>2</think><answer>2</answer>"
    )
    # The whole response is there, although the template would drop what stands before `</think>`.
    assert cot_free_text("1+1?", "2", template="chat", tokenizer=opened) == (
        "<s><user>1+1?<assistant><think>\n2</think><answer>2</answer>"
    )


@pytest.mark.parametrize("template", ["paper", "chat"])
@pytest.mark.parametrize("chat_template", [CHATML, R1])
def test_text_continues_the_evaluation_prompt(template: str, chat_template: str) -> None:
    tokenizer = make_tokenizer(chat_template=chat_template)
    prompt = evaluation_prompt("1+1?", template=template, tokenizer=tokenizer)
    assert prompt.rstrip().endswith("<think>")
    assert not prompt.rstrip().removesuffix("<think>").rstrip().endswith("<think>")
    assert cot_free_text("1+1?", "2", template=template, tokenizer=tokenizer).startswith(prompt)


def test_templates_that_cannot_be_used() -> None:
    with pytest.raises(DataError, match="Unknown template 'papr'. Valid: 'paper', 'chat'"):
        cot_free_text("a", "b", template="papr")  # type: ignore[arg-type]
    for tokenizer in (None, make_tokenizer()):
        with pytest.raises(DataError, match="needs a tokenizer with a chat template"):
            evaluation_prompt("a", template="chat", tokenizer=tokenizer)


def test_add_text_keeps_the_other_columns() -> None:
    rows = datasets.Dataset.from_dict({"problem": ["a", "b"], "answer": ["1", "2"]})
    added = add_text(rows, template="paper")
    assert added.column_names == ["problem", "answer", "text"]
    assert rows.column_names == ["problem", "answer"]
    assert added["text"][1] == cot_free_text("b", "2", template="paper")


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("max_length", [2, 7, 64])
def test_chunks_are_the_released_ones(adds_bos: bool, max_length: int) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    # More than TRL packs in one batch, 1,000.
    texts = [f"{i}? " + "ab" * (i % 7) for i in range(1100)]
    chunks, report = tokenize_and_pack(with_texts(texts), tokenizer, max_length)
    assert chunks.column_names == ["input_ids"]
    assert chunks["input_ids"][:] == released_chunks(texts, tokenizer, max_length)
    assert {len(ids) for ids in chunks["input_ids"]} == {max_length}
    length = max_length - adds_bos
    tokens = sum(len(text) + 1 for text in texts)
    assert (report.documents, report.tokens, report.max_length) == (1100, tokens, max_length)
    assert (report.chunks, report.tokens_dropped) == divmod(tokens, length) == (len(chunks), tokens % length)


def test_one_eos_ends_each_document() -> None:
    tokenizer = make_tokenizer()
    chunks, _ = tokenize_and_pack(with_texts(["ab", "cd</s>", "ef", "gh"]), tokenizer, 6)
    assert tokenizer.batch_decode(chunks["input_ids"][:]) == ["ab</s>cd</s>", "ef</s>gh</s>"]


def test_a_bos_is_never_doubled() -> None:
    tokenizer = make_tokenizer(adds_bos=True, chat_template=R1)
    rows = datasets.Dataset.from_dict({"problem": ["1+1?"] * 8, "answer": ["2"] * 8})
    texts = add_text(rows, template="chat", tokenizer=tokenizer)
    chunks, _ = tokenize_and_pack(texts, tokenizer, 16)
    stream = [token for ids in chunks["input_ids"] for token in ids]
    document = tokenizer(texts["text"][0], add_special_tokens=False)["input_ids"]
    assert document.count(1) == 1
    assert stream == ([*document, 2] * 8)[: len(stream)]
    assert encode_prompt(evaluation_prompt("1+1?", template="chat", tokenizer=tokenizer), tokenizer).count(1) == 1
    paper = encode_prompt(evaluation_prompt("1+1?", template="paper"), tokenizer)
    assert paper == tokenizer(evaluation_prompt("1+1?", template="paper"))["input_ids"]
    assert paper[0] == 1
    assert encode_prompt("ab", make_tokenizer()) == make_tokenizer()("ab")["input_ids"]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_documents_may_stay_apart(adds_bos: bool) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    rows, report = tokenize_documents(with_texts(["ab", "cdefgh", "ij</s>"]), tokenizer, 5)
    bos = "<s>" if adds_bos else ""
    cut = "cdef" if adds_bos else "cdefg"
    assert tokenizer.batch_decode(rows["input_ids"][:]) == [f"{bos}ab</s>", f"{bos}{cut}", f"{bos}ij</s>"]
    assert (report.documents, report.chunks, report.tokens) == (3, 3, 13 + 3 * adds_bos)
    assert report.tokens_dropped == 2 + adds_bos


def test_what_cannot_be_packed_is_refused() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(DataError, match="2 documents of 6 tokens do not fill one chunk of 7"):
        tokenize_and_pack(with_texts(["ab", "cd"]), tokenizer, 7)
    with pytest.raises(DataError, match="0 documents of 0 tokens"):
        tokenize_and_pack(with_texts([]), tokenizer, 7)
    with pytest.raises(DataError, match="max_length is 1"):
        tokenize_and_pack(with_texts(["ab"]), tokenizer, 1)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        tokenize_and_pack(with_texts(["ab"]), tokenizer, 2)


def test_the_tiny_reasoner_reads_its_own_text() -> None:
    from resa_hf.tiny.task import make_rows
    from resa_hf.tiny.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    texts = add_text(datasets.Dataset.from_list(make_rows(50, 0)), template="chat", tokenizer=tokenizer)
    chunks, report = tokenize_and_pack(texts, tokenizer, 32)
    stream = "".join(tokenizer.batch_decode(chunks["input_ids"][:]))
    assert "".join(f"{text}<eos>" for text in texts["text"]).startswith(stream)
    assert len(stream) > 0
    assert report.chunks == math.floor(report.tokens / 32)


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer_takes_the_chunks_as_they_are(packing: bool, make_model: "ModelFactory", tmp_path: "Path") -> None:
    from trl import SFTConfig, SFTTrainer

    tokenizer = make_tokenizer(adds_bos=True)
    # More than 1,000 chunks: TRL's own packing goes through them in batches of that size.
    chunks, report = tokenize_and_pack(with_texts(["abc def"] * 1200), tokenizer, 8)
    args = SFTConfig(
        output_dir=str(tmp_path), max_length=8, packing=packing, packing_strategy="wrapped", use_cpu=True, bf16=False
    )
    trainer = SFTTrainer(make_model("llama"), args, train_dataset=chunks, processing_class=tokenizer)
    assert report.chunks > 1000
    assert trainer.train_dataset["input_ids"][:] == chunks["input_ids"][:]
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    assert batch["input_ids"].tolist() == chunks["input_ids"][:2]
    assert batch["labels"].tolist() == chunks["input_ids"][:2]


def test_rows_of_tokens_are_the_tokens_as_they_are() -> None:
    documents = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    cut, told = rows_of_tokens(iter(documents), 4, pack=False)
    assert cut["input_ids"][:] == [[5, 6, 7], [8], [9, 10, 11, 12]]
    assert (told.documents, told.tokens, told.tokens_dropped, told.chunks) == (3, 9, 1, 3)
    packed, told = rows_of_tokens(iter(documents), 4, pack=True)
    assert packed["input_ids"][:] == [[5, 6, 7, 8], [9, 10, 11, 12]]
    assert (told.documents, told.tokens, told.tokens_dropped, told.chunks) == (3, 9, 1, 2)
    with pytest.raises(DataError, match="1 documents of 2 tokens do not fill one chunk of 4"):
        rows_of_tokens([[1, 2]], 4, pack=True)
    with pytest.raises(DataError, match="no documents"):
        rows_of_tokens([], 4, pack=False)
