"""Stage II's loss and gradients against the plain calculation in tuning_reference.py."""

import copy
import itertools

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
from tuning_reference import (
    batch_of,
    make_trainer,
    moved_adapter,
    naive_gradients,
    ragged_dataset,
    tiny_model,
    tiny_sae,
    trainer_gradients,
)

from resa_hf.tiny.tokenizer import build_tokenizer

LEGAL = [
    {"sae_in": sae_in, "sae_gradient": gradient, "kl_reference": reference, "kl_beta": beta}
    for sae_in, gradient, reference, beta in itertools.product(
        ("student", "teacher"), ("flow", "stop"), ("base", "adapted", "source"), (0.0, 1.0)
    )
    if (sae_in, gradient) != ("teacher", "stop")
]


def relative_error(ours, expected):
    keys = ours.keys() | expected.keys()
    zero = torch.zeros(())
    difference = sum((ours.get(k, zero) - expected.get(k, zero)).square().sum() for k in keys).sqrt()
    return (difference / sum(e.square().sum() for e in expected.values()).sqrt()).item()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("settings", LEGAL, ids=lambda s: "-".join(map(str, s.values())))
def test_loss_and_gradients_in_float64(tmp_path, settings, checkpointing):
    peft, sae, batch = moved_adapter(tiny_model()), tiny_sae(), batch_of()
    source = tiny_model(seed=7) if settings["kl_reference"] == "source" else None
    expected, expected_grads = naive_gradients(peft, sae=sae, batch=batch, source=source, **settings)
    trainer = make_trainer(
        peft, tmp_path, sae=sae, source_model=source, gradient_checkpointing=checkpointing, **settings
    )
    loss, grads = trainer_gradients(trainer, batch)
    assert expected > 1e-3
    assert abs(loss - expected) / expected < 1e-9
    assert relative_error(grads, expected_grads) < 1e-9


@pytest.mark.parametrize("settings", LEGAL, ids=lambda s: "-".join(map(str, s.values())))
def test_loss_and_gradients_in_float32(tmp_path, settings):
    exact, sae, batch = moved_adapter(tiny_model()), tiny_sae(), batch_of()
    source = tiny_model(seed=7) if settings["kl_reference"] == "source" else None
    expected, expected_grads = naive_gradients(exact, sae=sae, batch=batch, source=source, **settings)
    source = None if source is None else source.float()
    trainer = make_trainer(exact.float(), tmp_path, sae=sae.to(torch.float32), source_model=source, **settings)
    loss, grads = trainer_gradients(trainer, batch)
    assert expected > 1e-3
    assert abs(loss - expected) / expected < 1e-4
    assert relative_error(grads, expected_grads) < 1e-4


@pytest.mark.parametrize("settings", LEGAL, ids=lambda s: "-".join(map(str, s.values())))
def test_in_bf16_no_further_from_float64_than_a_plain_loop(tmp_path, settings):
    """bf16 keeps three digits of the states, so that exact values are out of reach; the shortcuts may lose no more."""

    def run(dtype, how):
        # Of each dtype, the same weights: bf16 ones.
        peft = moved_adapter(tiny_model(dtype=torch.bfloat16)).to(dtype)
        source = tiny_model(seed=7, dtype=torch.bfloat16).to(dtype) if settings["kl_reference"] == "source" else None
        return how(peft, tiny_sae(torch.bfloat16).to(dtype), source)

    def naive(peft, sae, source):
        return naive_gradients(peft, sae=sae, batch=batch, source=source, **settings)

    def ours(peft, sae, source):
        return trainer_gradients(make_trainer(peft, tmp_path, sae=sae, source_model=source, **settings), batch)

    batch = batch_of()
    (exact, exact_grads), (plain, plain_grads), (loss, grads) = (
        run(torch.float64, naive), run(torch.bfloat16, naive), run(torch.bfloat16, ours),
    )  # fmt: skip
    assert abs(loss - exact) / exact < max(1.5 * abs(plain - exact) / exact, 0.02)
    # Which latents are the largest is partly chance in bf16, in both.
    assert relative_error(grads, exact_grads) < 1.5 * relative_error(plain_grads, exact_grads)


@pytest.mark.parametrize("settings", LEGAL, ids=lambda s: "-".join(map(str, s.values())))
def test_bf16_of_the_arguments_runs_a_float32_model_in_bf16(tmp_path, settings):
    peft, sae, batch = moved_adapter(tiny_model(dtype=torch.float32)), tiny_sae(torch.float32), batch_of()
    other = tiny_model(seed=7, dtype=torch.float32) if settings["kl_reference"] == "source" else None
    settings = {**settings, "sft_weight": 0.5, "sae": sae, "source": other}
    exact, exact_grads = naive_gradients(peft, batch=batch, **settings)
    # Its cache would keep casts of the teacher's pass, which have no gradient.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        plain, plain_grads = naive_gradients(peft, batch=batch, **settings)
    del settings["source"]
    trainer = make_trainer(peft, tmp_path, source_model=other, bf16=True, **settings)
    seen = set()
    for model in filter(None, (trainer.model, other)):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
                module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    loss, grads = trainer_gradients(trainer, batch)
    assert seen == {torch.bfloat16}
    assert {gradient.dtype for gradient in grads.values()} == {torch.float32} and grads.keys() == exact_grads.keys()
    assert abs(loss - exact) / exact < max(1.5 * abs(plain - exact) / exact, 0.02)
    assert relative_error(grads, exact_grads) < 1.5 * relative_error(plain_grads, exact_grads)


@pytest.mark.parametrize("weights", [(1.0, 0.5), (0.0, 1.0), (2.0, 0.0)])
def test_weights_of_divergence_and_cross_entropy(tmp_path, weights):
    peft, sae, batch = moved_adapter(tiny_model()), tiny_sae(), batch_of()
    settings = {"kl_weight": weights[0], "sft_weight": weights[1]}
    expected, expected_grads = naive_gradients(peft, sae=sae, batch=batch, **settings)
    loss, grads = trainer_gradients(make_trainer(peft, tmp_path, sae=sae, **settings), batch)
    assert abs(loss - expected) / expected < 1e-9
    assert relative_error(grads, expected_grads) < 1e-9


def grads_by_layer(grads):
    return {
        layer: max((g.abs().max().item() for n, g in grads.items() if f".layers.{layer}." in n), default=0.0)
        for layer in range(4)
    }


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["off", "non-reentrant", "reentrant"])
def test_where_gradients_are_zero(tmp_path, checkpointing):
    kwargs = {}
    if checkpointing is not None:
        kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}

    def by_layer(hookpoint, **settings):
        peft, sae = moved_adapter(tiny_model()), tiny_sae(hookpoint=hookpoint)
        trainer = make_trainer(peft, tmp_path, sae=sae, share_prefix="never", **kwargs, **settings)
        return grads_by_layer(trainer_gradients(trainer, batch_of())[1])

    flow = by_layer("layers.1", sae_gradient="flow")
    assert all(flow[layer] > 0 for layer in range(4))
    stop = by_layer("layers.1", sae_gradient="stop")
    assert [layer for layer in range(4) if stop[layer] > 0] == [2, 3]
    # The residual path goes round an SAE on the MLP's output, so layers below learn.
    around = by_layer("layers.1.mlp", sae_gradient="stop")
    assert all(around[layer] > 0 for layer in range(4))
    # The cross-entropy uses the same student forward, so it is cut off too.
    with_sft = by_layer("layers.1", sae_gradient="stop", sft_weight=1.0)
    assert [layer for layer in range(4) if with_sft[layer] > 0] == [2, 3]


@pytest.mark.parametrize("hookpoint", ["layers.1", "layers.2.mlp"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(tmp_path, hookpoint, reentrant):
    results = []
    for settings in (
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        peft = moved_adapter(tiny_model())
        trainer = make_trainer(peft, tmp_path, sae=tiny_sae(hookpoint=hookpoint), **settings)
        results.append(trainer_gradients(trainer, batch_of()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    assert relative_error(results[0][1], results[1][1]) < 1e-12


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_eight_at_once_equal_eight_accumulated(tmp_path, sft_weight):
    runs = []
    for batch, accumulation in ((8, 1), (1, 8)):
        trainer = make_trainer(
            moved_adapter(tiny_model()), tmp_path, sae=tiny_sae(), dataset=ragged_dataset(), max_steps=1,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, sft_weight=sft_weight,
            optim="sgd", max_grad_norm=0.0, learning_rate=0.1, shuffle_dataset=False,
        )  # fmt: skip
        before = copy.deepcopy(trainer.model.state_dict())
        result = trainer.train()
        moved = {n: p - before[n] for n, p in trainer.model.state_dict().items() if "lora" in n}
        runs.append((result.training_loss, moved))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-6)  # Trainer adds its losses up in float32
    assert relative_error(runs[0][1], runs[1][1]) < 1e-9


def test_plain_sft_equals_trl_bit_for_bit(tmp_path):
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    dataset = Dataset.from_dict(
        {"text": [f"User: {a}+{b} mod 10\nAssistant: {a}" for a in range(9) for b in range(9)]}
    )
    common = {
        "output_dir": str(tmp_path), "report_to": "none", "max_steps": 5, "packing": True,
        "packing_strategy": "wrapped", "max_length": 16, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False, "logging_steps": 1, "use_cpu": True, "bf16": False, "save_strategy": "no",
    }  # fmt: skip
    theirs = SFTTrainer(
        tiny_model(dtype=torch.float32), SFTConfig(**common), train_dataset=dataset,
        processing_class=build_tokenizer(), peft_config=copy.deepcopy(lora),
    )  # fmt: skip
    theirs.train()
    ours = make_trainer(
        tiny_model(dtype=torch.float32), tmp_path, dataset=dataset, peft_config=lora, **common,
        sae=None, sft_weight=1.0, kl_weight=0.0,
    )  # fmt: skip
    ours.train()
    assert [e["loss"] for e in ours.state.log_history if "loss" in e] == [
        e["loss"] for e in theirs.state.log_history if "loss" in e
    ]
    expected = theirs.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ours.model.state_dict().items())


def test_frozen_adapter_of_the_target_is_merged_first(tmp_path):
    peft = moved_adapter(tiny_model())
    peft.requires_grad_(False)
    expected = copy.deepcopy(peft).merge_and_unload()(batch_of()["input_ids"]).logits
    trainer = make_trainer(peft, tmp_path, sae=tiny_sae())
    with trainer.model.disable_adapter():
        torch.testing.assert_close(trainer.model.eval()(batch_of()["input_ids"]).logits, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_prefix_is_exact(tmp_path, checkpointing, dtype):
    def run(share):
        trainer = make_trainer(
            moved_adapter(tiny_model(dtype=dtype), moved=False), tmp_path, sae=tiny_sae(dtype),
            sae_gradient="stop", share_prefix=share, max_steps=4, gradient_checkpointing=checkpointing,
        )  # fmt: skip
        trainer.train()
        return trainer

    shared, plain = run("auto"), run("never")
    assert shared._shared is True and plain._shared is False
    values = plain.model.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in shared.model.state_dict().items())
    assert any(value.abs().max() > 0 for name, value in values.items() if "layers.3" in name and "lora_B" in name)


def test_shared_prefix_is_not_used_where_it_is_not_exact(tmp_path, capsys):
    moved = make_trainer(moved_adapter(tiny_model()), tmp_path, sae=tiny_sae(), sae_gradient="stop", max_steps=1)
    moved.train()
    dropout = moved_adapter(tiny_model(attention_dropout=0.1), moved=False)
    active = make_trainer(dropout, tmp_path, sae=tiny_sae(), sae_gradient="stop", max_steps=1)
    active.train()
    assert moved._shared is False and active._shared is False
    assert capsys.readouterr().out.count("share_prefix: not exact here") == 2


def test_special_tokens_pass_the_sae_untouched(tmp_path):
    sae, batch = tiny_sae(), batch_of(padded=False)
    batch["input_ids"][:, 5] = batch["labels"][:, 5] = 1  # <eos>
    plain = make_trainer(moved_adapter(tiny_model()), tmp_path, sae=sae)
    sae_with_metadata = tiny_sae()
    sae_with_metadata.metadata["exclude_special_tokens"] = True
    by_metadata = make_trainer(moved_adapter(tiny_model()), tmp_path, sae=sae_with_metadata)
    by_setting = make_trainer(moved_adapter(tiny_model()), tmp_path, sae=sae, exclude_special_tokens=True)
    losses = [trainer_gradients(trainer, batch)[0] for trainer in (plain, by_metadata, by_setting)]
    assert losses[1] == losses[2] != losses[0]
    x = torch.randn(4, 12, 32, dtype=torch.float64)
    out = by_setting._insertion(x)
    assert torch.equal(out[:, 5], x[:, 5]) and not torch.isclose(out[:, 4], x[:, 4]).all()


def test_positions_are_counted_alike_on_gpt2(tmp_path, make_model):
    # GPT-2's class names no loss, and the Trainer would count the label of position 0, which nothing predicts.
    trainer = make_trainer(
        make_model("gpt2"), tmp_path, sae=tiny_sae(torch.float32), dataset=ragged_dataset(), max_steps=1,
        per_device_train_batch_size=8, eos_token="<eos>",
    )  # fmt: skip
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(first["kl"], rel=1e-4)


def test_shared_prefix_is_used_with_the_noise_control_too(tmp_path):
    trainer = make_trainer(
        moved_adapter(tiny_model(), moved=False), tmp_path, sae=tiny_sae(), sae_gradient="stop", control="noise",
        max_steps=1,
    )  # fmt: skip
    trainer.train()
    assert trainer._shared is True
