"""Attributions against autograd through a dense SAE, closed forms, and real ablation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from built_in_latent import CUE, HOOKPOINT, built_in_model, built_in_sae, latent_of, make_problems, make_rows
from conftest import ModelFactory
from datasets import Dataset
from sae_lens import StandardSAE, StandardSAEConfig
from sae_reference import config
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resa_hf.features.attribution import attribute
from resa_hf.features.causal import ablate, edited
from resa_hf.hookpoints import capture, splice
from resa_hf.sae.autoencoder import SAELensSAE, TopKSAE
from resa_hf.sae.trainer import SAETrainer
from resa_hf.text import cot_text
from resa_hf.tiny import task

D_IN, LATENTS, K = 32, 80, 6
LENS = StandardSAEConfig(d_in=D_IN, d_sae=LATENTS, dtype="float64")


def ids(rows: int = 3, tokens: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def make_sae() -> TopKSAE:
    sae = TopKSAE(D_IN, LATENTS, K, dtype=torch.float64)
    sae.b_dec += 0.05
    return sae


@torch.no_grad()
def lens_sae() -> SAELensSAE:
    sae = StandardSAE(LENS)
    sae.load_state_dict(make_sae().state_dict())
    return SAELensSAE(sae)


def metric(logits: Tensor) -> Tensor:
    """No linear one: a log-probability and a logit."""
    return logits[:, -1].log_softmax(-1)[:, 7].sum() + logits[:, 4, 9].sum()


def dense_attribution(
    model: nn.Module, sae: Any, tokens: Tensor, fractions: list[float], excluded: int = -1
) -> Tensor:
    """By autograd to all latents of a dense SAE whose error term is put back."""
    with torch.no_grad(), capture(model, ["layers.1"]) as hooked:
        model(input_ids=tokens)
    x = hooked["layers.1"]
    z = sae.encode(x).detach() * (tokens != excluded).unsqueeze(-1)
    error = (x - sae.decode(z)).detach()
    total = torch.zeros_like(z)
    for fraction in fractions:
        point = (fraction * z).requires_grad_()
        with splice(model, "layers.1", lambda _, point=point: sae.decode(point) + error):
            value = metric(model(input_ids=tokens).logits)
        total += torch.autograd.grad(value, point)[0] / len(fractions)
    return (total * z).sum((0, 1))


@pytest.mark.parametrize("make", [make_sae, lens_sae])
@pytest.mark.parametrize(("steps", "fractions"), [(None, [1.0]), (3, [1 / 6, 1 / 2, 5 / 6])])
def test_attribution_equals_autograd_through_a_dense_sae(
    make_model: ModelFactory, make: Callable[[], Any], steps: int | None, fractions: list[float]
) -> None:
    model, sae, tokens = make_model("qwen2").double(), make(), ids()
    found = attribute(model, "layers.1", sae, tokens, metric, steps=steps)
    expected = dense_attribution(model, sae, tokens, fractions)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    assert (found.abs() > 1e-6).sum() > 10
    assert not found.requires_grad and all(parameter.grad is None for parameter in model.parameters())


def test_integrated_gradients_sum_to_the_difference_of_the_metric(make_model: ModelFactory) -> None:
    model, sae, tokens = make_model("qwen2").double(), make_sae(), ids()
    with torch.no_grad():
        clean = metric(model(input_ids=tokens).logits)
        with edited(model, "layers.1", sae, range(LATENTS), ablate):
            difference = clean - metric(model(input_ids=tokens).logits)
    sums = [attribute(model, "layers.1", sae, tokens, metric, steps=steps).sum() for steps in (4, 16, 64)]
    errors = [abs(float((total - difference) / difference)) for total in sums]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


@torch.no_grad()
def test_where_the_metric_is_linear_both_equal_real_ablation(make_model: ModelFactory) -> None:
    model, sae, tokens = make_model("qwen2").double(), make_sae(), ids()
    model.model.norm = nn.Identity()  # from the last layer on, nothing but the LM head

    def linear(logits: Tensor) -> Tensor:
        return (logits[..., 7] - 2 * logits[..., 9]).sum()

    clean = linear(model(input_ids=tokens).logits)
    real = []
    for latent in range(LATENTS):
        with edited(model, "layers.2", sae, [latent], ablate):
            real.append(clean - linear(model(input_ids=tokens).logits))
    for steps in (None, 2):
        found = attribute(model, "layers.2", sae, tokens, linear, steps=steps)
        torch.testing.assert_close(found, torch.stack(real), atol=1e-12, rtol=1e-9)


def test_padding_on_the_left_changes_nothing(make_model: ModelFactory) -> None:
    model, sae, tokens = make_model("gpt2").double(), make_sae(), ids()  # GPT-2's positions are absolute

    def last(logits: Tensor) -> Tensor:
        return logits[:, -1, 7].sum()

    plain = attribute(model, "h.1", sae, tokens, last)
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), tokens], dim=1)
    mask = (torch.arange(13) >= 4).long().expand(3, -1)
    found = attribute(model, "h.1", sae, padded, last, attention_mask=mask)
    torch.testing.assert_close(found, plain, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("steps", "fractions"), [(None, [1.0]), (2, [0.25, 0.75])])
def test_excluded_tokens_get_nothing(make_model: ModelFactory, steps: int | None, fractions: list[float]) -> None:
    model, sae, tokens = make_model("qwen2").double(), make_sae(), ids()
    tokens[:, :2] = 5
    found = attribute(model, "layers.1", sae, tokens, metric, steps=steps, excluded_token_ids=[5])
    expected = dense_attribution(model, sae, tokens, fractions, excluded=5)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    assert not torch.allclose(found, attribute(model, "layers.1", sae, tokens, metric, steps=steps))


@pytest.mark.parametrize("steps", [None, 20])
def test_the_latent_that_carries_the_answer_comes_first(
    tiny_tokenizer: PreTrainedTokenizerBase, steps: int | None
) -> None:
    model, sae, token = built_in_model(tiny_tokenizer), built_in_sae(), tiny_tokenizer.get_vocab()
    tokens = torch.tensor([row["input_ids"] for row in make_rows(tiny_tokenizer, make_problems(40))])

    def one_or_zero(logits: Tensor) -> Tensor:
        return (logits[:, -1, token["1"]] - logits[:, -1, token["0"]]).sum()

    found = attribute(model, HOOKPOINT, sae, tokens, one_or_zero, steps=steps)
    carrier = latent_of(tiny_tokenizer, CUE)
    assert found.abs().argmax() == carrier
    letters = [latent_of(tiny_tokenizer, letter) for letter in "abcdefg"]
    assert found[letters].abs().max() < 1e-3 * found[carrier]


@pytest.mark.slow
def test_attribution_ranks_latents_of_the_tiny_reasoner_as_ablation_does(
    tiny_base: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, record_property: Any
) -> None:
    problems = task.make_problems(160, seed=5)
    texts = [cot_text(p.question, p.trace, p.answer, template="chat", tokenizer=tiny_tokenizer) for p in problems]
    rows = Dataset.from_dict({"input_ids": tiny_tokenizer(texts)["input_ids"]})
    settings = {"hookpoints": ["layers.2"], "num_latents": 256, "k": 16, "sae_optimizer": "adam", "max_steps": 40}
    args = config(tmp_path, learning_rate=2e-3, per_device_train_batch_size=16, use_cpu=True, **settings)
    trainer = SAETrainer(tiny_base, args, rows)
    trainer.train()
    sae = trainer.saes["layers.2"]
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows["input_ids"][:4]], batch_first=True)
    mask = (tokens != 0).long()

    def log_likelihood(logits: Tensor) -> Tensor:
        found = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
        return (found * mask[:, 1:]).sum()

    attributed = attribute(tiny_base, "layers.2", sae, tokens, log_likelihood, attention_mask=mask)
    live = attributed.nonzero().flatten().tolist()[::2]
    real = []
    with torch.no_grad():
        clean = log_likelihood(tiny_base(input_ids=tokens, attention_mask=mask).logits)
        for latent in live:
            with edited(tiny_base, "layers.2", sae, [latent], ablate):
                logits = tiny_base(input_ids=tokens, attention_mask=mask).logits
            real.append(float(clean - log_likelihood(logits)))
    correlation = spearmanr(attributed[live], real).statistic
    record_property("rank correlation", float(correlation))  # xdist sends plain numbers only
    integrated = attribute(tiny_base, "layers.2", sae, tokens, log_likelihood, attention_mask=mask, steps=16)
    record_property("rank correlation of integrated gradients", float(spearmanr(integrated[live], real).statistic))
    assert len(live) > 40
    assert correlation > 0.7


def test_of_an_sae_in_bf16_attributions_are_summed_in_float32(make_model: ModelFactory) -> None:
    model, sae, tokens = make_model("qwen2").float(), make_sae().bfloat16(), ids(8, 100)
    found = attribute(model, "layers.1", sae, tokens, metric)
    with capture(model, ["layers.1"]) as hooked:
        gradient = torch.autograd.grad(metric(model(input_ids=tokens).logits), hooked["layers.1"])[0]
    z = sae.encode(hooked["layers.1"].detach().flatten(0, 1)).double()
    expected = (z * (gradient.flatten(0, 1).double() @ sae.W_dec.double().T)).sum(0).detach()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-7, rtol=1e-4)
    assert (expected.abs() > 1e-5).sum() > 10


def test_mistakes_are_named(make_model: ModelFactory) -> None:
    with pytest.raises(ValueError, match="steps is 0"):
        attribute(make_model("qwen2").double(), 1, make_sae(), ids(), metric, steps=0)
