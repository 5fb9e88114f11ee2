"""Effects of edits and their nulls against plain calculations and on a model whose answer is built in."""

from typing import Any

import numpy as np
import pytest
import torch
from built_in_latent import CUE, HOOKPOINT, built_in_model, built_in_sae, latent_of, make_problems, make_rows
from conftest import ModelFactory
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resa_hf.errors import DataError
from resa_hf.evaluation.engine import Sampling, answer
from resa_hf.evaluation.statistics import paired_over_problems
from resa_hf.features.causal import ablate, amplify, edited, put
from resa_hf.features.effects import measure_effect, next_token_kl
from resa_hf.features.matched import Null, latent_statistics, matched_latents
from resa_hf.hookpoints import capture
from resa_hf.sae.autoencoder import TopKSAE

GREEDY = Sampling(temperature=0, max_new_tokens=8)
D_IN, LATENTS, K = 32, 80, 6


def ragged_rows(count: int = 7, longest: int = 11) -> list[dict[str, Any]]:
    drawn = torch.randint(3, 64, (count, longest), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row[: longest - index]} for index, row in enumerate(drawn)]


@torch.no_grad()
def make_sae() -> TopKSAE:
    sae = TopKSAE(D_IN, LATENTS, K, dtype=torch.float64)
    sae.b_dec += 0.05
    return sae


def logits_of(model: PreTrainedModel, row: dict[str, Any]) -> Tensor:
    return model(input_ids=torch.tensor([row["input_ids"]])).logits[0]


@torch.no_grad()
def test_kl_equals_a_calculation_row_by_row(make_model: ModelFactory) -> None:
    model, sae, rows = make_model("qwen2").double(), make_sae(), ragged_rows()
    latents = list(range(0, LATENTS, 2))
    expected = []
    for row in rows:
        p = logits_of(model, row).softmax(-1)
        with edited(model, "layers.1", sae, latents, amplify(5)):
            q = logits_of(model, row).softmax(-1)
        expected.append(float((p * (p / q).log()).sum(-1).mean()))
    assert min(expected) > 1e-6
    padded = [
        {"input_ids": [*row["input_ids"], 9, 9], "attention_mask": [1] * len(row["input_ids"]) + [0, 0]}
        for row in rows
    ]
    for given, batch_size in ((rows, 1), (rows, 3), (padded, 8)):
        found = next_token_kl(model, "layers.1", sae, latents, amplify(5), given, batch_size=batch_size)
        np.testing.assert_allclose(found, expected, rtol=1e-8)
    assert not next_token_kl(model, "layers.1", sae, latents, amplify(1), rows).any()


@torch.no_grad()
def test_statistics_equal_a_dense_calculation(make_model: ModelFactory) -> None:
    model, sae, rows = make_model("qwen2").double(), make_sae(), ragged_rows()
    found = []
    for row in rows:
        with capture(model, ["layers.1"]) as hooked:
            logits_of(model, row)
        found.append(sae.encode(hooked["layers.1"][0]))
    for excluded in ([], [rows[0]["input_ids"][0]]):
        counted = [token not in excluded for row in rows for token in row["input_ids"]]
        z = torch.cat(found)[counted].numpy()
        rates, means = latent_statistics(model, 1, sae, rows, excluded_token_ids=excluded, batch_size=3)
        np.testing.assert_allclose(rates, (z > 0).mean(0), rtol=1e-12)
        np.testing.assert_allclose(means, z.sum(0) / np.maximum((z > 0).sum(0), 1), rtol=1e-9)
    assert (rates == 0).any() and (rates > 0).any()


def lognormal(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.lognormal(-4, 1, count), rng.lognormal(0, 0.5, count)


def test_matched_latents_are_like_those_tested_and_never_among_them() -> None:
    rates, norms = lognormal(3000, 0)
    rates[::7] = 0
    tested = [1, 2, 50, 401]
    sets = matched_latents(rates, norms, tested, count=60, seed=3)
    assert sets.shape == (60, 4)
    assert not np.isin(sets, tested).any()
    assert len({tuple(sorted(row)) for row in sets.tolist()}) == 60
    assert all(len(set(row)) == 4 for row in sets.tolist())
    for found, wanted in ((rates[sets], rates[tested]), (norms[sets], norms[tested])):
        assert (np.maximum(found / wanted, wanted / found) <= 2).all()
        # A set's total is on neither side of the one tested, beyond what the draws explain.
        difference = np.log(found / wanted).mean(axis=1)
        assert abs(difference.mean()) < 0.1
    assert np.array_equal(sets, matched_latents(rates, norms, tested, count=60, seed=3))
    assert not np.array_equal(sets, matched_latents(rates, norms, tested, count=60, seed=4))


def test_a_single_latent_gets_its_nearest_neighbours() -> None:
    rates, norms = lognormal(500, 1)
    typical = int(np.abs(np.log(rates) + 4).argmin())
    apart = np.maximum(np.abs(np.log(rates / rates[typical])), np.abs(np.log(norms / norms[typical])))
    nearest = np.argsort(apart)[1:21]  # without itself
    found = matched_latents(rates, norms, [typical], count=20, seed=0)
    assert set(found[:, 0].tolist()) == set(nearest.tolist())
    close = int((apart <= np.log(2)).sum()) - 1
    few = matched_latents(rates, norms, [typical], count=400, seed=0)
    assert 1 < len(few) == close < 400


def test_what_cannot_be_matched_is_named() -> None:
    rates, norms = lognormal(100, 2)
    rates[5], rates[8] = 0, 1e-9
    with pytest.raises(DataError, match=r"\[5\] are never active"):
        matched_latents(rates, norms, [3, 5], count=5, seed=0)
    with pytest.raises(DataError, match=r"as \[8\], within a factor of 2"):
        matched_latents(rates, norms, [3, 8], count=5, seed=0)


def test_a_null_counts_what_is_at_least_as_extreme() -> None:
    null = Null.of(-2.0, [0.0, 1.0, 2.0, -3.0])
    assert (null.p_value, null.n, null.mean) == (3 / 5, 4, 0.0)
    assert (null.low, null.high) == tuple(np.percentile([0.0, 1.0, 2.0, -3.0], [2.5, 97.5]))
    assert Null.of(0.0, [0.0, 0.0]).p_value == 1
    assert Null.of(9.0, np.zeros(19)).p_value == 1 / 20


def test_p_values_are_uniform_where_random_latents_are_tested() -> None:
    rates, norms = lognormal(2000, 4)
    rng = np.random.default_rng(5)
    effects = rates * norms**2 * rng.lognormal(0, 0.5, 2000)
    # The loudest third, but for the few that have no neighbours.
    loud = np.argsort(norms)[-700:-100]
    matched, unmatched = [], []
    for latent in rng.choice(loud, 400, replace=False):
        others = matched_latents(rates, norms, [latent], count=19, seed=0)[:, 0]
        matched.append(Null.of(effects[latent], effects[others]).p_value)
        unmatched.append(Null.of(effects[latent], effects[rng.choice(2000, 19)]).p_value)
    counts = np.bincount(np.rint(np.array(matched) * 20).astype(int) - 1, minlength=20)
    assert stats.chisquare(counts).pvalue > 0.01
    assert np.mean(unmatched) < 0.45 < np.mean(matched)  # without matching, loud latents look special


@pytest.fixture(scope="module")
def built_in(tiny_tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    problems = make_problems(40)
    prompts, golds = zip(*problems, strict=True)
    rows = make_rows(tiny_tokenizer, problems)
    settings = {"rows": rows, "prompts": prompts, "golds": golds, "sampling": GREEDY, "nulls": 20, "answer_nulls": 20}
    return {"model": built_in_model(tiny_tokenizer), "sae": built_in_sae(), "settings": settings}


def test_the_latent_that_carries_the_answer_is_found_and_its_nulls_are_not(
    built_in: dict[str, Any], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model, sae, settings = built_in["model"], built_in["sae"], built_in["settings"]
    carrier = latent_of(tiny_tokenizer, CUE)
    found = measure_effect(model, tiny_tokenizer, HOOKPOINT, sae, [carrier], ablate, **settings)
    assert {name: null.p_value for name, null in found.nulls.items()} == {
        "kl": 1 / 21,
        "accuracy": 1 / 21,
        "length": 1,
    }
    assert found.accuracy is not None and found.length is not None
    assert found.accuracy.estimate == pytest.approx(-0.4) and found.accuracy.high < 0
    assert found.nulls["accuracy"].low == found.nulls["accuracy"].high == 0
    assert found.kl.low > 100 * found.nulls["kl"].high

    with edited(model, HOOKPOINT, sae, [carrier], ablate):
        outcomes = answer(model, tiny_tokenizer, settings["prompts"], settings["golds"], GREEDY, progress=False)
    assert found.accuracy == paired_over_problems(outcomes.correct, np.ones_like(outcomes.correct))
    kl = next_token_kl(model, HOOKPOINT, sae, [carrier], ablate, settings["rows"])
    student = stats.t.interval(0.95, len(kl) - 1, kl.mean(), stats.sem(kl))
    assert found.kl.estimate == pytest.approx(kl.mean())
    assert found.kl.low <= student[0] and student[1] <= found.kl.high
    assert found.kl.high - found.kl.low < 1.5 * (student[1] - student[0])

    # A little at each token, so that together they are what one cue is: then every answer is 1.
    everywhere = put(torch.tensor([0.05]))
    patched = measure_effect(model, tiny_tokenizer, HOOKPOINT, sae, [carrier], everywhere, **settings)
    assert patched.accuracy is not None and patched.accuracy.estimate == pytest.approx(-0.6)
    assert patched.nulls["kl"].p_value == patched.nulls["accuracy"].p_value == 1 / 21


def test_other_letters_are_not_found(built_in: dict[str, Any], tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    settings = {name: value for name, value in built_in["settings"].items() if name not in ("prompts", "golds")}
    floors = 0
    for letter in "abc":
        latent = latent_of(tiny_tokenizer, letter)
        found = measure_effect(
            built_in["model"], tiny_tokenizer, HOOKPOINT, built_in["sae"], [latent], ablate, **settings
        )
        assert found.accuracy is None and found.length is None and set(found.nulls) == {"kl"}
        floors += found.nulls["kl"].p_value == 1 / 21
    assert floors == 0


def test_length_is_compared_problem_by_problem(
    built_in: dict[str, Any], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model, sae, settings = built_in["model"], built_in["sae"], built_in["settings"]
    one = latent_of(tiny_tokenizer, "1")  # what says that an answer of 1 ends here
    rows = [
        {"input_ids": [*row["input_ids"], 7 + int(gold)]}
        for row, gold in zip(settings["rows"], settings["golds"], strict=True)
    ]
    found = measure_effect(model, tiny_tokenizer, HOOKPOINT, sae, [one], ablate, **{**settings, "rows": rows})
    with edited(model, HOOKPOINT, sae, [one], ablate):
        outcomes = answer(model, tiny_tokenizer, settings["prompts"], settings["golds"], GREEDY, progress=False)
    longer = outcomes.lengths[:, 0] - 4  # `<answer>`, the digit, `</answer>`, the end
    assert set(longer[[gold == "0" for gold in settings["golds"]]]) == {0} and longer.max() > 0
    assert found.length is not None
    assert found.length.estimate == pytest.approx(longer.mean())
    student = stats.t.interval(0.95, len(longer) - 1, longer.mean(), stats.sem(longer))
    assert found.length.low <= student[0] and student[1] <= found.length.high


def test_mistakes_are_named(built_in: dict[str, Any], tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    settings = built_in["settings"]
    for changed, error, words in (
        ({"answer_nulls": 21}, ValueError, "nulls is 20 and answer_nulls 21"),
        ({"rows": settings["rows"][:1]}, DataError, "1 rows"),
        ({"prompts": ["a="], "golds": ["0"]}, DataError, "1 prompts"),
    ):
        with pytest.raises(error, match=words):
            measure_effect(
                built_in["model"], tiny_tokenizer, HOOKPOINT, built_in["sae"], [0], ablate, **{**settings, **changed}
            )
