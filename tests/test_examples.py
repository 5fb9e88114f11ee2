"""Top activating examples against a full sort of dense latents; nearest tokens against the formula."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ModelFactory
from datasets import Dataset
from sae_lens import StandardSAE, StandardSAEConfig

from resa_hf.errors import IncompatibleSAEError
from resa_hf.features.examples import Example, nearest_tokens, top_examples
from resa_hf.hookpoints import capture
from resa_hf.sae.autoencoder import SAELensSAE, TopKSAE

D_IN, LATENTS, K = 32, 48, 6
SPECIAL = (3, 4)


def ragged_rows(count: int = 41, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(3, 64, rng.integers(1, 30)).tolist()} for _ in range(count)]


def curves(model: Any, sae: TopKSAE, rows: list[dict[str, Any]], excluded: tuple[int, ...]) -> list[np.ndarray]:
    """Each row's latents, [tokens, num_latents], read one row at a time; 0 at excluded tokens."""
    found = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad(), capture(model, ["layers.1"]) as hooked:
            model(input_ids=ids)
            latents = sae.encode(hooked["layers.1"][0])
        found.append(latents.masked_fill(torch.isin(ids[0], torch.tensor(excluded))[:, None], 0).numpy())
    return found


def by_full_sort(
    rows: list[dict[str, Any]], values: list[np.ndarray], latent: int, count: int, context: int
) -> list[Example]:
    examples = []
    for number, (row, curve) in enumerate(zip(rows, (value[:, latent] for value in values), strict=True)):
        at = int(curve.argmax())
        low, high = max(0, at - context), at + context + 1
        tokens, around = tuple(row["input_ids"][low:high]), tuple(curve[low:high].tolist())
        examples.append(Example(number, at, float(curve[at]), tokens, around))
    ordered = sorted(examples, key=lambda example: (-example.value, example.row))
    return [example for example in ordered if example.value > 0][:count]


@pytest.fixture
def model(make_model: ModelFactory) -> Any:
    return make_model("qwen2", initializer_range=0.2).double()


@pytest.fixture
def sae() -> TopKSAE:
    return TopKSAE(D_IN, LATENTS, K, dtype=torch.float64)


@pytest.mark.parametrize(("count", "context", "batch_size"), [(4, 3, 8), (100, 50, 5), (1, 0, 1)])
@pytest.mark.parametrize("excluded", [(), SPECIAL])
def test_they_are_those_of_a_full_sort(
    model: Any, sae: TopKSAE, count: int, context: int, batch_size: int, excluded: tuple[int, ...]
) -> None:
    rows, latents = ragged_rows(), [7, 0, 33, 47, 12]
    values = curves(model, sae, rows, excluded)
    found = top_examples(
        *(model, "layers.1", sae, rows, latents),
        excluded_token_ids=excluded,
        count=count,
        context=context,
        batch_size=batch_size,
    )
    assert list(found) == latents
    for latent, examples in found.items():
        expected = by_full_sort(rows, values, latent, count, context)
        assert [(e.row, e.position, e.tokens) for e in examples] == [(e.row, e.position, e.tokens) for e in expected]
        for example, other in zip(examples, expected, strict=True):
            assert example.value == pytest.approx(other.value) == max(example.values)
            assert example.values == pytest.approx(other.values)


def test_a_peak_at_an_excluded_token_does_not_count(model: Any, sae: TopKSAE) -> None:
    rows = [{"input_ids": [9, 3, 17, 4, 22]}]
    curve = curves(model, sae, rows, ())[0]
    latent = next(j for j in range(LATENTS) if curve[:, j].argmax() in (1, 3) and (curve[[0, 2, 4], j] > 0).any())
    (every,) = top_examples(model, 1, sae, rows, [latent], excluded_token_ids=())[latent]
    (counted,) = top_examples(model, 1, sae, rows, [latent], excluded_token_ids=SPECIAL)[latent]
    assert every.position in (1, 3) and counted.position in (0, 2, 4) and counted.value < every.value
    assert counted.values[1] == counted.values[3] == 0


def test_padding_never_counts_and_is_not_shown(model: Any, sae: TopKSAE) -> None:
    plain = ragged_rows(9)
    for row in plain:
        row["input_ids"] = [token for token in row["input_ids"] if token > 9] or [10]
    # On either side, as generation and collation pad. Without position ids the left padding shifts the positions, so
    # the latents are read anew.
    masks = [[0, 0] + [1] * len(row["input_ids"]) + [0, 0, 0] for row in plain]
    padded = [
        {"input_ids": [5, 6, *row["input_ids"], 7, 7, 7], "attention_mask": mask}
        for row, mask in zip(plain, masks, strict=True)
    ]
    with torch.no_grad(), capture(model, ["layers.1"]) as hooked:
        curves = []
        for row in padded:
            model(**{key: torch.tensor([value]) for key, value in row.items()})
            curves.append(sae.encode(hooked["layers.1"][0])[2:-3].numpy())
    found = top_examples(model, 1, sae, padded, range(LATENTS), excluded_token_ids=(), count=99, context=99)
    for latent, examples in found.items():
        assert {example.row for example in examples} == {i for i, c in enumerate(curves) if c[:, latent].any()}
        for example in examples:
            curve = curves[example.row][:, latent]
            assert example.tokens == tuple(plain[example.row]["input_ids"])
            assert example.values == pytest.approx(curve.tolist())
            assert example.position == curve.argmax() + 2


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_of_equal_ones_the_earlier_row_comes_first(model: Any, sae: TopKSAE, batch_size: int) -> None:
    one, other = ({"input_ids": ids} for ids in ([9, 17, 22, 31], [40, 41, 50, 51]))
    rows = [other, one, one, other, one, other, one]
    latent = int(curves(model, sae, [one], ())[0].max(axis=0).argmax())
    assert curves(model, sae, [other], ())[0][:, latent].max() < curves(model, sae, [one], ())[0][:, latent].max()
    found = top_examples(model, 1, sae, rows, [latent], excluded_token_ids=(), count=3, batch_size=batch_size)
    assert [example.row for example in found[latent]] == [1, 2, 4]
    assert len({example.values for example in found[latent]}) == 1


def test_rows_are_read_once_and_no_further_than_a_batch_ahead(model: Any, sae: TopKSAE) -> None:
    taken = []

    def stream() -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            if number == 50:
                return
            taken.append(number)
            yield {"input_ids": [3 + number, 9]}

    once = top_examples(model, 1, sae, stream(), [4], excluded_token_ids=(), batch_size=4)
    assert taken == list(range(50))
    rows = [{"input_ids": [3 + number, 9]} for number in range(50)]
    streamed = Dataset.from_list(rows).to_iterable_dataset()
    assert top_examples(model, 1, sae, streamed, [4], excluded_token_ids=(), batch_size=4) == once


def test_an_sae_that_is_silent_has_no_examples(model: Any) -> None:
    standard = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=LATENTS, device="cpu", dtype="float64"))
    with torch.no_grad():
        standard.b_enc.fill_(-1e6)
        assert top_examples(model, 1, SAELensSAE(standard), ragged_rows(3), [4], excluded_token_ids=()) == {4: []}
        standard.b_enc[4] = 1e6
    assert len(top_examples(model, 1, SAELensSAE(standard), ragged_rows(3), [4], excluded_token_ids=())[4]) == 3


def test_what_cannot_be_read_is_told(model: Any, sae: TopKSAE) -> None:
    with pytest.raises(ValueError, match="0 to 47, but no latent 48"):
        top_examples(model, 1, sae, ragged_rows(2), [1, 48], excluded_token_ids=())
    with pytest.raises(ValueError, match="count is 0"):
        top_examples(model, 1, sae, ragged_rows(2), [1], excluded_token_ids=(), count=0)
    assert top_examples(model, 1, sae, [], [5, 5], excluded_token_ids=()) == {5: []}


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_nearest_tokens_are_those_of_the_formula(make_model: ModelFactory, tiny_tokenizer: Any, kind: str) -> None:
    # A vocabulary padded past the tokenizer's 56 tokens, and a norm whose weight and bias matter.
    model: Any = make_model(kind, initializer_range=0.2)
    norm = model.model.norm if kind == "qwen2" else model.transformer.ln_f
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(D_IN, generator=generator))
    sae = TopKSAE(D_IN, LATENTS, K)
    row, head = sae.W_dec[11].detach(), model.lm_head.weight.detach()
    if kind == "qwen2":
        normed = row / row.square().mean().sqrt() * norm.weight
    else:
        normed = F.layer_norm(row, (D_IN,), eps=1e-5) * norm.weight  # without the bias
    logits = (head @ normed.detach())[: len(tiny_tokenizer)]
    expected = sorted(range(len(logits)), key=lambda token: -logits[token])[:5]
    found = nearest_tokens(model, sae, 11, tiny_tokenizer, count=5)
    assert [text for text, _ in found] == [tiny_tokenizer.decode([token]) for token in expected]
    assert [value for _, value in found] == pytest.approx(logits[expected].tolist(), rel=1e-3)


def test_the_nearest_token_of_a_head_row_is_that_token(tiny_base: Any, tiny_tokenizer: Any) -> None:
    sae = TopKSAE(128, 8, 2)
    token = tiny_tokenizer.convert_tokens_to_ids("7")
    with torch.no_grad():
        sae.W_dec[3] = 0.01 * tiny_base.lm_head.weight[token] / tiny_base.model.norm.weight
        assert nearest_tokens(tiny_base, sae, 3, tiny_tokenizer, count=1)[0][0] == "7"
        sae.W_dec[3] *= -1
        assert nearest_tokens(tiny_base, sae, 3, tiny_tokenizer, count=56)[-1][0] == "7"
    with pytest.raises(IncompatibleSAEError, match="keep the shape"):
        nearest_tokens(tiny_base, TopKSAE(64, 8, 2), 3, tiny_tokenizer)
