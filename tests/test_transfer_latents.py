"""The example of the latents that carry a transfer: what it holds, and what it attributes."""

import importlib.util
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from resa_hf.features.causal import activations
from resa_hf.hookpoints import splice
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.tiny import load_tiny_base, load_tiny_source

PATH = Path(__file__).parents[1] / "examples" / "transfer_latents.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("transfer_latents", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models():
    return load_tiny_source(torch.float64), load_tiny_base(torch.float64)


def exact_sae(width: int) -> TopKSAE:
    """Every coordinate and its negative is a latent, so that nothing is left over."""
    both = torch.cat([torch.eye(width), -torch.eye(width)]).double()
    zeros = torch.zeros(2 * width).double()
    return TopKSAE.from_weights(both, zeros, both.clone(), zeros[:width].clone(), k=2 * width, hookpoint="layers.2")


IDS = torch.tensor([[5, 9, 12, 7, 20, 3], [8, 8, 4, 30, 11, 2]])


def test_with_all_latents_of_an_exact_sae_the_source_has_the_targets_activations(example, models):
    source, target = models
    sae = exact_sae(source.config.hidden_size)
    with splice(source, "layers.2", lambda _: activations(target, "layers.2", IDS)):
        wanted = source(input_ids=IDS).logits
    before = source(input_ids=IDS).logits
    with example.held_at_target(source, target, sae, range(sae.num_latents)):
        held = source(input_ids=IDS).logits
    torch.testing.assert_close(held, wanted)
    assert not torch.allclose(held, before)
    # Afterwards no hook is left, and a target that is as the source changes nothing.
    assert torch.equal(source(input_ids=IDS).logits, before)
    with example.held_at_target(source, load_tiny_source(torch.float64), sae, [3, 200]):
        torch.testing.assert_close(source(input_ids=IDS).logits, before)


def test_attribution_is_the_first_order_of_holding_a_latent(example, models):
    """Towards the target by a thousandth of the way, the divergence falls by a thousandth of what is attributed."""
    source, target = models
    sae = exact_sae(source.config.hidden_size)
    rows = Dataset.from_dict({"input_ids": IDS.tolist()})
    falls = example.attributed(source, target, sae, rows).double()
    x, wanted = activations(source, "layers.2", IDS), activations(target, "layers.2", IDS)
    batch = {"input_ids": IDS}
    with torch.no_grad():
        whole = example.divergence(source, target, batch)
        for latent in falls.abs().topk(3).indices.tolist():
            change = (sae.encode(wanted) - sae.encode(x))[..., [latent]] @ sae.W_dec[[latent]]
            with splice(source, "layers.2", lambda x, change=change: x + 1e-3 * change):
                moved = example.divergence(source, target, batch)
            assert (whole - moved).item() == pytest.approx(1e-3 * falls[latent].item(), rel=0.02)


def test_the_divergence_is_torchs(example, models):
    source, target = models
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        found = example.divergence(source, target, {"input_ids": IDS, "attention_mask": mask})
        logits = [model(input_ids=IDS, attention_mask=mask).logits.log_softmax(-1)[mask.bool()] for model in models]
    expected = torch.nn.functional.kl_div(logits[1], logits[0], log_target=True, reduction="sum")
    torch.testing.assert_close(found, expected)
