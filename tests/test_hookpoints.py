"""Hookpoints on four architectures, against `output_hidden_states` and hand-written hooks."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from resa_hf.errors import HookpointError, IncompatibleSAEError
from resa_hf.hookpoints import backbone, capture, resolve_hookpoint, splice

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "llama": LlamaConfig(**SIZES),
    "gpt2": GPT2Config(
        vocab_size=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
}  # fmt: skip
IDS = torch.arange(3, 23).reshape(2, 10)


def make(kind, peft=False):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    if not peft:
        return model
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


def layers(kind, index):
    return f"{'h' if kind == 'gpt2' else 'layers'}.{index}"


@pytest.fixture(params=[(kind, peft) for kind in CONFIGS for peft in (False, True)], ids=lambda p: f"{p[0]}-{p[1]}")
def kind_and_model(request):
    return request.param[0], make(*request.param)


def test_every_spelling_of_a_layer(kind_and_model):
    kind, model = kind_and_model
    prefix = "transformer.h.1" if kind == "gpt2" else "model.layers.1"
    for spelling in (1, "1", "layers.1", "model.layers.1", prefix, layers(kind, 1), "blocks.1.hook_resid_post", " 1 "):
        assert resolve_hookpoint(model, spelling) == layers(kind, 1)
    assert resolve_hookpoint(model, "blocks.1.hook_resid_pre") == layers(kind, 0)
    for spelling in ("layers.1.mlp", "1.mlp", "blocks.1.hook_mlp_out", f"{prefix}.mlp"):
        assert resolve_hookpoint(model, spelling) == layers(kind, 1) + ".mlp"
    attention = ".attn" if kind == "gpt2" else ".self_attn"
    assert resolve_hookpoint(model, "blocks.2.hook_attn_out") == layers(kind, 2) + attention


@pytest.mark.parametrize(
    "bad",
    [3, -1, "3", "", "layers", "layers.", "layers.x", "layers.1.", "layers.1.nothing", "blocks.0.hook_resid_pre",
     "lm_head", "embed_tokens", "blocks.1.hook_q", True, None, 1.0, "../1", "layers.1/mlp", "layers.²"],
)  # fmt: skip
def test_unknown_hookpoints_list_the_valid_ones(bad):
    with pytest.raises(HookpointError, match=r"Valid: layers\.0 to layers\.2 .*layers\.N\.mlp"):
        resolve_hookpoint(make("qwen2"), bad)


def test_a_model_without_decoder_layers_has_no_hookpoints():
    with pytest.raises(HookpointError, match="no list of decoder layers"):
        resolve_hookpoint(torch.nn.Linear(2, 2), 0)


def test_capture_equals_hidden_states(kind_and_model):
    kind, model = kind_and_model
    expected = model(IDS, output_hidden_states=True).hidden_states
    with capture(model, [0, 1]) as activations:
        logits = model(IDS).logits
    assert list(activations) == [layers(kind, 0), layers(kind, 1)]
    assert torch.equal(activations[layers(kind, 0)], expected[1])
    assert torch.equal(activations[layers(kind, 1)], expected[2])
    assert torch.equal(logits, model(IDS).logits)


def test_tuple_outputs_are_captured_and_spliced():
    model = make("llama")  # self_attn returns (states, weights)
    with capture(model, ["layers.1.self_attn"]) as activations, splice(model, "layers.1.self_attn", lambda x: x * 0):
        zeroed = model(IDS).logits
    assert activations["layers.1.self_attn"].shape == (2, 10, 32)
    torch.nn.init.zeros_(model.model.layers[1].self_attn.o_proj.weight)
    torch.testing.assert_close(zeroed, model(IDS).logits)


def test_stopping_ends_that_forward_only(kind_and_model):
    kind, model = kind_and_model
    ran = []
    counter = backbone(model).get_submodule(layers(kind, 2)).register_forward_hook(lambda *_: ran.append(1))
    with capture(model, [1, 0], stop_after_last=True) as activations:
        assert model(IDS) is None
        first = dict(activations)
        assert backbone(model)(IDS[:1]) is None  # the backbone alone, in the same block
        assert activations[layers(kind, 1)].shape == (1, 10, 32)
    assert not ran
    expected = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(first[layers(kind, 1)], expected[2])
    assert ran
    counter.remove()
    assert "forward" not in model.__dict__ and "forward" not in backbone(model).__dict__


def test_capture_is_filled_anew_and_keeps_nothing_of_a_failed_forward():
    model = make("qwen2")
    with capture(model, [0, 2]) as activations:
        model(IDS)
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(IDS[:1])
        handle.remove()
        assert list(activations) == ["layers.0"] and activations["layers.0"].shape[0] == 1
        model(IDS)
        assert activations["layers.2"].shape[0] == 2


@pytest.mark.parametrize("hookpoint", ["layers.1", "layers.1.mlp"])
def test_capture_under_gradient_checkpointing(hookpoint):
    model = make("qwen2").train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        with capture(model, [hookpoint]) as activations:
            loss = model(IDS).logits.square().mean()
            forward = activations[hookpoint].detach().clone()
            loss.backward()  # runs the layer's inside again
            assert torch.equal(activations[hookpoint], forward)
        results.append((forward, model.model.layers[0].mlp.up_proj.weight.grad.clone()))
        model.zero_grad()
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_splice_replaces_the_output_and_is_gone_afterwards(kind_and_model):
    kind, model = kind_and_model
    plain = model(IDS).logits
    module = torch.nn.Linear(32, 32)
    layer = backbone(model).get_submodule(layers(kind, 1))
    handle = layer.register_forward_hook(lambda m, i, o: (module(o[0]), *o[1:]) if isinstance(o, tuple) else module(o))
    expected = model(IDS).logits
    handle.remove()
    with splice(model, 1, module):
        assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model(IDS).logits, plain)
    assert not torch.equal(expected, plain)


def test_hooks_are_gone_after_an_exception():
    model = make("qwen2")
    plain = model(IDS).logits
    for context in (
        lambda: splice(model, 1, lambda x: x * 2),
        lambda: capture(model, [1]),
        lambda: capture(model, [1], stop_after_last=True),
    ):
        with pytest.raises(ZeroDivisionError), context():  # noqa: PT012
            model(IDS)
            raise ZeroDivisionError
        assert torch.equal(model(IDS).logits, plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_splice_keeps_the_dtype_and_refuses_another_shape():
    model = make("qwen2").bfloat16()
    with splice(model, 1, lambda x: x.float() * 1.5):
        assert model(IDS).logits.dtype == torch.bfloat16
    with (
        pytest.raises(IncompatibleSAEError, match=r"\(2, 10, 32\) to \(2, 10, 31\)"),
        splice(model, 1, lambda x: x[..., 1:]),
    ):
        model(IDS)


def test_somebody_elses_forward_is_put_back():
    model = make("qwen2")
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)
    mine = model.forward
    with capture(model, [0], stop_after_last=True):
        assert model(IDS) is None
    assert model.__dict__["forward"] is mine


def test_no_hookpoint_is_an_error():
    with pytest.raises(HookpointError, match="at least one"), capture(make("qwen2"), []):
        pass
