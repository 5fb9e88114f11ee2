"""Matching of latents: full for a copy, no more than chance for SAEs that share nothing, and its numbers."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ModelFactory
from sae_lens import StandardSAE, StandardSAEConfig
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from resa_hf.errors import DataError, IncompatibleSAEError
from resa_hf.features.firings import read_firings
from resa_hf.features.matching import Matching, match_activations, match_decoders
from resa_hf.hookpoints import capture
from resa_hf.sae.autoencoder import SAELensSAE, TopKSAE
from resa_hf.tiny.task import make_problems

D_IN, LATENTS = 32, 80
HOOKPOINTS = ("layers.1", "layers.1")


def random_rows(count: int = 60, length: int = 20, seed: int = 0) -> list[dict[str, Any]]:
    ids = np.random.default_rng(seed).integers(3, 64, (count, length))
    return [{"input_ids": row.tolist()} for row in ids]


def copied(sae: TopKSAE, scales: Tensor, seed: int = 1) -> tuple[TopKSAE, np.ndarray]:
    """A copy whose latents are in another order, each `scales` times as large; and where each has gone."""
    order = torch.randperm(sae.num_latents, generator=torch.Generator().manual_seed(seed))
    encoder, b_enc, decoder = sae.W_enc.detach().t() * scales, sae.b_enc.detach() * scales[:, 0], sae.W_dec / scales
    copy = TopKSAE.from_weights(
        encoder[order], b_enc[order], decoder.detach()[order], sae.b_dec.detach().clone(), k=sae.k
    )
    return copy, order.argsort().numpy()


def with_decoder(rows: np.ndarray) -> TopKSAE:
    tensor = torch.from_numpy(rows).float()
    return TopKSAE.from_weights(tensor, torch.zeros(len(rows)), tensor.clone(), torch.zeros(rows.shape[1]), k=4)


def inside(found: Matching) -> bool:
    low, high = found.null_share
    return low <= found.share.estimate <= high


def assert_in_full(found: Matching, gone_to: np.ndarray, latents: int) -> None:
    assert len(found.first) == latents
    assert (found.second == gone_to[found.first]).all()
    assert found.similarity == pytest.approx(np.ones(latents), abs=1e-5)
    assert found.share.estimate == 1 and found.share.low > found.null_share[1] and found.threshold < 0.99


def test_a_permuted_rescaled_copy_is_matched_in_full_by_decoder() -> None:
    sae = TopKSAE(D_IN, LATENTS, 4, seed=0)
    scales = torch.logspace(-2, 2, LATENTS)[:, None]
    copy, gone_to = copied(sae, scales)
    found = match_decoders(sae, copy)
    assert found.kind == "decoder" and found.null_similarity.shape == (39, LATENTS)
    assert (found.null_similarity > found.threshold).mean() == pytest.approx(0.05, abs=0.001)
    assert_in_full(found, gone_to, LATENTS)


# TopK compares latents, so only a common factor leaves it as it is; with k = num_latents it is a ReLU.
@pytest.mark.parametrize(("k", "spread"), [(4, 0.0), (LATENTS, 1.0)])
def test_a_permuted_rescaled_copy_is_matched_in_full_by_activations(
    make_model: ModelFactory, k: int, spread: float
) -> None:
    model, sae = make_model("qwen2", initializer_range=0.2), TopKSAE(D_IN, LATENTS, k, seed=0)
    copy, gone_to = copied(sae, 3 * torch.logspace(-spread, spread, LATENTS)[:, None])
    rows = random_rows(30)
    found = match_activations(model, sae, model, copy, rows, hookpoints=HOOKPOINTS, excluded_token_ids=(), nulls=5)
    firing = read_firings(model, "layers.1", sae, rows, excluded_token_ids=(), batch_size=8).counts > 0
    assert found.kind == "activation" and set(found.first) == set(np.flatnonzero(firing))
    assert_in_full(found, gone_to, int(firing.sum()))


def test_random_decoders_match_no_more_than_the_null() -> None:
    found = [
        match_decoders(TopKSAE(D_IN, LATENTS, 4, seed=s), TopKSAE(D_IN, LATENTS, 4, seed=99 - s)) for s in range(20)
    ]
    # 95% of intervals should hold the share: 16 or fewer of 20 have probability 1.6%.
    assert sum(inside(one) for one in found) >= 17
    assert np.mean([one.share.estimate for one in found]) == pytest.approx(0.05, abs=0.02)


def test_decoders_that_share_only_mean_and_covariance_match_no_more_than_the_null() -> None:
    spectrum = np.arange(1, D_IN + 1) ** -0.5
    found, naive = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        one, other, third = (0.3 * spectrum + spectrum * rng.standard_normal((160, D_IN)) for _ in range(3))
        found.append(match_decoders(with_decoder(one), with_decoder(other), seed=seed))
        isotropic = match_decoders(with_decoder(one), with_decoder(third / spectrum), nulls=9)
        naive.append(np.mean(found[-1].similarity > isotropic.threshold))
    assert sum(inside(one) for one in found) >= 17
    assert min(naive) > 0.4  # directions without the covariance would have called nearly half of them matched


def chains(tokenizer: Any, count: int = 40) -> list[dict[str, Any]]:
    texts = [f"{p.question}<think>{p.trace}</think><answer>{p.answer}</answer>" for p in make_problems(count, seed=5)]
    return [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]


@pytest.mark.slow
def test_random_saes_on_one_model_correlate_no_more_than_the_null(tiny_base: Any, tiny_tokenizer: Any) -> None:
    rows = chains(tiny_tokenizer)
    found = [
        match_activations(
            *(
                tiny_base,
                TopKSAE(128, 128, 8, seed=2 * seed),
                tiny_base,
                TopKSAE(128, 128, 8, seed=2 * seed + 1),
                rows,
            ),
            hookpoints=("layers.2", "layers.2"),
            excluded_token_ids=tiny_tokenizer.all_special_ids,
            seed=seed,
        )
        for seed in range(10)
    ]
    # 7 or fewer of 10 have probability 1.2%.
    assert sum(inside(one) for one in found) >= 8


def test_against_shuffled_tokens_two_random_saes_would_have_matched(tiny_base: Any, tiny_tokenizer: Any) -> None:
    one, other = (
        read_firings(
            *(tiny_base, "layers.2", TopKSAE(128, 128, 8, seed=seed), chains(tiny_tokenizer, 20)),
            excluded_token_ids=tiny_tokenizer.all_special_ids,
            batch_size=8,
        ).latents.toarray()
        for seed in range(2)
    )
    one, other = one[:, one.any(axis=0)], other[:, other.any(axis=0)]
    found, shuffled = (
        correlation[linear_sum_assignment(correlation, maximize=True)]
        for tokens in (other, np.roll(other, len(other) // 2, axis=0))
        for correlation in [np.corrcoef(one.T, tokens.T)[: one.shape[1], one.shape[1] :]]
    )
    assert (found > np.quantile(shuffled, 0.95)).mean() > 0.7


def dense(model: Any, sae: TopKSAE, rows: list[dict[str, Any]]) -> np.ndarray:
    with torch.no_grad(), capture(model, ["layers.1"]) as hooked:
        model(input_ids=torch.tensor([row["input_ids"] for row in rows]))
        return sae.encode(hooked["layers.1"].flatten(0, 1)).double().numpy()


def test_correlations_are_numpys_and_the_pairing_is_the_best_of_all(make_model: ModelFactory) -> None:
    one, other = make_model("qwen2", initializer_range=0.2), make_model("qwen2", seed=1, initializer_range=0.2)
    first, second, rows = TopKSAE(D_IN, 24, 6, seed=0), TopKSAE(D_IN, 24, 6, seed=1), random_rows(20)
    latents, candidates = [3, 20, 7, 11], [5, 9, 0, 23, 14, 2]
    found = match_activations(
        *(one, first, other, second, rows),
        hookpoints=HOOKPOINTS,
        excluded_token_ids=(),
        latents=latents,
        candidates=candidates,
        batch_size=3,
        nulls=2,
    )
    both = np.hstack([dense(one, first, rows)[:, latents], dense(other, second, rows)[:, candidates]])
    expected = np.corrcoef(both.T)[:4, 4:]
    best = max(permutations(range(6), 4), key=lambda p: expected[range(4), p].sum())
    assert found.first.tolist() == latents and found.second.tolist() == [candidates[index] for index in best]
    assert found.similarity == pytest.approx(expected[range(4), best], abs=1e-6)


def test_the_pairing_by_decoder_is_the_best_of_all() -> None:
    first, second = TopKSAE(8, 5, 2, seed=0), TopKSAE(8, 6, 2, seed=1)
    found = match_decoders(first, second, nulls=2)
    cosines = torch.cosine_similarity(first.W_dec[:, None], second.W_dec[None], dim=-1).detach().numpy()
    best = max(permutations(range(6), 5), key=lambda p: cosines[range(5), p].sum())
    assert found.second.tolist() == list(best) != cosines.argmax(axis=1).tolist()
    assert found.similarity == pytest.approx(cosines[range(5), best], abs=1e-6)


def test_other_saes_of_sae_lens_are_matched_too(make_model: ModelFactory) -> None:
    standard = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=LATENTS, device="cpu"))
    with torch.no_grad():
        standard.W_enc.copy_(torch.randn(D_IN, LATENTS, generator=torch.Generator().manual_seed(0)))
        standard.W_dec.copy_(standard.W_enc.T)
    sae, model = SAELensSAE(standard), make_model("qwen2", initializer_range=0.2)
    relu = TopKSAE.from_weights(
        standard.W_enc.detach().T, torch.zeros(LATENTS), standard.W_dec.detach(), torch.zeros(D_IN), k=LATENTS
    )
    gone_to = np.arange(LATENTS)
    assert_in_full(match_decoders(sae, relu, nulls=5), gone_to, LATENTS)
    for pair in ((sae, relu), (relu, sae)):
        found = match_activations(
            *(model, pair[0], model, pair[1], random_rows(20)),
            hookpoints=HOOKPOINTS,
            excluded_token_ids=(),
            nulls=5,
        )
        assert_in_full(found, gone_to, LATENTS)


def test_a_latent_that_never_fires_matches_nothing(make_model: ModelFactory) -> None:
    model, sae = make_model("qwen2", initializer_range=0.2), TopKSAE(D_IN, 24, 6, seed=0)
    with torch.no_grad():
        sae.b_enc[3] = -1e6
    settings: dict[str, Any] = {"hookpoints": HOOKPOINTS, "excluded_token_ids": (), "nulls": 3}
    found = match_activations(
        model, sae, model, sae, random_rows(), latents=[3, 4, 5], candidates=[3, 4, 5], **settings
    )
    assert dict(zip(found.first.tolist(), found.similarity, strict=True)) == pytest.approx({3: 0, 4: 1, 5: 1})
    assert 3 not in match_activations(model, sae, model, sae, random_rows(), **settings).first


def test_a_batch_in_which_nothing_counts_or_fires_is_no_obstacle(make_model: ModelFactory) -> None:
    standard = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=LATENTS, device="cpu"))
    rows = [{"input_ids": [3, 3]}, *random_rows(2), {"input_ids": [3, 3, 3]}]
    kept = sum(token != 3 for row in rows for token in row["input_ids"])
    with torch.no_grad():
        standard.b_enc.fill_(-1e6)
    for sae, firing in ((SAELensSAE(standard), 0), (TopKSAE(D_IN, LATENTS, 6), 6)):
        found = read_firings(make_model("qwen2"), 1, sae, rows, excluded_token_ids=(3,), batch_size=1)
        assert found.latents.shape == (kept, LATENTS) and found.counts.sum() == firing * kept
        assert found.least.shape == (kept,) and (found.least > 0).all() == (firing > 0)


def test_what_cannot_be_matched_is_told(make_model: ModelFactory) -> None:
    sae = TopKSAE(D_IN, 24, 6)
    with pytest.raises(IncompatibleSAEError, match="32 and 16"):
        match_decoders(sae, TopKSAE(16, 24, 6))
    with pytest.raises(ValueError, match="0 to 23, but no latent 24"):
        match_decoders(sae, sae, latents=[2, 24])
    with pytest.raises(ValueError, match="at least 2"):
        match_decoders(sae, sae, candidates=[2, 2])
    with pytest.raises(ValueError, match="nulls is 1"):
        match_decoders(sae, sae, nulls=1)
    large = TopKSAE(4, 5000, 6)
    with pytest.raises(ValueError, match="5,000 latents and 5,000 candidates"):
        match_decoders(large, large)
    assert len(match_decoders(large, large, latents=[7, 4000], nulls=2).first) == 2
    model = make_model("qwen2")
    with pytest.raises(DataError, match="0 token"):
        match_activations(model, sae, model, sae, [], hookpoints=HOOKPOINTS, excluded_token_ids=())
