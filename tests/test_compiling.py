"""torch.compile of the decoder layers, in both stages, against the same run without it."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_reference import config, rows, train, weights
from safetensors import safe_open
from torch._dynamo.utils import counters
from tuning_reference import (
    batch_of,
    make_trainer,
    moved_adapter,
    ragged_dataset,
    tiny_model,
    tiny_sae,
    trainer_gradients,
)

from resa_hf.hookpoints import backbone, decoder_layers

# "eager" compiles nothing below dynamo: enough where it only matters which hooks act and how often graphs are made.
EAGER = {"torch_compile": True, "torch_compile_backend": "eager"}
INDUCTOR = {"torch_compile": True}
CHECKPOINTING = {
    "off": {},
    "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}
# The one that most can go wrong with is in CI, the others in `make test-all`.
EACH = pytest.mark.parametrize(
    "checkpointing", [pytest.param(n, marks=[] if n == "reentrant" else pytest.mark.long) for n in CHECKPOINTING]
)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor on CPU needs g++, which is not here")


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def difference(ours, expected):
    """Norm of the difference over the norm of what is expected."""
    assert ours.keys() == expected.keys()
    squares = sum((ours[name].double() - expected[name].double()).square().sum() for name in expected)
    return (squares / sum(value.double().square().sum() for value in expected.values())).sqrt().item()


def one_step_and_four(tmp_path, dtype=torch.float32, hookpoint="layers.1", moved=True, **settings):
    """Loss and gradients of one step, the adapter after four more, and the evaluation's metrics then."""
    peft = moved_adapter(tiny_model(dtype=dtype), moved=moved)
    trainer = make_trainer(peft, tmp_path, sae=tiny_sae(dtype, hookpoint), max_steps=4, **settings)
    loss, gradients = trainer_gradients(trainer, batch_of())
    trainer.model.zero_grad()
    trainer.train()
    adapter = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora" in name}
    metrics = trainer.evaluate(trainer.train_dataset)
    return loss, gradients, adapter, metrics["eval_kl"], trainer


def assert_close(ours, plain, bound):
    assert ours[0] == pytest.approx(plain[0], rel=bound)
    assert difference(ours[1], plain[1]) < bound
    assert difference(ours[2], plain[2]) < bound
    assert ours[3] == pytest.approx(plain[3], rel=bound)


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("hookpoint", ["layers.1", "layers.1.mlp"])
@pytest.mark.parametrize("gradient", ["flow", "stop"])
def test_stage_two_equals_the_plain_path(tmp_path, gradient, hookpoint, checkpointing):
    settings = {"hookpoint": hookpoint, "sae_gradient": gradient, **CHECKPOINTING[checkpointing]}
    plain = one_step_and_four(tmp_path, **settings)
    assert graphs() == 0
    ours = one_step_and_four(tmp_path, **settings, **EAGER)
    assert 2 <= graphs() <= 12  # teacher and student at least
    assert_close(ours, plain, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [{"sae_in": "teacher"}, {"kl_reference": "adapted", "sft_weight": 0.5}, {"control": "noise"}],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_other_settings_equal_the_plain_path(tmp_path, settings):
    plain = one_step_and_four(tmp_path, **settings)
    assert_close(one_step_and_four(tmp_path, **settings, **EAGER), plain, 1e-5)
    assert graphs() >= 2


@pytest.mark.slow
def test_a_source_model_is_compiled_too(tmp_path):
    def run(**settings):
        trainer = make_trainer(
            moved_adapter(tiny_model(dtype=torch.float32)), tmp_path, sae=tiny_sae(torch.float32),
            source_model=tiny_model(seed=7, dtype=torch.float32), kl_reference="source", **settings,
        )  # fmt: skip
        return trainer, *trainer_gradients(trainer, batch_of())

    _, loss, gradients = run()
    trainer, ours, our_gradients = run(**EAGER)
    assert ours == pytest.approx(loss, rel=1e-5) and difference(our_gradients, gradients) < 1e-5
    # Its layers and the student's share no graph: the student's have an adapter.
    with trainer._compiler.running():
        assert type(trainer._source.model.layers[0]).__mro__[1] is type(tiny_model().model.layers[0])


@pytest.mark.long
@EACH
def test_shared_prefix_is_still_found_exact_and_changes_nothing(tmp_path, checkpointing):
    settings = {"moved": False, "sae_gradient": "stop", **CHECKPOINTING[checkpointing], **EAGER}
    never = one_step_and_four(tmp_path, share_prefix="never", **settings)
    shared = one_step_and_four(tmp_path, **settings)
    assert shared[-1]._shared is True and never[-1]._shared is False
    assert shared[0] == never[0]
    zero = torch.zeros(())
    assert all(torch.equal(g, shared[1].get(n, zero).expand_as(g)) for n, g in never[1].items())
    assert all(torch.equal(value, shared[2][name]) for name, value in never[2].items())


@pytest.mark.slow
@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("hookpoint", ["layers.1", "layers.1.mlp"])
@pytest.mark.parametrize("gradient", ["flow", "stop"])
def test_inductor_equals_the_plain_path(tmp_path, gradient, hookpoint):
    settings = {"hookpoint": hookpoint, "sae_gradient": gradient, "moved": gradient == "flow"}
    plain = one_step_and_four(tmp_path, **settings)
    ours = one_step_and_four(tmp_path, **settings, **INDUCTOR)
    assert graphs() >= 3
    assert ours[-1]._shared is plain[-1]._shared is ((gradient, hookpoint) == ("stop", "layers.1") or None)
    assert_close(ours, plain, 1e-5)


@pytest.mark.slow
@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("hookpoint", ["layers.1", "layers.1.mlp"])
@pytest.mark.parametrize("gradient", ["flow", "stop"])
def test_inductor_in_bf16_is_no_further_from_float32_than_the_plain_path(tmp_path, gradient, hookpoint):
    def run(dtype, **settings):
        # The float32 run has the same weights, rounded to bf16.
        peft = moved_adapter(tiny_model(dtype=torch.bfloat16), moved=gradient == "flow").to(dtype)
        sae = tiny_sae(torch.bfloat16, hookpoint).to(dtype)
        trainer = make_trainer(peft, tmp_path, sae=sae, sae_gradient=gradient, **settings)
        return trainer_gradients(trainer, batch_of())

    exact, plain, ours = run(torch.float32), run(torch.bfloat16), run(torch.bfloat16, **INDUCTOR)
    assert graphs() >= 3
    rounding = difference(plain[1], exact[1])
    assert rounding > 1e-3
    assert difference(ours[1], exact[1]) < 1.2 * rounding
    assert ours[0] == pytest.approx(exact[0], rel=0.05)


@pytest.mark.long
def test_no_graph_is_made_after_the_first_epoch(tmp_path):
    def run(epochs):
        torch._dynamo.reset()
        counters.clear()
        trainer = make_trainer(
            moved_adapter(tiny_model(dtype=torch.float32), moved=False), tmp_path, sae=tiny_sae(torch.float32),
            dataset=ragged_dataset(), per_device_train_batch_size=1, num_train_epochs=epochs, sae_gradient="stop",
            eval_strategy="no", **EAGER,
        )  # fmt: skip
        trainer.train()
        return graphs()

    first = run(1)  # 8 steps of 6 lengths
    assert 2 <= first <= 10
    assert run(3) == first


@pytest.mark.slow
def test_saved_names_copies_and_the_model_itself_are_as_without(tmp_path):
    trainer = make_trainer(
        moved_adapter(tiny_model(dtype=torch.float32)), tmp_path, sae=tiny_sae(torch.float32), max_steps=1, **EAGER
    )
    layers = decoder_layers(trainer.model)[1]
    own = type(layers[0])
    names = list(trainer.model.state_dict())
    with trainer._compiler.running():
        assert all(type(layer) is not own and isinstance(layer, own) for layer in layers)
        assert list(trainer.model.state_dict()) == names
        copied = copy.deepcopy(trainer.model).eval()
        with torch.no_grad():
            expected = backbone(copied)(batch_of()["input_ids"]).last_hidden_state
            for parameter in decoder_layers(trainer.model)[1].parameters():
                parameter.zero_()
            assert torch.equal(backbone(copied)(batch_of()["input_ids"]).last_hidden_state, expected)
    trainer.train()
    assert graphs() >= 2
    assert all(type(layer) is own and "forward" not in layer.__dict__ for layer in layers)
    trainer.save_model(str(tmp_path / "saved"))
    with safe_open(tmp_path / "saved" / "adapter_model.safetensors", "pt") as file:
        assert not any("_orig_mod" in name for name in file.keys())  # noqa: SIM118  # not a dict
        assert len(list(file.keys())) == len([name for name in names if "lora" in name])


def test_only_the_layer_with_a_hookpoint_inside_stays_uncompiled(tmp_path):
    for hookpoint, plain in (("layers.1", []), ("layers.1.mlp", [1])):
        trainer = make_trainer(
            moved_adapter(tiny_model(dtype=torch.float32)), tmp_path, sae=tiny_sae(torch.float32, hookpoint), **EAGER
        )
        layers = decoder_layers(trainer.model)[1]
        own = type(layers[0])
        with trainer._compiler.running():
            assert [index for index, layer in enumerate(layers) if type(layer) is own] == plain


@pytest.mark.long
def test_compilation_asked_of_accelerate_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    asked = one_step_and_four(tmp_path)
    assert graphs() >= 2
    assert not isinstance(asked[-1].model_wrapped, torch._dynamo.OptimizedModule)
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    assert_close(asked, one_step_and_four(tmp_path), 1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"torch_compile_mode": "reduce-overhead"}, {"torch_compile_mode": "max-autotune"},
     {"torch_compile_backend": "cudagraphs"}],
    ids=lambda s: next(iter(s.values())),
)  # fmt: skip
def test_cuda_graphs_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match="with CUDA graphs the student's"):
        make_trainer(tiny_model(), tmp_path, sae=tiny_sae(), **settings)


@pytest.mark.long
def test_a_missing_compiler_is_told_before_training(tmp_path):
    code = (
        "from tuning_reference import *\n"
        "from pathlib import Path\n"
        f"make_trainer(tiny_model(), Path({str(tmp_path)!r}), sae=tiny_sae(), torch_compile=True)"
    )
    environment = os.environ | {
        "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent),
    }  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "ValueError: torch_compile: the backend 'inductor' cannot compile on this machine" in result.stderr
    assert "apt install g++" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [EAGER, pytest.param(INDUCTOR, marks=needs_compiler)], ids=["eager", "inductor"])
def test_stage_one_equals_the_plain_path(tmp_path, make_model, compiled):
    def run(model, **settings):
        hookpoints = ["layers.0", "layers.1.mlp", "layers.2"]
        # Adam's step, unlike Signum's, is no sign that a last bit may turn.
        args = config(tmp_path, hookpoints=hookpoints, sae_optimizer="adam", learning_rate=1e-3, **settings)
        trainer = train(model, args, eval_dataset=rows(6, seed=1))
        return weights(trainer), trainer.evaluate()

    model = make_model("qwen2")
    own = [type(layer) for layer in model.model.layers]
    plain, metrics = run(model)
    assert graphs() == 0
    ours, our_metrics = run(model, **compiled)
    assert 2 <= graphs() <= 3  # the trial's, one for one length and one for any: not one a layer
    assert [type(layer) for layer in model.model.layers] == own
    assert difference(ours, plain) < 1e-5
    assert our_metrics["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
