"""What the explorer reads in a text, against dense latents of transformers' own hidden states, and plain loops."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ModelFactory
from features_by_hand import D_IN, KINDS, LATENTS, dense, hidden, make_sae
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from resa_hf.errors import ExploreError, HookpointError, IncompatibleSAEError
from resa_hf.explore.latents import Reading, look_up, read, tiny_texts, token_texts
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.text import evaluation_prompt
from resa_hf.tiny.task import OPERATIONS

TEXTS = [
    "the quick brown fox",
    "你好 世界, 龘 中文。",
    "مَرْحَبًا بالعالم",
    "e\u0301a\u0302\u0323 नमस्ते",
    "👩\u200d👩\u200d👧 🙂🏳\ufe0f\u200d🌈",
    "a\ufffdb \ufffd\ufffd",
    "  two  spaces\n\n\tand a tab ",
    "<|im_start|>user\n<think>x</think><|im_end|>",
    "\x00\x1b\u202e",
]
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>"]


def byte_level(size: int) -> PreTrainedTokenizerFast:
    """Qwen's and GPT-2's kind; with 259 tokens one a byte."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=ALPHABET, special_tokens=SPECIAL, show_progress=False
    )
    inner.train_from_iterator(TEXTS * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def byte_fallback(size: int) -> PreTrainedTokenizerFast:
    """Llama 2's and Gemma's kind, with a BOS; what it has not seen are bytes."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=pieces, show_progress=False)
    inner.train_from_iterator(["the quick brown fox", "two spaces and a tab"] * 5, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


BYTES, MERGED, FALLBACK = byte_level(259), byte_level(330), byte_fallback(300)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [BYTES, MERGED, FALLBACK])
def test_token_texts_joined_are_the_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)
    if tokenizer is FALLBACK:  # it has spaces of its own before a text and behind a special token
        assert "".join(texts).replace(" ", "") == text.replace(" ", "")
    else:
        assert "".join(texts) == text
    assert text.count("\ufffd") == sum(piece.count("\ufffd") for piece in texts)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_character_of_several_tokens_stands_at_its_first(text: str) -> None:
    ids = BYTES(text, add_special_tokens=False)["input_ids"]
    expected = [piece for letter in text for piece in (letter, *[""] * (len(letter.encode()) - 1))]
    assert list(token_texts(BYTES, ids)) == expected


@given(st.sampled_from([MERGED, FALLBACK]), st.lists(st.integers(0, 299), max_size=20))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_model_may_write_what_is_no_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)


@pytest.fixture
def model(make_model: ModelFactory) -> Any:
    return make_model("qwen2", vocab_size=336, initializer_range=0.2, max_position_embeddings=4096).double()


def matrix(reading: Reading, latents: int = LATENTS) -> np.ndarray:
    return np.array([reading.of_latent(latent) for latent in range(latents)]).T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokenizer", [MERGED, FALLBACK])
def test_values_are_those_of_a_dense_encode(model: Any, tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    text = " ".join(TEXTS[1:5])
    ids = tokenizer(text)["input_ids"]
    x = hidden(model, ids)[1]
    sae = make_sae(kind, x[:30], [[[3, 4]], [[9]]])
    reading = read(model, tokenizer, "blocks.1.hook_resid_post", sae, text)
    expected = dense(sae, x).numpy()
    assert (expected != 0).any(axis=1).all() and reading.hookpoint == "layers.1"
    assert matrix(reading) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert reading.values.shape == reading.indices.shape == (len(ids), reading.values.shape[1])
    assert reading.tokens == token_texts(tokenizer, ids)
    again = read(model, tokenizer, 1, sae, ids)
    assert again.tokens == reading.tokens and np.array_equal(again.values, reading.values)


def by_sorting(values: np.ndarray, count: int) -> list[tuple[int, float]]:
    largest = [(latent, float(column[np.abs(column).argmax()])) for latent, column in enumerate(values.T)]
    return [pair for pair in sorted(largest, key=lambda pair: (-abs(pair[1]), pair[0])) if pair[1] != 0][:count]


@pytest.mark.parametrize("kind", ["topk", "abstopk"])
def test_the_strongest_are_those_of_a_full_sort(model: Any, kind: str) -> None:
    sae = make_sae(kind, hidden(model, MERGED(TEXTS[0])["input_ids"])[1])
    reading = read(model, MERGED, 1, sae, TEXTS[0])
    values = matrix(reading)
    assert (values < 0).any() == (kind == "abstopk")
    for count in (3, 10, 999):
        assert reading.strongest(count=count) == by_sorting(values, count)
        for token in range(len(reading.tokens)):
            assert reading.strongest(token, count) == by_sorting(values[[token]], count)
    assert len(reading.strongest()) == 10
    for token in (-1, len(reading.tokens)):
        with pytest.raises(ExploreError, match=rf"no token {token}; .* tokens 0 to {len(reading.tokens) - 1}"):
            reading.strongest(token)


def test_of_equal_ones_the_lower_latent_comes_first() -> None:
    values = np.array([[2, 0, 3, 2], [3, 1, 0, 0]], dtype=np.float32)
    reading = Reading(("a", "b"), values, np.array([[9, 4, 7, 5], [5, 6, 0, 1]]), "layers.0")
    assert reading.strongest() == [(5, 3.0), (7, 3.0), (9, 2.0), (6, 1.0)]
    assert reading.strongest(0) == [(7, 3.0), (5, 2.0), (9, 2.0)]
    assert reading.of_latent(5) == [2.0, 3.0] and reading.of_latent(4) == [0.0, 0.0]


def random_sae() -> TopKSAE:
    sae = TopKSAE(D_IN, LATENTS, 6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return sae


def test_tokens_that_the_sae_was_not_trained_on_are_0(model: Any) -> None:
    sae, text = random_sae(), SPECIAL[0] + "the fox" + SPECIAL[1]
    plain = matrix(read(model, MERGED, 1, sae, text))
    sae.metadata["exclude_special_tokens"] = MERGED.convert_tokens_to_ids(SPECIAL)
    without = matrix(read(model, MERGED, 1, sae, text))
    assert plain[[0, -1]].any(axis=1).all() and not without[[0, -1]].any()
    assert np.array_equal(plain[1:-1], without[1:-1])


def brute_force(
    model: Any, sae: TopKSAE, rows: Sequence[Sequence[int]], latent: int, untrained: Sequence[int]
) -> list[tuple[Any, ...]]:
    found = []
    for row, ids in enumerate(rows):
        curve = [
            0.0 if token in untrained else value
            for token, value in zip(ids, dense(sae, hidden(model, ids)[1])[:, latent].tolist(), strict=True)
        ]
        at = curve.index(max(curve))
        around = slice(max(0, at - 10), at + 11)
        if curve[at] > 0:
            found.append((curve[at], row, at, tuple(ids[around]), curve[around]))
    return sorted(found, key=lambda example: (-example[0], example[1]))[:10]


@pytest.mark.parametrize("untrained", [[], FALLBACK("the tab")["input_ids"]])
def test_what_is_looked_up_is_what_a_search_finds(model: Any, untrained: list[int]) -> None:
    words = ["the", "quick", "brown", "fox", "two", "spaces", "and", "a", "tab", "中"]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, rng.integers(1, 15))) for _ in range(25)]
    rows = [FALLBACK(text)["input_ids"] for text in texts]
    sae = random_sae()
    sae.metadata["exclude_special_tokens"] = untrained or False
    often = (dense(sae, hidden(model, [*itertools.chain(*rows)])[1]) > 0).sum(0).argsort(descending=True).tolist()
    for latent in (often[0], often[10], often[40]):
        expected = brute_force(model, sae, rows, latent, untrained)
        found = look_up(model, FALLBACK, 1, sae, latent, iter(texts))
        assert len(expected) == len(found.examples) == len(found.tokens) > 2 and found.latent == latent
        for example, words_of, (value, row, position, tokens, values) in zip(
            found.examples, found.tokens, expected, strict=True
        ):
            assert (example.row, example.position, example.tokens) == (row, position, tokens)
            assert [example.value, *example.values] == pytest.approx([value, *values])
            assert "".join(words_of) == FALLBACK.decode(list(tokens)) and len(words_of) == len(tokens)


def test_a_latents_words_are_those_of_its_decoder_row(model: Any) -> None:
    sae = random_sae()
    found = look_up(model, MERGED, 1, sae, 5, [])
    row = sae.W_dec[5].double()
    normed = row / (row.square().mean() + model.config.rms_norm_eps).sqrt() * model.model.norm.weight
    logits = (model.lm_head.weight @ normed)[: len(MERGED)]
    order = logits.argsort(descending=True)[:8].tolist()
    assert [word for word, _ in found.promoted] == [MERGED.decode([token]) for token in order]
    assert [value for _, value in found.promoted] == pytest.approx(logits[order].tolist(), rel=1e-5)
    assert found.examples == found.tokens == []


@pytest.mark.parametrize("latent", [-1, LATENTS, 10**30])
def test_a_latent_that_the_sae_does_not_have(model: Any, latent: int) -> None:
    with pytest.raises(ExploreError, match=f"no latent {latent}; the SAE has latents 0 to 199"):
        look_up(model, MERGED, 1, random_sae(), latent, ["the fox"])


def test_a_text_is_neither_empty_nor_too_long(model: Any, make_model: ModelFactory) -> None:
    sae = random_sae()
    assert len(read(model, BYTES, 1, sae, "x" * 2048).tokens) == 2048
    with pytest.raises(ExploreError, match="2,049 tokens .* 1 to 2,048"):
        read(model, BYTES, 1, sae, "x" * 2049)
    with pytest.raises(ExploreError, match="1,000,000 characters; at most 100,000"):
        read(model, BYTES, 1, sae, "x" * 1_000_000)
    for nothing in ("", []):
        with pytest.raises(ExploreError, match="0 tokens"):
            read(model, BYTES, 1, sae, nothing)
    for small in (make_model("gpt2", vocab_size=336), make_model("qwen2", vocab_size=336)):
        tuned = get_peft_model(small, LoraConfig(target_modules=r".*(c_attn|q_proj)"))
        with pytest.raises(ExploreError, match="129 tokens .* 1 to 128"):
            read(tuned, BYTES, 1, sae, "x" * 129)
        found = look_up(tuned, BYTES, 1, sae, 7, ["y" * 300])
        assert all(example.position < 128 for example in found.examples)


def test_characters_that_the_tokenizer_does_not_know(tiny_base: Any, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    sae = TopKSAE(128, LATENTS, 6)
    assert read(tiny_base, tiny_tokenizer, 1, sae, "1中+2").tokens == ("1", "+", "2")
    with pytest.raises(ExploreError, match="0 tokens that the model knows"):
        read(tiny_base, tiny_tokenizer, 1, sae, "中文")


def test_half_a_surrogate_pair_is_no_text(model: Any) -> None:
    assert read(model, MERGED, 1, random_sae(), "a\ud83db").tokens == ("a", "?", "b")


def test_what_does_not_fit_the_model(model: Any) -> None:
    with pytest.raises(HookpointError, match=r"layers\.0 to layers\.2"):
        read(model, MERGED, 9, random_sae(), "the fox")
    with pytest.raises(IncompatibleSAEError, match="width 16, not of width 32"):
        read(model, MERGED, 1, TopKSAE(16, LATENTS, 6), "the fox")


def test_tiny_texts_are_solved_problems_in_the_reasoners_own_form(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    texts = tiny_texts(20, seed=3)
    assert len(set(texts)) == 20 and tiny_texts(20, seed=3) == texts != tiny_texts(20)
    for text in texts:
        question = text.split("\n")[0].removeprefix("User: ")
        prompt = evaluation_prompt(question, template="chat", tokenizer=tiny_tokenizer)
        chain = question.removesuffix(" mod 10")
        value, trace = int(chain[0]), []
        for symbol, operand in zip(chain[1::2], chain[2::2], strict=True):
            result = OPERATIONS[symbol](value, int(operand)) % 10
            trace.append(f"{value}{symbol}{operand}={result}")
            value = result
        assert text == f"{prompt}{';'.join(trace)}</think><answer>{value}</answer>"
        assert tiny_tokenizer.decode(tiny_tokenizer(text)["input_ids"]) == text
