"""Hookpoints, splice, Stage II and its shared prefix on more architectures, against plain hooks and autograd."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
)
from tuning_reference import batch_of, dense_sae, gradients, make_trainer, moved_adapter, tiny_sae, trainer_gradients

from resa_hf.hookpoints import capture, decoder_layers, resolve_hookpoint, splice

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
# A window shorter than the rows, so that sliding and full attention differ.
GEMMA = GROUPED | {"head_dim": 8, "sliding_window": 5}
CONFIGS = {
    "qwen2": Qwen2Config(**GROUPED),
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=5),
    "gemma2": Gemma2Config(**GEMMA, final_logit_softcapping=1.0, attn_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**GEMMA, layer_types=["sliding_attention", "full_attention"] * 2),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "gpt_neox-sequential": GPTNeoXConfig(**SIZES, use_parallel_residual=False),
}
GEMMA3N = Gemma3nTextConfig(
    **GEMMA | {"intermediate_size": [48] * 4}, num_kv_shared_layers=2, hidden_size_per_layer_input=8,
    layer_types=["sliding_attention", "full_attention"] * 2, vocab_size_per_layer_input=64, laurel_rank=4,
    activation_sparsity_pattern=[0.0] * 4,
)  # fmt: skip
CHECKPOINTING = {
    "off": {},
    "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}
PLACES = [("flow", "layers.1"), ("stop", "layers.1"), ("flow", "layers.2.mlp")]


def make(config, dtype=torch.float64):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # Gemma's start at what others call 1
            torch.nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.1)
    return model


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def model(config):
    return make(config)


def ids():
    return batch_of(padded=False)["input_ids"]


def hooked(model, hookpoint):
    """The module, found without our own code: every backbone here calls its list `layers`."""
    return getattr(model, model.base_model_prefix).get_submodule(hookpoint)


def plain_hook(replace):
    def hook(module, inputs, output):
        return (replace(output[0]), *output[1:]) if isinstance(output, tuple) else replace(output)

    return hook


def naive_gradients(peft, sae, batch, gradient, hookpoint):
    """Loss and gradients with a plain hook, the model's own logits, full softmax, and no checkpointing."""
    peft = copy.deepcopy(peft)
    counted = batch["labels"][:, 1:] != -100

    def logits():
        out = peft(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        return out[:, :-1][counted]

    with torch.no_grad(), peft.eval().disable_adapter():
        teacher = logits()
    peft.train()
    replace = plain_hook(lambda x: dense_sae(sae, x.detach() if gradient == "stop" else x))
    hooked(peft.get_base_model(), hookpoint).register_forward_hook(replace)
    student = logits()  # in training mode, in which Gemma3n runs round the adapters of some of its layers
    p = teacher.softmax(-1)
    loss = (p * (p.log() - student.log_softmax(-1))).sum(-1).mean()
    loss.backward()
    return loss.item(), gradients(peft)


def relative_error(ours, expected):
    """Gradients that are not there count as zero."""
    zero = torch.zeros(())
    names = ours.keys() | expected.keys()
    squares = sum((ours.get(n, zero) - expected.get(n, zero)).square().sum() for n in names)
    return (squares / sum(value.square().sum() for value in expected.values())).sqrt().item()


def test_capture_equals_hidden_states_and_plain_hooks(model):
    seen = {}
    hookpoints = ["layers.0", "layers.1", "layers.1.mlp", resolve_hookpoint(model, "blocks.2.hook_attn_out")]
    handles = [
        hooked(model, name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update(
                {name: output[0] if isinstance(output, tuple) else output}
            )
        )
        for name in hookpoints
    ]
    states = model(ids(), output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    with capture(model, hookpoints) as activations:
        model(ids())
    assert sorted(activations) == sorted(hookpoints)
    assert all(torch.equal(activations[name], seen[name]) for name in hookpoints)
    assert torch.equal(activations["layers.0"], states[1]) and torch.equal(activations["layers.1"], states[2])


@pytest.mark.parametrize("config", [*CONFIGS.values(), Olmo2Config(**GROUPED)], ids=lambda config: config.model_type)
def test_what_sae_lens_calls_outputs_of_attention_and_mlp_adds_up_to_the_residual_stream(config):
    model = make(config)
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"]
    with capture(model, names) as activations:
        model(ids())
    before, attention, mlp, after = (activations[resolve_hookpoint(model, name)] for name in names)
    torch.testing.assert_close(before + attention + mlp, after)


@pytest.mark.parametrize("hookpoint", ["layers.1", "layers.2.mlp"])
def test_splice_equals_a_plain_hook(model, hookpoint):
    sae = tiny_sae()
    with splice(model, hookpoint, sae):
        ours = model(ids()).logits
    plain = model(ids()).logits
    hooked(model, hookpoint).register_forward_hook(plain_hook(lambda x: dense_sae(sae, x)))
    torch.testing.assert_close(ours, model(ids()).logits, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(ours, plain)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize(("gradient", "hookpoint"), PLACES)
def test_loss_and_gradients(tmp_path, model, gradient, hookpoint, checkpointing):
    peft, sae, batch = moved_adapter(model), tiny_sae(hookpoint=hookpoint), batch_of()
    expected, expected_gradients = naive_gradients(peft, sae, batch, gradient, hookpoint)
    trainer = make_trainer(peft, tmp_path, sae=sae, sae_gradient=gradient, **CHECKPOINTING[checkpointing])
    loss, ours = trainer_gradients(trainer, batch)
    assert expected > 1e-3
    assert loss == pytest.approx(expected, rel=1e-9)
    assert relative_error(ours, expected_gradients) < 1e-9


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_shared_prefix_changes_no_bit(tmp_path, config, checkpointing):
    def run(share):
        trainer = make_trainer(
            moved_adapter(make(config, torch.float32), moved=False), tmp_path, sae=tiny_sae(torch.float32),
            sae_gradient="stop", share_prefix=share, max_steps=2, **CHECKPOINTING[checkpointing],
        )  # fmt: skip
        result = trainer_gradients(trainer, batch_of())
        trainer.model.zero_grad()
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return trainer, result, losses

    (shared, (loss, ours), losses), (never, (expected, theirs), expected_losses) = run("auto"), run("never")
    assert shared._shared is True and never._shared is False
    assert loss == expected > 1e-3 and losses == expected_losses
    assert any(g.abs().max() > 0 for g in theirs.values())
    zero = torch.zeros(())
    assert all(torch.equal(ours.get(name, zero).expand_as(g), g) for name, g in theirs.items())
    values = never.model.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in shared.model.state_dict().items())


def test_layers_below_do_not_run_for_the_student(tmp_path, model):
    trainer = make_trainer(moved_adapter(model, moved=False), tmp_path, sae=tiny_sae(), sae_gradient="stop")
    trainer_gradients(trainer, batch_of())  # the first step tries it out
    runs = dict.fromkeys(range(4), 0)

    def count(index):
        def hook(module, inputs, output):
            runs[index] += 1

        return hook

    for index, layer in enumerate(decoder_layers(trainer.model)[1]):
        layer.mlp.register_forward_hook(count(index))
    trainer_gradients(trainer, batch_of())
    assert runs == {0: 1, 1: 1, 2: 2, 3: 2}


def with_dropout():
    return GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, bos_token_id=None, eos_token_id=1, pad_token_id=0)


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("config", [GEMMA3N, with_dropout()], ids=["keys and values shared", "dropout"])
def test_what_cannot_share_its_prefix_says_so_once_and_trains(tmp_path, capsys, config, rows):
    trainer = make_trainer(
        moved_adapter(make(config), moved=False), tmp_path, sae=tiny_sae(), sae_gradient="stop", max_steps=3,
        per_device_train_batch_size=rows, eos_token="<eos>",
    )  # fmt: skip
    assert trainer._shared is None
    trainer.train()
    assert trainer._shared is False
    assert capsys.readouterr().out.count("share_prefix: not exact here") == 1


def test_gemma_3n_trains_as_with_plain_hooks(tmp_path):
    peft, sae, batch = moved_adapter(make(GEMMA3N)), tiny_sae(), batch_of(rows=3)
    expected, expected_gradients = naive_gradients(peft, sae, batch, "stop", "layers.1")
    trainer = make_trainer(peft, tmp_path, sae=sae, sae_gradient="stop")
    loss, ours = trainer_gradients(trainer, batch)
    assert loss == pytest.approx(expected, rel=1e-9)
    assert relative_error(ours, expected_gradients) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpointing", "gradient", "hookpoint"),
    [
        pytest.param(c, *p, marks=[] if c == "off" else pytest.mark.long)
        for c, p in zip(CHECKPOINTING, PLACES, strict=True)
    ],
)
def test_loss_and_gradients_compiled(tmp_path, model, gradient, hookpoint, checkpointing):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    peft, sae, batch = moved_adapter(model), tiny_sae(hookpoint=hookpoint), batch_of()
    expected, expected_gradients = naive_gradients(peft, sae, batch, gradient, hookpoint)
    trainer = make_trainer(
        peft, tmp_path, sae=sae, sae_gradient=gradient, torch_compile=True, torch_compile_backend="eager",
        **CHECKPOINTING[checkpointing],
    )  # fmt: skip
    for _ in range(2):
        loss, ours = trainer_gradients(trainer, batch)
        assert loss == pytest.approx(expected, rel=1e-9)
        assert relative_error(ours, expected_gradients) < 1e-9
    # The trial's, then teacher and student, the latter's first layer aside, for sliding and full attention.
    assert 3 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8
