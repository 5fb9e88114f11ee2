"""Both controls of the count of reasoning features, against plain loops over dense latents."""

import copy
import gc
import itertools
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ModelFactory
from features_by_hand import PROMPT, brute_force, dense, fires_at_cues, hidden, make_sae
from torch import nn

from resa_hf.errors import DataError
from resa_hf.features import cue_controls
from resa_hf.features.cue_controls import CountControl, prose_control, prose_passages, same_frequency_counts
from resa_hf.features.reading import Active
from resa_hf.features.reasoning import CuedPrompt, LayerLatents, cued_prompt, reasoning_latents
from resa_hf.prose import load_prose
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.source import ActivationSource

# Besides the cues, 7 characters occur twice: 21 pairs.
TWICE = "abcdefg <think></think> gfedcba <think></think> 12"
HOOKPOINTS = ("layers.0", "layers.1")


@pytest.fixture
def model(make_model: ModelFactory) -> nn.Module:
    return make_model("qwen2", initializer_range=0.3).double()


def control(count: int, counts: list[int]) -> CountControl:
    low, high = (sorted(counts)[round(share * (len(counts) - 1))] for share in (0.025, 0.975))
    as_many = sum(other >= count for other in counts)
    p_value = pytest.approx((1 + as_many) / (1 + len(counts)))
    return CountControl(count, pytest.approx(np.mean(counts)), low, high, p_value, len(counts))


def positions(ids: tuple[int, ...], run: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Where a run of tokens stands, from left to right, one not overlapping the next."""
    found: list[tuple[int, ...]] = []
    for start in range(len(ids)):
        if ids[start : start + len(run)] == run and (not found or found[-1][-1] < start):
            found.append(tuple(range(start, start + len(run))))
    return found


@pytest.mark.parametrize("every", [False, True])
def test_other_tokens_of_the_same_frequency_equal_brute_force(
    model: nn.Module, tiny_tokenizer: Any, every: bool
) -> None:
    prompt = cued_prompt(tiny_tokenizer, TWICE)
    states = hidden(model, prompt.input_ids)
    # Latents planted at other tokens too, so that the controls are not all 0.
    others = [positions(prompt.input_ids, (token,)) for token in prompt.input_ids[:7]]
    saes = {
        name: make_sae("standard", x, [*prompt.spans, *others], seed=index)
        for index, (name, x) in enumerate(zip(HOOKPOINTS, states, strict=True))
    }
    found = reasoning_latents(model, {name: (lambda sae=sae: sae) for name, sae in saes.items()}, prompt, every=every)
    pairs = list(itertools.combinations(others, 2))
    counts = [
        [len(brute_force(dense(sae, x), pair, every)) for pair in pairs]
        for sae, x in zip(saes.values(), states, strict=True)
    ]
    control_ = same_frequency_counts(found, prompt, every=every)
    assert control_.frequency_gap == 0
    assert list(control_.layers) == [control(len(one.latents), row) for one, row in zip(found, counts, strict=True)]
    summed = np.sum(counts, axis=0).tolist()
    assert control_.total == control(sum(len(one.latents) for one in found), summed)
    drawn = same_frequency_counts(found, prompt, every=every, draws=10)
    assert drawn.total.controls == 10 and drawn == same_frequency_counts(found, prompt, every=every, draws=10)


def test_the_closest_frequencies_join_where_few_are_equal(model: nn.Module, tiny_tokenizer: Any) -> None:
    # Once a, twice b, three times c, twice a space: 1 pair as frequent as the cues, 6 within one occurrence.
    prompt = cued_prompt(tiny_tokenizer, "abbccc <think></think> <think></think>")
    others = [positions(prompt.input_ids, (token,)) for token in sorted({*prompt.input_ids} - cue_tokens(prompt))]
    x = hidden(model, prompt.input_ids)[0]
    sae = make_sae("topk", x, [*prompt.spans, *others[:2]])
    found = reasoning_latents(model, {"layers.0": lambda: sae}, prompt)
    expected = [len(brute_force(dense(sae, x), pair, False)) for pair in itertools.combinations(others, 2)]
    measured = same_frequency_counts(found, prompt)
    assert measured.frequency_gap == 1 and measured.total.controls == 6
    assert measured.total == control(len(found[0].latents), expected)
    with pytest.raises(DataError, match="longer prompt"):
        same_frequency_counts(found, cued_prompt(tiny_tokenizer, "<think></think>"))


def cue_tokens(prompt: CuedPrompt) -> set[int]:
    return {prompt.input_ids[at] for occurrences in prompt.spans for span in occurrences for at in span}


def test_a_cue_of_two_tokens_is_compared_with_runs_of_two(model: nn.Module, tiny_tokenizer: Any) -> None:
    prompt = cued_prompt(tiny_tokenizer, "abab == cdcd == aaa", ["=="])
    x = hidden(model, prompt.input_ids)[0]
    ids = prompt.input_ids
    runs = {ids[at : at + 2] for at in range(len(ids) - 1) if not {*ids[at : at + 2]} & cue_tokens(prompt)}
    sae = make_sae("standard", x, [positions(ids, ids[:2])])
    found = reasoning_latents(model, {"layers.0": lambda: sae}, prompt)
    expected = [len(brute_force(dense(sae, x), [positions(ids, run)], False)) for run in sorted(runs)]
    measured = same_frequency_counts(found, prompt)
    # `ab` and `cd` occur twice as the cue does, all others once.
    assert measured.frequency_gap == 1
    assert measured.total == control(len(found[0].latents), expected)
    assert max(expected) > 0


def test_of_many_cues_not_all_choices_are_counted() -> None:
    # 190 other tokens for each of 10 cues are 6e22 choices. A latent for each token is active at one of ten at most.
    ids = torch.arange(200)
    prompt = CuedPrompt(tuple(ids.tolist()), tuple(map(str, ids)), tuple(((at,),) for at in range(10)))
    active = Active(torch.ones(200, 1), ids[:, None])
    measured = same_frequency_counts([LayerLatents("layers.0", 0, (), 200, active)], prompt, draws=30)
    assert measured.frequency_gap == 0 and measured.total == control(0, [0] * 30)


def test_a_range_of_counts_has_counts_for_ends() -> None:
    ids = torch.arange(40)
    prompt = CuedPrompt(tuple(ids.tolist()), tuple(map(str, ids)), (((0,),),))
    times = [0] * 25 + [1] * 12 + [7, 26]  # latents at each token but the cue, and at no other
    active = Active(torch.zeros(40, 26), torch.zeros(40, 26, dtype=torch.long))
    for token, often in enumerate(times, start=1):
        active.values[token, :often] = 1
        active.indices[token, :often] = sum(times[: token - 1]) + torch.arange(often)
    total = same_frequency_counts([LayerLatents("layers.0", 0, (), sum(times), active)], prompt).total
    assert (total.low, total.high, total.controls) == (0, 7, 39)


def test_the_bos_stands_in_for_no_cue(tiny_tokenizer: Any) -> None:
    tokenizer = bos_tokenizer(tiny_tokenizer)
    prompt = cued_prompt(tokenizer, "<eos><think> ab", ["<think>"])
    assert prompt.input_ids[0] == tokenizer.bos_token_id
    # A latent for each token, that of the BOS among them: three others may stand in, each of which has one.
    ids = torch.arange(5)
    found = [LayerLatents("layers.0", 0, (1,), 5, Active(torch.ones(5, 1), ids[:, None]))]
    assert same_frequency_counts(found, prompt).total == control(1, [1, 1, 1])


def test_prose_keeps_the_cues_and_the_bos_where_they_are(tiny_tokenizer: Any) -> None:
    texts = load_prose()["text"][:400]
    prompt = cued_prompt(tiny_tokenizer, "<eos>ab = <think> = cd </think> ef", ["=", "</think>"])
    passages = prose_passages(prompt, tiny_tokenizer, texts, count=9, seed=1)
    assert len(passages) == len(set(passages)) == 9
    cues = {at for occurrences in prompt.spans for span in occurrences for at in span}
    prose = set(itertools.chain.from_iterable(tiny_tokenizer(list(texts))["input_ids"]))
    for passage in passages:
        assert len(passage) == len(prompt.input_ids)
        for at, token in enumerate(passage):
            assert token == prompt.input_ids[at] if at in cues else token in prose - cue_tokens(prompt)
    assert passages == prose_passages(prompt, tiny_tokenizer, texts, count=9, seed=1)
    assert passages != prose_passages(prompt, tiny_tokenizer, texts, count=9, seed=2)
    shifted = CuedPrompt((tiny_tokenizer.eos_token_id, *prompt.input_ids[1:]), prompt.tokens, prompt.spans)
    tokenizer = bos_tokenizer(tiny_tokenizer)
    assert {passage[0] for passage in prose_passages(shifted, tokenizer, texts, count=9)} == {tokenizer.bos_token_id}
    with pytest.raises(DataError, match="9 passages take"):
        prose_passages(prompt, tiny_tokenizer, ["a b c"], count=9)


def bos_tokenizer(tokenizer: Any) -> Any:
    other = copy.deepcopy(tokenizer)
    other.bos_token = other.eos_token
    return other


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("kind", ["topk", "standard"])
def test_prose_control_equals_brute_force(model: nn.Module, tiny_tokenizer: Any, kind: str, every: bool) -> None:
    prompt = cued_prompt(tiny_tokenizer, PROMPT)
    passages = prose_passages(prompt, tiny_tokenizer, load_prose()["text"], count=12)
    saes = {
        name: make_sae(kind, x, prompt.spans, seed=index)
        for index, (name, x) in enumerate(zip(HOOKPOINTS, hidden(model, prompt.input_ids), strict=True))
    }
    loaders = {name: (lambda sae=sae: sae) for name, sae in saes.items()}
    found = reasoning_latents(model, loaders, prompt, every=every)
    measured = prose_control(model, loaders, found, prompt, passages, every=every)
    read = [[dense(sae, hidden(model, ids)[index]) for ids in passages] for index, sae in enumerate(saes.values())]
    counts = [[len(brute_force(z, prompt.spans, every)) for z in of_layer] for of_layer in read]
    assert list(measured.layers) == [control(len(one.latents), row) for one, row in zip(found, counts, strict=True)]
    assert measured.total == control(sum(len(one.latents) for one in found), np.sum(counts, axis=0).tolist())
    for index, one in enumerate(found):
        shares = [
            sum(fires_at_cues(z.tolist(), latent, prompt.spans, every) for z in read[index]) / len(passages)
            for latent in one.latents
        ]
        assert measured.shares[index] == pytest.approx(shares)
        above = tuple(latent for latent, share in zip(one.latents, shares, strict=True) if share > 0.5)
        assert measured.cue_token_latents[index] == above
        assert sorted({*measured.context_latents[index], *above}) == list(one.latents)
    assert any(measured.context_latents) and any(map(any, measured.shares))


def test_prose_is_read_in_parts(model: nn.Module, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = cued_prompt(tiny_tokenizer, PROMPT)
    passages = prose_passages(prompt, tiny_tokenizer, load_prose()["text"], count=19)
    states = hidden(model, prompt.input_ids)
    loaders = {
        name: (lambda x=x: make_sae("standard", x, prompt.spans)) for name, x in zip(HOOKPOINTS, states, strict=True)
    }
    found = reasoning_latents(model, loaders, prompt)
    held: list[weakref.ref[torch.Tensor]] = []
    peaks: list[int] = []
    read = ActivationSource.__call__

    def watched(*args: Any) -> Any:
        batch = read(*args)
        held.extend(weakref.ref(x) for x in batch.activations.values())
        gc.collect()
        peaks.append(sum(len(x) for reference in held if (x := reference()) is not None))
        return batch

    monkeypatch.setattr(ActivationSource, "__call__", watched)
    in_parts = prose_control(model, loaders, found, prompt, passages)
    assert max(peaks) <= 2 * 8 * len(prompt.input_ids)  # those of a part, and of the one before it
    monkeypatch.setattr(cue_controls, "_AT_ONCE", 19)
    assert prose_control(model, loaders, found, prompt, passages) == in_parts
    assert max(peaks) >= 19 * len(prompt.input_ids) and any(map(any, in_parts.shares))


def test_a_latent_that_reads_the_cue_tokens_alone_is_told_from_one_that_reads_the_prompt(
    make_model: ModelFactory, tiny_tokenizer: Any
) -> None:
    # Layers that add next to nothing: what comes out of one is the embedding of the token.
    model = make_model("qwen2", initializer_range=1e-4)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))
    prompt = cued_prompt(tiny_tokenizer, PROMPT)
    cues = sorted(cue_tokens(prompt))
    embeddings = model.get_input_embeddings().weight.detach()
    others = sorted({*prompt.input_ids} - {*cues})
    encoder = torch.linalg.pinv(embeddings[[*cues, *others]])[:, :2].sum(dim=1)
    sae = TopKSAE.from_weights(encoder[None], torch.tensor([-0.5]), torch.ones(1, 32), torch.zeros(32), k=1)
    loaders = {"layers.0": lambda: sae}
    found = reasoning_latents(model, loaders, prompt)
    assert found[0].latents == (0,)
    passages = prose_passages(prompt, tiny_tokenizer, load_prose()["text"], count=10)
    measured = prose_control(model, loaders, found, prompt, passages)
    assert measured.shares == ((1.0,),) and measured.cue_token_latents == ((0,),)
    assert measured.context_latents == ((),)
