"""One SAE on two models: the same one, one nearby, one that shares nothing."""

from typing import Any

import numpy as np
import pytest
import sae_reference
import torch
from conftest import ModelFactory
from test_matching import D_IN, chains, dense, random_rows
from transformers import AutoModelForCausalLM

from resa_hf.errors import IncompatibleSAEError
from resa_hf.features.two_models import TwoReadings, read_on_two
from resa_hf.sae.autoencoder import TopKSAE

LATENTS = 160


def perturbed(model: Any, scale: float) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


def read(one: Any, other: Any, sae: TopKSAE, **settings: Any) -> TwoReadings:
    return read_on_two(one, other, "layers.1", sae, random_rows(), **{"excluded_token_ids": (), **settings})


def inside(found: TwoReadings) -> bool:
    return found.null_share[0] <= found.share.estimate <= found.null_share[1]


def test_on_the_same_model_every_latent_is_itself(make_model: ModelFactory) -> None:
    model, sae = make_model("qwen2", initializer_range=0.2), TopKSAE(D_IN, LATENTS, 6)
    found = read(model, make_model("qwen2", initializer_range=0.2), sae)
    assert found.latents.tolist() == np.flatnonzero(dense(model, sae, random_rows()).any(axis=0)).tolist()
    assert found.correlation == pytest.approx(np.ones(len(found.latents)), abs=1e-9)
    assert found.share.estimate == 1 and found.threshold < 0.9
    expected = sae_reference.naive_fvu(sae, sae_reference.activations(model, as_dataset(), "layers.1"))
    assert found.fvu == pytest.approx((expected, expected), rel=1e-4)


def as_dataset() -> Any:
    return {"input_ids": [row["input_ids"] for row in random_rows()]}


def test_correlations_are_numpys_and_fall_with_the_distance(make_model: ModelFactory) -> None:
    model, sae = make_model("qwen2", initializer_range=0.2), TopKSAE(D_IN, LATENTS, 6)
    medians = []
    for scale in (0.02, 0.1, 0.3):
        other = perturbed(make_model("qwen2", initializer_range=0.2), scale)
        found = read(model, other, sae, batch_size=7)
        one, two = dense(model, sae, random_rows()), dense(other, sae, random_rows())
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = np.array([np.corrcoef(one[:, j], two[:, j])[0, 1] for j in found.latents])
        assert found.correlation == pytest.approx(np.nan_to_num(expected), abs=1e-6)
        assert found.fvu[0] != found.fvu[1]
        medians.append(np.median(found.correlation))
    assert 0.999 > medians[0] > medians[1] > medians[2]
    assert found.share.low > found.null_share[1]  # still far above chance


@pytest.mark.slow
def test_an_unrelated_model_shows_no_more_than_the_null(make_model: ModelFactory) -> None:
    found = [
        read(
            make_model("qwen2", seed=seed, initializer_range=0.2),
            make_model("qwen2", seed=100 + seed, initializer_range=0.2),
            TopKSAE(D_IN, LATENTS, 6, seed=seed),
            seed=seed,
        )
        for seed in range(20)
    ]
    # 95% of intervals should hold the share: 16 or fewer of 20 have probability 1.6%.
    assert sum(inside(one) for one in found) >= 17


@pytest.mark.slow
def test_nor_does_one_on_text_with_a_form(tiny_base: Any, tiny_tokenizer: Any) -> None:
    rows, found = chains(tiny_tokenizer), []
    for seed in range(10):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            other = AutoModelForCausalLM.from_config(tiny_base.config).eval()
        sae, special = TopKSAE(128, 256, 8, seed=seed), tiny_tokenizer.all_special_ids
        found.append(read_on_two(tiny_base, other, "layers.2", sae, rows, excluded_token_ids=special, seed=seed))
    # 7 or fewer of 10 have probability 1.2%.
    assert sum(inside(one) for one in found) >= 8


def test_latents_that_are_asked_for(make_model: ModelFactory) -> None:
    model, sae = make_model("qwen2", initializer_range=0.2), TopKSAE(D_IN, LATENTS, 6)
    with torch.no_grad():
        sae.b_enc[9] = -1e6
    found = read(model, model, sae, latents=[30, 9, 4, 30])
    assert found.latents.tolist() == [30, 9, 4]
    assert found.correlation == pytest.approx([1, 0, 1], abs=1e-9)
    assert found.share.estimate == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no latent 160"):
        read(model, model, sae, latents=[160, 2])
    with pytest.raises(ValueError, match="at least 2"):
        read(model, model, sae, latents=[3])


def test_excluded_tokens_and_padding_do_not_count(make_model: ModelFactory) -> None:
    model, sae = make_model("qwen2", initializer_range=0.2), TopKSAE(D_IN, LATENTS, 6)
    other = perturbed(make_model("qwen2", initializer_range=0.2), 0.2)
    rows = random_rows()
    kept = np.array([token not in (5, 6) for row in rows for token in row["input_ids"]])
    mask = [1] * 20 + [0, 0]
    padded = [{"input_ids": [*row["input_ids"], 9, 9], "attention_mask": mask} for row in rows]
    one, two = dense(model, sae, rows)[kept], dense(other, sae, rows)[kept]
    for given in (rows, padded):
        found = read_on_two(model, other, 1, sae, iter(given), excluded_token_ids=(5, 6))
        column = int(found.latents[np.argmax(one[:, found.latents].sum(axis=0))])
        expected = np.corrcoef(one[:, column], two[:, column])[0, 1]
        assert found.correlation[found.latents == column] == pytest.approx(expected, abs=1e-5)


def test_another_width_is_told(make_model: ModelFactory) -> None:
    model = make_model("qwen2")
    with pytest.raises(IncompatibleSAEError, match="width 16, not of width 32"):
        read(model, model, TopKSAE(16, 24, 6))
