"""The TopK SAE against sae-lens' dense one and against sparsify's formula, value and gradient."""

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor

from resa_hf.sae import sparse
from resa_hf.sae.autoencoder import SAELensSAE, TopKSAE
from resa_hf.sae.objective import SAEBank, sae_step

D_IN, LATENTS, K, TOKENS = 12, 96, 5, 40
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def make_sae(dtype: torch.dtype = torch.float64, seed: int = 0) -> TopKSAE:
    """An SAE whose biases are not zero, so that dropping one shows."""
    sae = TopKSAE(D_IN, LATENTS, K, dtype=dtype, seed=seed, hookpoint="layers.1")
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        sae.b_enc += 0.1 * torch.randn(LATENTS, generator=generator)
        sae.b_dec += torch.randn(D_IN, generator=generator)
    return sae


def make_x(dtype: torch.dtype = torch.float64, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(*(shape or (TOKENS,)), D_IN, generator=generator) * 2 + 1).to(dtype)


def dense_twin(sae: TopKSAE) -> TopKTrainingSAE:
    """sae-lens' own TopK SAE with the same weights."""
    config = TopKTrainingSAEConfig(
        d_in=D_IN, d_sae=LATENTS, k=K, dtype="float64", rescale_acts_by_decoder_norm=False, aux_loss_coefficient=1.0
    )
    twin = TopKTrainingSAE(config)
    twin.load_state_dict({name: tensor.clone() for name, tensor in sae.state_dict().items()})
    return twin


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def sparsify_formula(
    weights: dict[str, Tensor], x: Tensor, dead_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruction, FVU and AuxK as in sparsify, but that AuxK reaches the encoder and leaves b_dec out."""
    pre = torch.relu((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])

    def decode(count: int, acts: Tensor) -> Tensor:
        values, indices = acts.topk(count, dim=-1)
        return torch.einsum("tk,tkd->td", values, weights["W_dec"][indices])

    reconstruction = decode(K, pre) + weights["b_dec"]
    error = x - reconstruction
    variance = (x - x.mean(0)).pow(2).sum()
    auxk = torch.zeros((), dtype=x.dtype)
    if dead_mask is not None and int(dead_mask.sum()) > 0:
        count = min(D_IN // 2, int(dead_mask.sum()))
        few = min(int(dead_mask.sum()) / (D_IN // 2), 1.0)
        left_over = decode(count, torch.where(dead_mask, pre, -torch.inf))
        auxk = few * (left_over - error.detach()).pow(2).sum() / variance
    return reconstruction, error.pow(2).sum() / variance, auxk


def test_value_and_gradients_equal_sae_lens_dense_topk() -> None:
    ours, x = make_sae(), make_x().requires_grad_()
    theirs, x_too = dense_twin(ours), make_x().requires_grad_()
    cotangent = torch.randn(TOKENS, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    out, out_too = ours(x), theirs(x_too)
    (out * cotangent).sum().backward()
    (out_too * cotangent).sum().backward()
    assert relative_error(out, out_too) < 1e-12
    assert relative_error(x.grad, x_too.grad) < 1e-12
    for name in NAMES:
        assert relative_error(getattr(ours, name).grad, getattr(theirs, name).grad) < 1e-12, name
    assert torch.equal(ours.encode(x) > 0, theirs.encode(x) > 0)


@pytest.mark.parametrize("num_dead", [0, 3, 60])
def test_loss_and_gradients_equal_sparsify_formula(num_dead: int) -> None:
    sae, x = make_sae(), make_x()
    dead = torch.arange(LATENTS) < num_dead
    weights = {name: getattr(sae, name).detach().clone().requires_grad_() for name in NAMES}
    reconstruction, fvu, auxk = sparsify_formula(weights, x, dead)
    (fvu + 0.5 * auxk).backward()
    step = sae_step(sae, x, torch.ones(TOKENS, dtype=torch.float64), dead, auxk_alpha=0.5)
    step.loss.backward()
    assert auxk.item() > 0 or num_dead == 0
    assert relative_error(sae(x), reconstruction) < 1e-12
    assert (step.loss - (fvu + 0.5 * auxk)).abs().item() < 1e-12
    for name in NAMES:
        assert relative_error(getattr(sae, name).grad, weights[name].grad) < 1e-10, name


def test_auxk_value_and_gradients_equal_sae_lens() -> None:
    ours, x = make_sae(), make_x()
    theirs = dense_twin(ours)
    dead = torch.arange(LATENTS) < 60
    acts, pre = theirs.encode_with_hidden_pre(x)
    auxk = theirs.calculate_topk_aux_loss(x, theirs.decode(acts), pre, dead)
    # sae-lens takes the mean over tokens, sparsify and we the share of the variance; and sae-lens has no ReLU here,
    # so the comparison needs the chosen dead latents to be positive.
    assert bool((pre[:, dead].topk(D_IN // 2).values > 0).all())
    auxk = auxk * TOKENS / (x - x.mean(0)).pow(2).sum()
    auxk.backward()
    ones = torch.ones(TOKENS, dtype=torch.float64)
    loss = sae_step(ours, x, ones, dead, auxk_alpha=1.0).loss - sae_step(ours, x, ones).loss
    loss.backward()
    assert (loss - auxk).abs().item() < 1e-12
    for name in ("W_enc", "b_enc", "W_dec"):
        assert relative_error(getattr(ours, name).grad, getattr(theirs, name).grad) < 1e-10, name


def test_auxk_trains_the_encoder_of_dead_latents() -> None:
    # sparsify's FusedEncoder drops this gradient, so that its AuxK never revives a latent's encoder.
    sae, x = make_sae(), make_x()
    with torch.no_grad():
        sae.b_enc[:60] -= 1.2  # below the k largest everywhere, yet partly above zero
    dead = ~(sae.encode(x) > 0).any(dim=0)
    ones = torch.ones(TOKENS, dtype=torch.float64)
    sae_step(sae, x, ones).loss.backward()
    assert bool(dead[:60].any())
    assert float(sae.W_enc.grad[:, dead].norm()) == 0
    sae_step(sae, x, ones, dead, auxk_alpha=1 / 32).loss.backward()
    assert float(sae.W_enc.grad[:, dead].norm()) > 0
    assert float(sae.b_enc.grad[dead].norm()) > 0


def test_uncounted_tokens_are_as_if_absent() -> None:
    sae, twin, x = make_sae(), make_sae(), make_x()
    weight = (torch.arange(TOKENS) % 3 != 0).double()
    dead = torch.arange(LATENTS) < 60
    x_with_junk = x.clone()
    x_with_junk[weight == 0] = torch.nan
    step = sae_step(sae, x_with_junk, weight, dead, 0.1)
    alone = sae_step(twin, x[weight == 1], torch.ones(int(weight.sum()), dtype=torch.float64), dead, 0.1)
    step.loss.backward()
    alone.loss.backward()
    assert (step.loss - alone.loss).abs().item() < 1e-12
    assert torch.equal(step.firings, alone.firings)
    assert float(step.tokens) == float(weight.sum())
    for name in NAMES:
        assert relative_error(getattr(sae, name).grad, getattr(twin, name).grad) < 1e-12, name


@pytest.mark.parametrize("counted", [0, 1])
def test_a_batch_without_variance_gives_no_gradient_and_no_nan(counted: int) -> None:
    sae = make_sae()
    step = sae_step(sae, make_x(), (torch.arange(TOKENS) < counted).double())
    step.loss.backward()
    assert float(step.loss) == 0
    assert all(float(getattr(sae, name).grad.norm()) == 0 for name in NAMES)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision_stays_near_float64(dtype: torch.dtype, tolerance: float) -> None:
    sae = make_sae(dtype)
    exact = make_sae(torch.float64)
    exact.load_state_dict(sae.state_dict())
    x = make_x(dtype)
    values, indices = sae.encode_sparse(x)
    # The same latents, since near ties may fall differently.
    pre = (x.double() - exact.b_dec) @ exact.W_enc + exact.b_enc
    reference = exact.decode_sparse(pre.gather(1, indices).relu(), indices)
    out = sae.decode_sparse(values, indices)
    assert out.dtype == dtype
    assert relative_error(out.double(), reference) < tolerance
    out.float().pow(2).sum().backward()
    assert all(getattr(sae, name).grad.dtype == dtype for name in NAMES)
    assert all(bool(torch.isfinite(getattr(sae, name).grad).all()) for name in NAMES)


def test_splicing_a_frozen_sae_gives_the_gradient_of_the_input_in_its_own_dtype() -> None:
    sae = make_sae(torch.float32).requires_grad_(False)
    x = make_x(torch.bfloat16, 2, 9).requires_grad_()
    out = sae(x)
    assert out.shape == x.shape
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    # Independent: the SAE is affine where its active latents stay, so its Jacobian is W_enc W_dec on those latents.
    active = (sae.encode(x.float()) > 0).float()
    expected = torch.einsum("di,bti,i->btd", sae.W_enc, active, sae.W_dec.sum(dim=1))
    assert x.grad.dtype == torch.bfloat16
    assert relative_error(x.grad.float(), expected) < 1e-2
    assert all(getattr(sae, name).grad is None for name in NAMES)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> list[Tensor]:
        sae, x = make_sae(), make_x().requires_grad_()
        step = sae_step(sae, x.detach(), torch.ones(TOKENS, dtype=torch.float64), torch.arange(LATENTS) < 60, 0.1)
        step.loss.backward()
        sae(x).square().sum().backward()
        return [step.loss.detach(), x.grad, *(getattr(sae, name).grad for name in NAMES)]

    whole = gradients()
    monkeypatch.setattr(sparse, "_MAX_ELEMENTS_CPU", 7 * LATENTS)
    monkeypatch.setattr(sparse, "_MIN_ROWS", 1)
    for one, other in zip(whole, gradients(), strict=True):
        assert relative_error(one, other) < 1e-13


def test_autocast_does_not_choose_the_latents() -> None:
    sae, x = make_sae(torch.float32), make_x(torch.float32)
    plain = sae_step(sae, x, torch.ones(TOKENS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sae(x), sae(x.clone()))
        out = sae(x)
        in_bank = SAEBank({"layers.1": sae})({"layers.1": x}, {"layers.1": torch.ones(TOKENS)})["layers.1"]
    assert torch.equal(out, sae(x))
    assert torch.equal(plain.loss, in_bank.loss)


def test_encode_and_decode_agree_with_forward() -> None:
    sae, x = make_sae(), make_x(torch.float64, 2, 3, 4)
    latents = sae.encode(x)
    values, indices = sae.encode_sparse(x)
    assert latents.shape == (2, 3, 4, LATENTS)
    assert values.shape == indices.shape == (2, 3, 4, K)
    assert int((latents != 0).sum(dim=-1).max()) <= K
    assert torch.equal(latents.gather(-1, indices), values)
    assert relative_error(sae.decode(latents), sae(x)) < 1e-14
    assert relative_error(sae.decode_sparse(values, indices), sae(x)) == 0


def test_initial_decoder_is_the_encoder_transposed_with_unit_norm() -> None:
    sae = TopKSAE(D_IN, LATENTS, K, seed=4)
    rows = sae.W_enc.t()
    assert torch.allclose(sae.W_dec, rows / rows.norm(dim=1, keepdim=True))
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(LATENTS))
    assert not bool(sae.b_enc.any())
    assert not bool(sae.b_dec.any())


def test_seed_decides_the_weights_and_leaves_the_global_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    one, same, other = (TopKSAE(D_IN, LATENTS, K, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.W_enc, same.W_enc)
    assert not torch.equal(one.W_enc, other.W_enc)


def test_unit_norm_and_parallel_gradient() -> None:
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.1, 3, LATENTS)[:, None])
        sae.W_dec[0] = 0
    directions = sae.W_dec.detach().clone()
    sae.unit_norm_decoder()
    assert torch.allclose(sae.W_dec[1:].norm(dim=1), torch.ones(LATENTS - 1, dtype=torch.float64))
    assert torch.allclose(torch.cosine_similarity(sae.W_dec[1:], directions[1:]), torch.ones(1, dtype=torch.float64))
    assert not bool(sae.W_dec[0].any())
    sae(make_x()).pow(2).sum().backward()
    before = sae.W_dec.grad.clone()
    sae.remove_parallel_decoder_gradient()
    assert float((sae.W_dec.grad * sae.W_dec).sum(dim=1).abs().max()) < 1e-10 * float(before.norm())
    removed = before - sae.W_dec.grad  # parallel to the rows, and nothing else
    assert relative_error(removed, (removed * sae.W_dec).sum(1, keepdim=True) * sae.W_dec) < 1e-12


@pytest.mark.parametrize(
    ("d_in", "num_latents", "k", "wrong"), [(0, 8, 2, "0"), (4, 0, 2, "0"), (4, 8, 9, "9"), (4, 8, 0, "0")]
)
def test_impossible_sizes_are_refused(d_in: int, num_latents: int, k: int, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        TopKSAE(d_in, num_latents, k)


def test_any_sae_of_sae_lens_has_the_same_interface() -> None:
    inner = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=20))
    sae = SAELensSAE(inner, hookpoint="layers.2", metadata={"model_name": "m"})
    x = make_x(torch.float32, 2, 3)
    assert (sae.d_in, sae.num_latents, sae.k, sae.hookpoint) == (D_IN, 20, None, "layers.2")
    assert torch.equal(sae(x), inner(x))
    assert torch.equal(sae.decode(sae.encode(x)), inner(x))
    assert sae.encode(x).shape == (2, 3, 20)
    # Moved by a parent, which sae-lens' own `to` does not notice.
    torch.nn.ModuleList([sae]).to(torch.bfloat16)
    assert sae(x).dtype == torch.float32
    assert relative_error(sae(x), inner(x).float()) < 2e-2
