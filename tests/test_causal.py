"""Edits of latents against dense calculations, and that nothing else changes, to the bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from built_in_latent import CUE, HOOKPOINT, LETTERS, built_in_model, built_in_sae, latent_of
from conftest import ModelFactory
from sae_lens import StandardSAE, StandardSAEConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resa_hf.errors import HookpointError, IncompatibleSAEError
from resa_hf.evaluation.engine import Sampling
from resa_hf.evaluation.in_process import TransformersEngine
from resa_hf.features.causal import ablate, amplify, edited, latent_values, put
from resa_hf.hookpoints import capture, splice
from resa_hf.sae.autoencoder import SAELensSAE, TopKSAE
from resa_hf.text import evaluation_prompt
from resa_hf.tiny.task import make_rows

D_IN, LATENTS, K = 32, 80, 6
SAMPLING = Sampling(max_new_tokens=48, samples=2, batch_size=5, seed=1)


def ids(rows: int = 3, tokens: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def make_sae(d_in: int = D_IN, latents: int = LATENTS, k: int = K, dtype: torch.dtype = torch.float64) -> TopKSAE:
    sae = TopKSAE(d_in, latents, k, dtype=dtype)
    sae.b_dec += 0.05
    sae.W_dec *= torch.linspace(0.5, 2, latents, dtype=dtype)[:, None]
    return sae


def lens_sae() -> SAELensSAE:
    sae = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=LATENTS, dtype="float64"))
    weights = make_sae().state_dict()
    sae.load_state_dict({**weights, "b_enc": weights["b_enc"] - 0.03})
    return SAELensSAE(sae)


def dense(sae: Any, x: Tensor) -> Tensor:
    """All latents, `[..., num_latents]`, by the formula."""
    inner = sae.sae if isinstance(sae, SAELensSAE) else sae
    z = torch.relu((x - inner.b_dec) @ inner.W_enc + inner.b_enc)
    return z if sae.k is None else torch.where(z >= z.topk(sae.k, dim=-1).values[..., -1:], z, 0)


def at_hookpoint(model: PreTrainedModel, tokens: Tensor, hookpoint: str = "layers.1") -> Tensor:
    with torch.no_grad(), capture(model, [hookpoint]) as hooked:
        model(input_ids=tokens)
    return hooked[hookpoint]


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 6) -> list[list[Any]]:
    prompts = [evaluation_prompt(row["problem"], template="chat", tokenizer=tokenizer) for row in make_rows(count, 7)]
    return TransformersEngine(model, tokenizer).generate(prompts, SAMPLING, progress=False)


@torch.no_grad()
def test_no_edit_changes_no_logit(tiny_base: PreTrainedModel) -> None:
    sae, tokens = make_sae(128, 512, 16, torch.float32), ids() % 56
    clean = tiny_base(input_ids=tokens).logits
    with edited(tiny_base, "layers.2", sae, range(512), amplify(1)):
        assert torch.equal(tiny_base(input_ids=tokens).logits, clean)

    def with_error_term(x: Tensor) -> Tensor:
        z = sae.encode(x)
        return sae.decode(z) + (x - sae.decode(z))

    with splice(tiny_base, "layers.2", with_error_term):
        assert (tiny_base(input_ids=tokens).logits - clean).abs().max() < 1e-5


@torch.no_grad()
def test_ablating_a_latent_that_never_fires_changes_nothing(
    tiny_base: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    sae, tokens = make_sae(128, 512, 16, torch.float32), ids() % 56
    sae.b_enc[7] = -1e9
    clean, answered = tiny_base(input_ids=tokens).logits, answers(tiny_base, tiny_tokenizer)
    with edited(tiny_base, "layers.1", sae, [7], ablate):
        assert torch.equal(tiny_base(input_ids=tokens).logits, clean)
        assert answers(tiny_base, tiny_tokenizer) == answered
    often = int(sae.encode(at_hookpoint(tiny_base, tokens)).gt(0).sum((0, 1)).argmax())
    with edited(tiny_base, "layers.1", sae, [often], amplify(8)):
        assert not torch.equal(tiny_base(input_ids=tokens).logits, clean)
        assert answers(tiny_base, tiny_tokenizer) != answered


@pytest.mark.parametrize("make", [make_sae, lens_sae])
@pytest.mark.parametrize(("change", "factor"), [(ablate, 0.0), (amplify(3), 3.0), (amplify(-1), -1.0)])
@torch.no_grad()
def test_an_edit_equals_a_dense_calculation(
    make_model: ModelFactory, make: Callable[[], Any], change: Any, factor: float
) -> None:
    model, sae, tokens = make_model("qwen2").double(), make(), ids()
    x = at_hookpoint(model, tokens)
    z = dense(sae, x)
    chosen = [40, 3, 71, 20, 12]
    scaled = z.clone()
    scaled[..., chosen] *= factor
    inner = sae.sae if isinstance(sae, SAELensSAE) else sae
    expected = x + (scaled - z) @ inner.W_dec
    with edited(model, 1, sae, chosen, change):
        found = at_hookpoint(model, tokens)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    fires = (z[..., chosen] > 0).any(-1)
    assert fires.any() and not fires.all()
    assert torch.equal(found[~fires], x[~fires])


@torch.no_grad()
def test_patching_puts_in_the_values_of_another_prompt(make_model: ModelFactory) -> None:
    model, sae, tokens, other = make_model("qwen2").double(), make_sae(), ids(), ids(seed=1)
    chosen = [2, 30, 64]
    x, z = at_hookpoint(model, tokens), dense(sae, at_hookpoint(model, tokens))[..., chosen]
    values = latent_values(model, "layers.1", sae, chosen, other)
    torch.testing.assert_close(values, dense(sae, at_hookpoint(model, other))[..., chosen], atol=1e-12, rtol=0)
    with edited(model, "layers.1", sae, chosen, put(values)):
        found = at_hookpoint(model, tokens)
    torch.testing.assert_close(found, x + (values - z) @ sae.W_dec[chosen], atol=1e-12, rtol=0)
    for one, given in ((values[0, 0], tokens), (values[:1, :1], tokens), (values[:1, :1], tokens[:, :1])):
        with edited(model, "layers.1", sae, chosen, put(one)):  # the same values at every token
            found = at_hookpoint(model, given)
        length = given.shape[1]
        expected = x[:, :length] + (values[0, 0] - z[:, :length]) @ sae.W_dec[chosen]
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_in_a_generation_the_prompt_is_patched_and_nothing_behind_it(
    tiny_base: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    sae = make_sae(128, 512, 16, torch.float32)
    prompts = ["User: 3*4+5*2 mod 10\nAssistant: <think>", "User: 7-6*8+9 mod 10\nAssistant: <think>"]
    tokens, other = (tiny_tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts)
    chosen = list(range(0, 512, 2))
    values = latent_values(tiny_base, "layers.1", sae, chosen, other)
    engine, greedy = TransformersEngine(tiny_base, tiny_tokenizer), Sampling(temperature=0, max_new_tokens=24)
    with edited(tiny_base, "layers.1", sae, chosen, put(values)):
        [[found]] = engine.generate(prompts[:1], greedy, progress=False)
    shift = (values - latent_values(tiny_base, "layers.1", sae, chosen, tokens)) @ sae.W_dec[chosen]

    def by_hand(x: Tensor) -> Tensor:
        return torch.cat([x[:, : tokens.shape[1]] + shift, x[:, tokens.shape[1] :]], dim=1)

    grown = tokens
    with splice(tiny_base, "layers.1", by_hand):  # without a cache: the whole text again for each token
        for _ in found.tokens:
            grown = torch.cat([grown, tiny_base(input_ids=grown).logits[:, -1:].argmax(-1)], dim=1)
    assert grown[0, tokens.shape[1] :].tolist() == list(found.tokens)
    assert [[found]] != engine.generate(prompts[:1], greedy, progress=False)


def test_ablation_and_patching_find_the_latent_that_carries_the_answer(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    model, sae = built_in_model(tiny_tokenizer), built_in_sae()
    engine, greedy = TransformersEngine(model, tiny_tokenizer), Sampling(temperature=0, max_new_tokens=8)
    prompts = ["abcdefghijlm=", "bacdkfghijlm="]

    def texts() -> list[str]:
        return [completion.text for [completion] in engine.generate(prompts, greedy, progress=False)]

    assert texts() == ["<answer>0</answer>", "<answer>1</answer>"]
    source = tiny_tokenizer(prompts[1], return_tensors="pt").input_ids
    carrier, others = latent_of(tiny_tokenizer, CUE), [latent_of(tiny_tokenizer, letter) for letter in LETTERS]
    ablated, patched = {}, {}
    for latent in [carrier, *others]:
        with edited(model, HOOKPOINT, sae, [latent], ablate):
            ablated[latent] = texts()
        with edited(model, HOOKPOINT, sae, [latent], put(latent_values(model, HOOKPOINT, sae, [latent], source))):
            patched[latent] = texts()
    assert ablated.pop(carrier) == ["<answer>0</answer>"] * 2
    assert patched.pop(carrier) == ["<answer>1</answer>"] * 2
    assert all(
        found == ["<answer>0</answer>", "<answer>1</answer>"] for found in [*ablated.values(), *patched.values()]
    )


@torch.no_grad()
def test_padding_on_the_left_shifts_nothing(make_model: ModelFactory) -> None:
    model, sae, tokens = make_model("gpt2").double(), make_sae(), ids(1)  # GPT-2's positions are absolute
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 4).long()[None]
    plain = latent_values(model, "h.1", sae, range(LATENTS), tokens)
    found = latent_values(model, "h.1", sae, range(LATENTS), padded, mask)
    torch.testing.assert_close(found[:, 4:], plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("kind", "hookpoint"), [("qwen2", "layers.1"), ("gpt2", "h.1")])
@torch.no_grad()
def test_excluded_tokens_pass_untouched(make_model: ModelFactory, kind: str, hookpoint: str) -> None:
    model, sae, tokens = make_model(kind).double(), make_sae(), ids()
    tokens[:, ::3] = 5
    x = at_hookpoint(model, tokens, hookpoint)
    with edited(model, hookpoint, sae, range(LATENTS), ablate, excluded_token_ids=[5]):
        found = at_hookpoint(model, tokens, hookpoint)
    assert torch.equal((found != x).any(-1), tokens != 5)


@torch.no_grad()
def test_in_half_precision_the_sum_is_rounded_once(make_model: ModelFactory) -> None:
    model, sae, tokens = make_model("qwen2").bfloat16(), make_sae(dtype=torch.float32), ids()
    x = at_hookpoint(model, tokens)
    with edited(model, "layers.1", sae, range(LATENTS), ablate):
        found = at_hookpoint(model, tokens)
    expected = (x.double() - dense(sae.double(), x.double()) @ sae.W_dec).bfloat16()
    assert found.dtype == torch.bfloat16
    assert (found == expected).float().mean() > 0.99  # but for those that lie next to a rounding edge


def test_hooks_are_gone_after_an_exception(make_model: ModelFactory) -> None:
    model, sae, tokens = make_model("qwen2").double(), make_sae(), ids()
    clean = model(input_ids=tokens).logits
    with pytest.raises(RuntimeError, match="mine"), edited(model, "layers.1", sae, [0, 1, 2], ablate):
        raise RuntimeError("mine")
    assert torch.equal(model(input_ids=tokens).logits, clean)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_mistakes_are_named(make_model: ModelFactory) -> None:
    model, sae, tokens = make_model("qwen2").double(), make_sae(), ids()
    for latents in ([], [3, 3], [LATENTS], [-1]):
        with pytest.raises(ValueError, match="each once, from 0 to 79"), edited(model, 1, sae, latents, ablate):
            pass
    with pytest.raises(HookpointError, match="layers.9"), edited(model, "layers.9", sae, [0], ablate):
        pass
    with pytest.raises(IncompatibleSAEError, match="16"), edited(model, 1, make_sae(16), [0], ablate):
        model(input_ids=tokens)
    values = latent_values(model, 1, sae, [0], ids(tokens=5))
    with pytest.raises(ValueError, match=r"\(3, 5, 1\).*\(3, 9, 1\)"), edited(model, 1, sae, [0], put(values)):
        model(input_ids=tokens)
