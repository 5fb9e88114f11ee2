"""The tiled divergence against the plain formula with full logits and autograd."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PhiConfig, Qwen2Config

from resa_hf.hookpoints import backbone
from resa_hf.tuning import loss as tuning_loss
from resa_hf.tuning.loss import LMHead, frozen_head, token_cross_entropy, token_divergence


def naive_logits(hidden, weight, bias, scale, softcap):
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def naive_divergence(student, teacher, beta):
    p, q = teacher.softmax(-1), student.softmax(-1)
    kl = lambda a, b: (a * (a.log() - b.log())).sum(-1)  # noqa: E731
    if beta == 0:
        return kl(p, q)
    if beta == 1:
        return kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.25, None), (True, 2.0, 3.0)])
def test_value_and_gradient_in_float64(monkeypatch, beta, temperature, bias, scale, softcap):
    monkeypatch.setattr(tuning_loss, "tile_tokens", lambda vocabulary, device: 7)  # several tiles, the last one short
    torch.manual_seed(0)
    n, d, v = 30, 6, 50
    student = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(n, d + 2, dtype=torch.float64)
    weights = [torch.randn(v, d, dtype=torch.float64), torch.randn(v, d + 2, dtype=torch.float64)]
    biases = [torch.randn(v, dtype=torch.float64) if bias else None for _ in range(2)]
    upstream = torch.rand(n, dtype=torch.float64)  # not uniform: every token's gradient must be scaled by its own

    heads = [LMHead(weight, b, scale, softcap) for weight, b in zip(weights, biases, strict=True)]
    ours = token_divergence(student, teacher, *heads, beta=beta, temperature=temperature)
    (ours_grad,) = torch.autograd.grad((ours * upstream).sum(), student)

    logits = [
        naive_logits(hidden, weight, b, scale, softcap) / temperature
        for hidden, weight, b in zip((student, teacher), weights, biases, strict=True)
    ]
    expected = naive_divergence(*logits, beta)
    (expected_grad,) = torch.autograd.grad((expected * upstream).sum(), student)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours_grad, expected_grad, rtol=1e-10, atol=1e-12)


def test_direction_is_that_of_torch_kl_div():
    torch.manual_seed(0)
    head = LMHead(torch.eye(5, dtype=torch.float64))
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    forward = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    reverse = F.kl_div(teacher.log_softmax(-1), student.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(token_divergence(student, teacher, head, head, beta=0.0), forward)
    torch.testing.assert_close(token_divergence(student, teacher, head, head, beta=1.0), reverse)
    assert not torch.allclose(forward, reverse)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_zero_for_equal_models(beta):
    hidden, head = torch.randn(8, 4, requires_grad=True), LMHead(torch.randn(11, 4))
    loss = token_divergence(hidden, hidden.detach().clone(), head, head, beta=beta)
    loss.sum().backward()
    assert loss.abs().max() <= (1e-7 if 0 < beta < 1 else 0)  # the mixture has a rounding of its own
    assert hidden.grad.abs().max() < 1e-6


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_small_kl_in_float32_keeps_four_digits_at_a_real_vocabulary(beta):
    # The plain sum of p (log p - log q) loses a KL of 1e-3 in the rounding of the log-normalisers.
    torch.manual_seed(0)
    n, d, v = 16, 64, 151_936
    weight, teacher = torch.randn(v, d) * 0.4, torch.randn(n, d)
    student = teacher + 0.02 * torch.randn(n, d)
    exact = naive_divergence(student.double() @ weight.double().T, teacher.double() @ weight.double().T, beta)
    assert exact.min() > 1e-3 and exact.max() < 2e-2
    ours = token_divergence(student, teacher, LMHead(weight), LMHead(weight), beta=beta)
    assert ours.dtype == torch.float32
    assert ((ours - exact) / exact).abs().max() < 1e-4


def test_very_different_distributions_stay_finite():
    head = LMHead(torch.eye(3))
    student, teacher = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True), torch.tensor([[-300.0, 0.0, 300.0]])
    loss = token_divergence(student, teacher, head, head)
    loss.sum().backward()
    assert loss.item() == pytest.approx(600.0, rel=1e-5)
    assert torch.isfinite(student.grad).all()


def test_half_precision_heads_give_float32_losses():
    weight, hidden = torch.randn(20, 8).bfloat16(), torch.randn(5, 8).bfloat16().requires_grad_()
    loss = token_divergence(hidden, torch.randn(5, 8).bfloat16(), LMHead(weight), LMHead(weight))
    loss.sum().backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16


def test_vocabularies_that_differ_are_refused():
    with pytest.raises(ValueError, match="has 5 tokens and the teacher's 6"):
        token_divergence(torch.randn(2, 3), torch.randn(2, 3), LMHead(torch.randn(5, 3)), LMHead(torch.randn(6, 3)))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_cross_entropy_is_torchs(softcap):
    torch.manual_seed(0)
    hidden = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    labels, upstream = torch.randint(40, (30,)), torch.rand(30, dtype=torch.float64)
    ours = token_cross_entropy(hidden, LMHead(weight, bias, 0.5, softcap), labels)
    (ours_grad,) = torch.autograd.grad((ours * upstream).sum(), hidden)
    expected = F.cross_entropy(naive_logits(hidden, weight, bias, 0.5, softcap), labels, reduction="none")
    (expected_grad,) = torch.autograd.grad((expected * upstream).sum(), hidden)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(ours_grad, expected_grad, rtol=1e-11, atol=1e-12)


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**SIZES),
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.05),
        CohereConfig(**SIZES, logit_scale=0.3),
        GraniteConfig(**SIZES, logits_scaling=8.0),
        PhiConfig(**{key: value for key, value in SIZES.items() if key != "num_key_value_heads"}),  # has a head bias
    ],
    ids=lambda config: config.model_type,
)
def test_head_gives_the_models_own_logits(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().requires_grad_(False)
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    ids = torch.randint(3, 64, (1, 9))
    hidden = backbone(model)(ids).last_hidden_state[0]
    torch.testing.assert_close(frozen_head(model).logits(hidden), model(ids).logits[0], rtol=1e-10, atol=1e-10)


def test_head_that_is_trainable_or_unknown_is_refused():
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES))
    with pytest.raises(ValueError, match="trainable"):
        frozen_head(model)
    model.requires_grad_(False)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 3)
    with pytest.raises(ValueError, match="does something to its logits"):
        frozen_head(model)
