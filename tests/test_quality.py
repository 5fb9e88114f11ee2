"""FVU, L0, dead share and cross-entropy recovered against calculations on full matrices."""

from pathlib import Path
from typing import Any

import pytest
import sae_reference
import torch
import torch.nn.functional as F
from conftest import ModelFactory
from datasets import Dataset
from sae_lens import StandardSAE, StandardSAEConfig
from torch import Tensor, nn

from resa_hf.errors import DataError, HookpointError
from resa_hf.hookpoints import capture
from resa_hf.sae.autoencoder import SAELensSAE, TopKSAE
from resa_hf.sae.metadata import ce_recovered
from resa_hf.sae.quality import sae_quality

D_IN, LATENTS, K = 32, 80, 6


@pytest.fixture
def model(make_model: ModelFactory) -> nn.Module:
    return make_model("qwen2").double()


def rows(count: int = 7, length: int = 11) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_dict({"input_ids": torch.randint(3, 64, (count, length), generator=generator).tolist()})


def make_sae(hookpoint: str | None = "layers.1") -> TopKSAE:
    sae = TopKSAE(D_IN, LATENTS, K, hookpoint=hookpoint, dtype=torch.float64)
    with torch.no_grad():
        sae.b_dec += 0.05
    return sae


def by_hand(model: Any, ids: Tensor, change: Any, mask: Tensor | None = None) -> float:
    """Cross-entropy of a model whose layer 1 was changed, by the layers themselves and not by hooks."""
    hidden = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, positions)
    causal = torch.triu(torch.full((ids.shape[1], ids.shape[1]), -torch.inf, dtype=hidden.dtype), 1)[None, None]
    for index, layer in enumerate(model.model.layers):
        hidden = layer(hidden, attention_mask=causal, position_embeddings=rotary, position_ids=positions)
        if index == 1:
            hidden = change(hidden)
    logits = model.lm_head(model.model.norm(hidden))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


@pytest.mark.parametrize("ablation", ["mean", "zero"])
@torch.no_grad()
def test_quality_equals_a_calculation_by_hand(model: nn.Module, ablation: Any) -> None:
    sae, dataset = make_sae(), rows()
    ids = torch.tensor(dataset["input_ids"][:])
    quality = sae_quality(model, sae, dataset, batch_size=3, ablation=ablation)
    with capture(model, ["layers.1"]) as hooked:
        model(input_ids=ids)
    x = hooked["layers.1"].flatten(0, 1)
    latents = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    latents = torch.where(latents >= latents.topk(K, dim=1).values[:, -1:], latents, 0)
    out = latents @ sae.W_dec + sae.b_dec
    constant = x.mean(0) if ablation == "mean" else torch.zeros(D_IN, dtype=x.dtype)
    clean = by_hand(model, ids, lambda hidden: hidden)
    spliced = by_hand(model, ids, lambda hidden: out.view_as(hidden))
    ablated = by_hand(model, ids, lambda hidden: constant.expand_as(hidden))
    expected = {
        "fvu": ((x - out).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item(),
        "l0": (latents > 0).sum().item() / len(x),
        "dead_share": (latents > 0).sum(0).eq(0).double().mean().item(),
        "tokens": len(x),
        "ce_clean": clean,
        "ce_spliced": spliced,
        "ce_ablated": ablated,
        "ce_recovered": (ablated - spliced) / (ablated - clean),
    }
    assert quality.keys() == expected.keys()
    for name, value in expected.items():
        assert quality[name] == pytest.approx(value, rel=1e-7), name


@torch.no_grad()
def test_a_perfect_sae_recovers_everything_and_a_constant_one_nothing(model: nn.Module) -> None:
    identity = torch.eye(D_IN, dtype=torch.float64)
    both_signs = torch.cat([identity, -identity])
    zeros = torch.zeros(2 * D_IN, dtype=torch.float64)
    perfect = TopKSAE.from_weights(both_signs, zeros, both_signs, zeros[:D_IN], k=D_IN, hookpoint="layers.1")
    quality = sae_quality(model, perfect, rows())
    assert quality["fvu"] == pytest.approx(0, abs=1e-12)
    assert quality["ce_recovered"] == pytest.approx(1, abs=1e-9)
    silent = TopKSAE.from_weights(both_signs, zeros - 1e9, both_signs, zeros[:D_IN], k=D_IN, hookpoint="layers.1")
    quality = sae_quality(model, silent, rows(), ablation="zero")
    assert quality["l0"] == 0
    assert quality["dead_share"] == 1
    assert quality["ce_spliced"] == quality["ce_ablated"]
    assert quality["ce_recovered"] == 0


def test_padding_does_not_count(model: nn.Module) -> None:
    sae, plain = make_sae(), rows(4)
    padded = Dataset.from_dict(
        {
            "input_ids": [[*ids, 9, 9] for ids in plain["input_ids"]],
            "attention_mask": [[1] * len(ids) + [0, 0] for ids in plain["input_ids"]],
        }
    )
    one, other = sae_quality(model, sae, plain), sae_quality(model, sae, padded)
    assert one == pytest.approx(other, rel=1e-9)


def test_excluded_tokens_pass_untouched(model: nn.Module) -> None:
    dataset = rows()
    every = sorted({token for ids in dataset["input_ids"] for token in ids})
    sae = make_sae()
    kept = sae_quality(model, sae, dataset, excluded_token_ids=every[1:])
    assert kept["tokens"] == sum(ids.count(every[0]) for ids in dataset["input_ids"])
    untouched = sae_quality(model, sae, dataset, excluded_token_ids=every)
    assert untouched["tokens"] == 0
    assert untouched["ce_spliced"] == untouched["ce_clean"]


def test_other_saes_and_hookpoints(make_model: ModelFactory) -> None:
    model = make_model("gpt2")
    torch.manual_seed(0)
    sae = SAELensSAE(StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=LATENTS)), hookpoint="blocks.1.hook_mlp_out")
    quality = sae_quality(model, sae, rows())
    with torch.no_grad(), capture(model, ["h.1.mlp"]) as hooked:
        model(input_ids=torch.tensor(rows()["input_ids"][:]))
    x = hooked["h.1.mlp"].flatten(0, 1)
    with torch.no_grad():
        fvu = (x - sae(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert quality["fvu"] == pytest.approx(fvu.item(), rel=1e-4)
    assert quality == sae_quality(model, sae, rows(), "h.1.mlp")
    assert quality["fvu"] != sae_quality(model, sae, rows(), 0)["fvu"]


def test_model_and_sae_are_left_alone(model: nn.Module, tmp_path: Path) -> None:
    model.train()
    sae = make_sae()
    before = [tensor.clone() for module in (model, sae) for tensor in module.state_dict().values()]
    sae_quality(model, sae, rows())
    after = [tensor for module in (model, sae) for tensor in module.state_dict().values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_input_is_refused(model: nn.Module) -> None:
    with pytest.raises(DataError, match="empty"):
        sae_quality(model, make_sae(), rows(0))
    with pytest.raises(DataError, match="next token"):
        sae_quality(model, make_sae(), rows(3, 1))
    with pytest.raises(HookpointError, match="give hookpoint"):
        sae_quality(model, make_sae(None), rows())
    with pytest.raises(HookpointError, match=r"layers\.99"):
        sae_quality(model, make_sae(), rows(), "layers.99")
    with pytest.raises(ValueError, match="'median'"):
        sae_quality(model, make_sae(), rows(), ablation="median")  # type: ignore[arg-type]


def test_ce_recovered_of_a_trainer_is_that_of_its_first_64_held_out_rows(
    make_model: ModelFactory, tmp_path: Path
) -> None:
    # Far enough from zero that an SAE makes a difference.
    model, held_out = make_model("qwen2", initializer_range=0.2), sae_reference.rows(68, seed=5)
    args = sae_reference.config(tmp_path, hookpoints=["layers.0", "layers.1.mlp"])
    trainer = sae_reference.train(model, args, eval_dataset=held_out)
    found = ce_recovered(trainer)
    expected = {
        f"eval_ce_recovered/{hookpoint}": sae_quality(model, sae, held_out.select(range(64)))["ce_recovered"]
        for hookpoint, sae in trainer.saes.items()
    }
    assert found == pytest.approx(expected, rel=1e-4) and len(found) == 2
    every = [sae_quality(model, sae, held_out)["ce_recovered"] for sae in trainer.saes.values()]
    assert list(found.values()) != pytest.approx(every, rel=1e-4)
    assert ce_recovered(sae_reference.train(model, args)) == {}


def test_ce_recovered_leaves_special_tokens_as_training_did(
    make_model: ModelFactory, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    model = make_model("qwen2", initializer_range=0.2)
    ids = [[tiny_tokenizer.eos_token_id, *row] for row in sae_reference.rows(8)["input_ids"]]
    args = sae_reference.config(tmp_path, exclude_special_tokens=True)
    held_out = Dataset.from_dict({"input_ids": ids})
    trainer = sae_reference.train(model, args, eval_dataset=held_out, processing_class=tiny_tokenizer)
    sae, special = trainer.saes["layers.1"], tiny_tokenizer.all_special_ids
    kept = sae_quality(model, sae, held_out, excluded_token_ids=special)["ce_recovered"]
    assert ce_recovered(trainer)["eval_ce_recovered/layers.1"] == pytest.approx(kept, rel=1e-4)
    assert kept != pytest.approx(sae_quality(model, sae, held_out)["ce_recovered"], rel=1e-3)
