"""Prompt-only extraction against dense latents and plain loops."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import ModelFactory
from features_by_hand import D_IN, KINDS, PROMPT, K, brute_force, dense, hidden, make_sae
from peft import LoraConfig, get_peft_model
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAEConfig
from sae_lens import TopKSAE as LensTopKSAE
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import Qwen2Tokenizer

from resa_hf.errors import DataError, HookpointError, IncompatibleSAEError
from resa_hf.features.reading import active_latents, decoder_rows
from resa_hf.features.reasoning import CUES, R1_PROMPT, cued_prompt, reasoning_latents
from resa_hf.sae.autoencoder import SAELensSAE, TopKSAE

HOOKPOINTS = ("layers.0", "layers.1")


@pytest.fixture
def model(make_model: ModelFactory) -> nn.Module:
    return make_model("qwen2", initializer_range=0.3).double()


@pytest.fixture(scope="session")
def characters() -> Qwen2Tokenizer:
    """One token a character, but `>` and the newline behind it are one: no tag is a token of its own."""
    symbols = sorted({*"<>/=abcdefghijklmnopqrstuvwxyzATUR.,", "Ġ", "Ċ", ">Ċ", "<eos>"})
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    return Qwen2Tokenizer(vocab=vocab, merges=[(">", "Ċ")], unk_token="<eos>", eos_token="<eos>", pad_token="<eos>")


def adapted(model: Any, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=dropout)
    return get_peft_model(model, config).double().eval()


def loaders(saes: dict[str, TopKSAE | SAELensSAE]) -> dict[str, Callable[[], TopKSAE | SAELensSAE]]:
    return {name: (lambda sae=sae: sae) for name, sae in saes.items()}


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_extraction_equals_brute_force(
    model: nn.Module, tiny_tokenizer: Any, kind: str, every: bool, wrapped: bool
) -> None:
    prompt = cued_prompt(tiny_tokenizer, PROMPT)
    assert [len(occurrences) for occurrences in prompt.spans] == [2, 3]
    plain = hidden(model, prompt.input_ids)
    model = adapted(model) if wrapped else model
    states = hidden(model, prompt.input_ids)
    assert torch.equal(states[0], plain[0]) != wrapped
    saes = {name: make_sae(kind, states[index], prompt.spans, seed=index) for index, name in enumerate(HOOKPOINTS)}
    found = reasoning_latents(model, loaders(saes), prompt, every=every)
    expected = [brute_force(dense(sae, x), prompt.spans, every) for sae, x in zip(saes.values(), states, strict=False)]
    assert [list(one.latents) for one in found] == expected
    assert all(expected)
    assert [(one.hookpoint, one.layer, one.num_latents) for one in found] == [
        (name, index, saes[name].num_latents) for index, name in enumerate(HOOKPOINTS)
    ]


def test_every_occurrence_is_a_stricter_demand_than_one(model: nn.Module, tiny_tokenizer: Any) -> None:
    prompt = cued_prompt(tiny_tokenizer, PROMPT)
    saes = loaders({"layers.1": make_sae("topk", hidden(model, prompt.input_ids)[1], prompt.spans)})
    (loose,), (strict,) = (reasoning_latents(model, saes, prompt, every=every) for every in (False, True))
    assert set(strict.latents) < set(loose.latents)


@pytest.mark.parametrize("every", [False, True])
def test_a_cue_of_several_tokens(model: nn.Module, characters: Qwen2Tokenizer, every: bool) -> None:
    prompt = cued_prompt(characters, "a<think>b</think>\n<think>c")
    assert ["".join(prompt.tokens[at] for at in span) for spans in prompt.spans for span in spans] == [
        "<think>",
        "<think>",
        "</think>\n",
    ]
    states = hidden(model, prompt.input_ids)
    sae = make_sae("topk", states[0], prompt.spans)
    (found,) = reasoning_latents(model, loaders({"layers.0": sae}), prompt, every=every)
    assert list(found.latents) == brute_force(dense(sae, states[0]), prompt.spans, every)
    assert found.latents


def test_the_prompt_of_the_paper_holds_each_cue_twice(tiny_tokenizer: Any, characters: Qwen2Tokenizer) -> None:
    prompt = cued_prompt(tiny_tokenizer)
    assert prompt.input_ids == tuple(tiny_tokenizer(R1_PROMPT)["input_ids"])
    for cue, occurrences in zip(CUES, prompt.spans, strict=True):
        assert [prompt.tokens[at] for (at,) in occurrences] == [cue, cue]
        assert [at for (at,) in occurrences] == [at for at, token in enumerate(prompt.tokens) if token == cue]
    lengths = [[len(span) for span in occurrences] for occurrences in cued_prompt(characters).spans]
    assert lengths == [[7, 7], [8, 8]]


def test_a_bos_shifts_the_cues(characters: Qwen2Tokenizer) -> None:
    plain = cued_prompt(characters, "ab <think>", ["<think>"])
    tokenizer = copy.deepcopy(characters)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = [("<bos>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=bos)
    shifted = cued_prompt(tokenizer, "ab <think>", ["<think>"])
    assert shifted.input_ids == (tokenizer.bos_token_id, *plain.input_ids)
    assert shifted.tokens == ("<bos>", *plain.tokens)
    assert shifted.spans[0][0] == tuple(at + 1 for at in plain.spans[0][0])


def test_one_forward_one_sae_at_a_time_and_the_model_stays_as_it_is(model: nn.Module, tiny_tokenizer: Any) -> None:
    prompt = cued_prompt(tiny_tokenizer, PROMPT)
    model = adapted(model, dropout=0.5)
    expected = hidden(model, prompt.input_ids)[1]
    model.train()
    alive: list[weakref.ref[Any]] = []
    forwards: list[None] = []
    model.get_base_model().model.register_forward_pre_hook(lambda *_: forwards.append(None))

    def load(seed: int) -> TopKSAE:
        gc.collect()
        assert all(reference() is None for reference in alive)
        sae = TopKSAE(D_IN, 64, K, seed=seed, dtype=torch.float64)
        alive.append(weakref.ref(sae))
        return sae

    saes = {name: (lambda seed=seed: load(seed)) for seed, name in enumerate(HOOKPOINTS)}
    found = reasoning_latents(model, saes, prompt)
    assert len(alive) == 2 and len(forwards) == 1
    assert model.training
    # Dropout was off.
    again = TopKSAE(D_IN, 64, K, seed=1, dtype=torch.float64).encode(expected)
    rebuilt = torch.zeros_like(again).scatter(1, found[1].active.indices, found[1].active.values)
    assert torch.allclose(rebuilt, again, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_active_latents_are_all_of_the_dense_ones(kind: str) -> None:
    x = torch.randn(600, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sae = make_sae(kind, x)
    values, indices = active_latents(sae, x)
    z = dense(sae, x)
    assert values.shape == indices.shape and indices.dtype == torch.int64
    assert torch.allclose(torch.zeros_like(z).scatter_add(1, indices, values), z, atol=1e-12)
    assert int((values != 0).sum()) == int((z != 0).sum())


def sae_kinds() -> Iterator[TopKSAE | SAELensSAE]:
    yield TopKSAE(D_IN, 40, 5)
    yield SAELensSAE(StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=40)))
    for rescale in (False, True):
        yield SAELensSAE(LensTopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=40, k=5, rescale_acts_by_decoder_norm=rescale)))


@pytest.mark.parametrize("sae", list(sae_kinds()))
def test_decoder_rows_are_what_a_latent_adds(sae: TopKSAE | SAELensSAE) -> None:
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1)
        z = torch.rand(5, 40, generator=torch.Generator().manual_seed(0))
        more = z.clone()
        more[:, 7] += 2.5
        rows = decoder_rows(sae, [3, 7])
        assert rows.shape == (2, D_IN)
        assert torch.allclose((sae.decode(more) - sae.decode(z)) / 2.5, rows[1].expand(5, -1), atol=1e-5)
        assert torch.equal(decoder_rows(sae, torch.tensor([7]))[0], rows[1])


def test_bad_input_is_refused(model: nn.Module, tiny_tokenizer: Any) -> None:
    for prompt, cues, message in (
        ("no cue here", CUES, "cue '<think>'"),
        ("a", ("",), "cue ''"),
        ("a", (), "at least one"),
        ("É", ("É",), "cue 'É'"),  # a character without a token
    ):
        with pytest.raises(DataError, match=message):
            cued_prompt(tiny_tokenizer, prompt, cues)
    prompt = cued_prompt(tiny_tokenizer, PROMPT)
    with pytest.raises(IncompatibleSAEError, match="width 7, not of width 32"):
        reasoning_latents(model, {"layers.0": lambda: TopKSAE(7, 20, 3)}, prompt)
    with pytest.raises(HookpointError, match=r"layers\.9"):
        reasoning_latents(model, {"layers.9": lambda: TopKSAE(D_IN, 20, 3)}, prompt)
    with pytest.raises(HookpointError, match="No hookpoint"):
        reasoning_latents(model, {}, prompt)
    scaled = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=40, normalize_activations="layer_norm"))
    with pytest.raises(IncompatibleSAEError, match="'layer_norm'"):
        decoder_rows(SAELensSAE(scaled), [0])
