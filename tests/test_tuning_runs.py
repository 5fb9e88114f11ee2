"""Runs of Stage II: what is kept, saved, resumed and logged, and the settings."""

import copy
from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from tuning_reference import (
    batch_of,
    make_trainer,
    moved_adapter,
    naive_gradients,
    ragged_dataset,
    tiny_model,
    tiny_sae,
)

from resa_hf.errors import IncompatibleSAEError
from resa_hf.sae.checkpoint import save_sae
from resa_hf.tuning.config import SAETuningConfig
from resa_hf.tuning.fit import place_sae, warn_of_mismatch


def test_base_and_sae_never_change_and_the_adapter_loads_without_us(tmp_path):
    model, sae = tiny_model(dtype=torch.float32), tiny_sae(torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sae_before = {name: value.clone() for name, value in sae.state_dict().items()}
    model.save_pretrained(tmp_path / "base")
    model.config._name_or_path = model.name_or_path = str(tmp_path / "base")
    trainer = make_trainer(model, tmp_path / "run", sae=sae, max_steps=3)
    trainer.train()
    trainer.save_model()
    after = trainer.model.get_base_model().state_dict()
    assert all(torch.equal(value, after[name.replace("proj.", "proj.base_layer.")]) for name, value in before.items())
    assert all(torch.equal(value, sae.state_dict()[name]) for name, value in sae_before.items())
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    ids = batch_of()["input_ids"]
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)
    with loaded.disable_adapter():
        assert not torch.allclose(loaded(ids).logits, trainer.model(ids).logits)
    assert not trainer.model.get_base_model().model.layers[1]._forward_hooks


@pytest.mark.parametrize("control", ["noise", "low_rank"])
def test_resumed_run_ends_with_the_same_adapter_bit_for_bit(tmp_path, control):
    def trainer(folder, steps):
        return make_trainer(
            moved_adapter(tiny_model(dtype=torch.float32), dropout=0.1, moved=False), folder,
            sae=tiny_sae(torch.float32), dataset=ragged_dataset(), per_device_train_batch_size=2, max_steps=steps,
            save_strategy="steps", save_steps=3, control=control,
        )  # fmt: skip

    whole = trainer(tmp_path / "whole", 7)
    whole.train()
    trainer(tmp_path / "parts", 3).train()
    resumed = trainer(tmp_path / "parts", 7)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())
    losses = [[e["loss"] for e in run.state.log_history if "loss" in e][3:7] for run in (whole, resumed)]
    assert losses[0] == losses[1]


def test_a_resumed_run_counts_the_tokens_of_all_its_parts(tmp_path):
    def trainer(folder, steps):
        # The checkpoint stands between two logs.
        return make_trainer(
            moved_adapter(tiny_model(dtype=torch.float32), moved=False), folder, sae=tiny_sae(torch.float32),
            dataset=ragged_dataset(), per_device_train_batch_size=2, max_steps=steps, logging_steps=2,
            save_strategy="steps", save_steps=3,
        )  # fmt: skip

    whole = trainer(tmp_path / "whole", 8)
    whole.train()
    trainer(tmp_path / "parts", 3).train()
    resumed = trainer(tmp_path / "parts", 8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    told = [{e["step"]: e["num_tokens"] for e in run.state.log_history if "loss" in e} for run in (whole, resumed)]
    rows = ragged_dataset()["input_ids"]
    assert len(rows) == 8 and told[0][8] == 2 * sum(map(len, rows))  # eight steps of two rows are two epochs
    assert {step: told[1][step] for step in (4, 6, 8)} == {step: told[0][step] for step in (4, 6, 8)}


def test_logs(tmp_path):
    peft, sae, batch = moved_adapter(tiny_model(), moved=False), tiny_sae(), batch_of(padded=False)
    expected, grads = naive_gradients(peft, sae=sae, batch=batch)
    dataset = Dataset.from_dict({"input_ids": batch["input_ids"].tolist()})
    trainer = make_trainer(peft, tmp_path, sae=sae, dataset=dataset, max_steps=2, sae_gradient="flow")
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["kl"] == pytest.approx(expected, rel=1e-9) and first["loss"] == pytest.approx(expected, abs=1e-4)
    assert first["initial_kl"] == first["kl"] and "initial_kl" not in trainer.state.log_history[1]
    assert first["kl_p50"] <= first["kl_p90"] <= first["kl_p99"]
    assert first["num_tokens"] == 48
    below = sum(g.square().sum() for n, g in grads.items() if ".layers.0." in n or ".layers.1." in n).sqrt().item()
    above = sum(g.square().sum() for n, g in grads.items() if ".layers.2." in n or ".layers.3." in n).sqrt().item()
    assert first["grad_norm_below"] == pytest.approx(below, rel=1e-9)
    assert first["grad_norm_above"] == pytest.approx(above, rel=1e-9)
    with peft.disable_adapter(), torch.no_grad():
        hidden = peft.get_base_model().model(batch["input_ids"], output_hidden_states=True).hidden_states[2]
        x = hidden[:, :-1].reshape(-1, 32)
        fvu = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert first["splice_fvu"] == pytest.approx(fvu.item(), rel=1e-6)


def test_evaluation_gives_the_mean_kl(tmp_path):
    peft, sae, batch = moved_adapter(tiny_model()), tiny_sae(), batch_of(padded=False)
    expected, _ = naive_gradients(peft, sae=sae, batch=batch)
    trainer = make_trainer(peft, tmp_path, sae=sae)
    dataset = Dataset.from_dict({"input_ids": batch["input_ids"].tolist()})
    logs = trainer.evaluate(dataset)
    assert logs["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_paper_lora_is_the_default_and_the_callers_config_is_left_alone(tmp_path):
    config = make_trainer(tiny_model(), tmp_path, sae=tiny_sae()).model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (32, 128, 0.05)
    assert {name.removesuffix("_proj") for name in config.target_modules} == {"q", "k", "v", "o", "gate", "up", "down"}
    mine = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    before = copy.deepcopy(mine.to_dict())
    make_trainer(tiny_model(), tmp_path, sae=tiny_sae(), peft_config=mine)
    assert mine.to_dict() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sae_in": "techer"}, "sae_in is 'techer'; it must be one of student, teacher"),
        ({"sae_gradient": "none"}, "sae_gradient is 'none'"),
        ({"kl_reference": "bas"}, "must be one of base, adapted, source"),
        ({"control": "gaussian"}, "control is 'gaussian'"),
        ({"kl_beta": 1.5}, "kl_beta is 1.5; it must be between 0.0 and 1.0"),
        ({"kl_temperature": 0.0}, "kl_temperature is 0.0; it must be above 0"),
        ({"kl_weight": -1.0}, "kl_weight is -1.0"),
        ({"kl_weight": 0.0}, "nothing to train on"),
        ({"sae_in": "teacher", "sae_gradient": "stop"}, "always runs without gradient"),
        ({"kl_weight": 0.0, "sft_weight": 1.0, "sae_in": "teacher"}, "no teacher"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SAETuningConfig(output_dir="x", **settings)


def test_settings_that_need_something_else(tmp_path):
    with pytest.raises(ValueError, match="the loss zero"):
        make_trainer(tiny_model(), tmp_path)
    with pytest.raises(ValueError, match="takes its size from an SAE's error"):
        make_trainer(tiny_model(), tmp_path, control="noise")
    with pytest.raises(ValueError, match="source_model is not given"):
        make_trainer(tiny_model(), tmp_path, kl_reference="source")
    with pytest.raises(ValueError, match="source_model is given"):
        make_trainer(tiny_model(), tmp_path, sae=tiny_sae(), source_model=tiny_model())
    with pytest.raises(ValueError, match="has 80 tokens and the target 64"):
        make_trainer(tiny_model(), tmp_path, source_model=tiny_model(vocab_size=80), kl_reference="source")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer(tiny_model(), tmp_path, sae=tiny_sae(), peft_config=config)


def test_none_on_the_command_line_means_none():
    config = SAETuningConfig(output_dir="x", sae="none", control="null", hookpoint="None")
    assert config.sae is None and config.control is None and config.hookpoint is None


def test_defaults_run_on_a_machine_without_an_accelerator():
    config = SAETuningConfig(output_dir="x")
    assert config.use_cpu is not torch.accelerator.is_available()
    assert config.bf16 is (torch.accelerator.is_available() and torch.cuda.is_bf16_supported())
    assert (config.learning_rate, config.lr_scheduler_type, config.max_length) == (1e-6, "constant", 2048)
    assert config.packing and config.packing_strategy == "wrapped"


def test_an_sae_given_twice_must_be_one(tmp_path):
    save_sae(tiny_sae(torch.float32), tmp_path / "one")
    save_sae(tiny_sae(torch.float32, seed=1), tmp_path / "other")
    one = str(tmp_path / "one")
    model = partial(tiny_model, dtype=torch.float32)
    assert make_trainer(model(), tmp_path, sae=tiny_sae(torch.float32), args_sae=one)
    with pytest.raises(ValueError, match="is not the one that its args name"):
        make_trainer(model(), tmp_path, sae=tiny_sae(torch.float32, seed=1), args_sae=one)
    with pytest.raises(ValueError, match="name one"):
        make_trainer(model(), tmp_path, sae=str(tmp_path / "other"), args_sae=one)


def test_a_module_that_does_not_keep_the_width_is_refused_before_training(tmp_path):
    with pytest.raises(IncompatibleSAEError, match="it must keep the shape"):
        make_trainer(tiny_model(), tmp_path, sae=torch.nn.Linear(32, 16).double(), hookpoint=1)
    with pytest.raises(IncompatibleSAEError, match="does not say where it was trained"):
        make_trainer(tiny_model(), tmp_path, sae=torch.nn.Linear(32, 32).double())


def test_an_sae_on_another_device_than_the_model_is_tried_there():
    # As with a model on a GPU and an SAE just read from disk; the trainer moves it afterwards.
    module = torch.nn.Linear(32, 32, dtype=torch.float64, device="meta")
    placed = place_sae(tiny_model(), SAETuningConfig(output_dir="x", hookpoint=1), module)
    assert placed.hookpoint == "layers.1"


def test_fvu_of_a_mismatch_is_that_of_the_formula(tmp_path):
    sae, model, ids = tiny_sae(hookpoint="layers.1"), tiny_model(), batch_of()["input_ids"]
    placed = place_sae(model, SAETuningConfig(output_dir="x", hookpoint=2, allow_hookpoint_mismatch=True), sae)
    x = model(ids, output_hidden_states=True).hidden_states[3].flatten(0, 1).detach()
    fvu = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    with pytest.warns(UserWarning, match=rf"its FVU is {fvu.item():.3f} "):
        warn_of_mismatch(placed, x)
