"""Guards: what cannot end well is stopped or told, at once, with what to change."""

import json
import warnings

import pytest
import torch
from datasets import Dataset
from sae_reference import HOOKPOINTS, config, logged, rows, same, train, weights
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback
from tuning_reference import VOCABULARY, make_trainer, moved_adapter, tiny_model, tiny_sae

from resa_hf.checkpoints import checkpoints
from resa_hf.errors import DataError, TrainingError
from resa_hf.experiment.stages import train_from_last_checkpoint, warned_of
from resa_hf.guards import IN_A_ROW
from resa_hf.out_of_memory import less_memory
from resa_hf.sae.signum import ScheduleFreeSignum
from resa_hf.sae.trainer import SAETrainer


class BreakGradient(SAETrainer):
    """One number of the gradient, or the loss, is not finite in some steps."""

    broken: dict[int, float] = {}  # noqa: RUF012
    in_loss = False

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        if (bad := self.broken.get(self.state.global_step)) is not None:
            next(iter(self.saes.values())).W_enc.grad[0, 0] = bad
        return loss

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        bad = self.in_loss and self.broken.get(self.state.global_step)
        return loss * bad if bad else loss


def run(model, folder, broken, in_loss=False, **changes):
    trainer = BreakGradient(model, config(folder, hookpoints=HOOKPOINTS[:2], **changes), rows(24))
    trainer.broken, trainer.in_loss = broken, in_loss
    trainer.train()
    return trainer


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
@pytest.mark.parametrize(("bad", "in_loss"), [(float("nan"), False), (float("inf"), False), (float("nan"), True)])
def test_a_step_that_is_not_finite_is_as_if_the_optimizer_had_not_been_called(
    make_model, tmp_path, monkeypatch, optimizer, bad, in_loss
):
    model = make_model("qwen2")
    found = run(model, tmp_path / "a", {2: bad, 4: bad}, in_loss, sae_optimizer=optimizer)
    assert logged(found, "skipped_steps")[0] == 1 and logged(found, "skipped_steps")[-1] == 2
    assert all(torch.isfinite(value).all() for value in weights(found).values())
    kind = ScheduleFreeSignum if optimizer == "signum" else torch.optim.Adam
    step, calls = kind.step, []

    def without_two(self, *args, **kwargs):
        calls.append(1)
        if len(calls) not in (3, 5):
            step(self, *args, **kwargs)

    monkeypatch.setattr(kind, "step", without_two)
    wanted = run(model, tmp_path / "b", {}, sae_optimizer=optimizer)
    assert len(calls) == 6 and not logged(wanted, "skipped_steps")
    assert same(weights(found), weights(wanted))


def test_a_few_in_a_row_stop_the_run_with_the_batch(make_model, tmp_path, fault):
    last, bad = 1 + IN_A_ROW, float("nan")
    with pytest.raises(
        TrainingError, match=rf"not finite in 5 steps in a row, up to step {last}.*learning_rate"
    ) as at:
        run(make_model("qwen2"), tmp_path, dict.fromkeys(range(1, 9), bad), max_steps=9)
    fault("NaN in a gradient, five steps in a row", told=at.value, kept="the checkpoints before, and the batch")
    saved = load_file(tmp_path / "batch-not-finite-0.safetensors")["0/input_ids"]
    seen: list[torch.Tensor] = []

    class Watching(SAETrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(inputs["input_ids"].clone())
            return super().compute_loss(model, inputs, *args, **kwargs)

    Watching(make_model("qwen2"), config(tmp_path / "b", max_steps=9), rows(24)).train()
    assert torch.equal(saved, seen[last - 1])
    # Four in a row, and four again, do not.
    broken = dict.fromkeys([0, 1, 2, 3, 5, 6, 7, 8], bad)
    assert run(make_model("qwen2"), tmp_path / "c", broken, max_steps=10).skipped_steps == 8


def test_where_the_device_is_not_asked_the_gradient_is_zero_and_the_step_told_later(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(SAETrainer, "_skip_seen", SAETrainer._skip_unseen)
    settings = {"sae_optimizer": "signum", "logging_steps": 1, "max_steps": 9}
    found = run(make_model("qwen2"), tmp_path / "a", {2: float("nan"), 5: float("inf")}, **settings)
    assert [entry.get("skipped_steps", 0) for entry in found.state.log_history if "loss" in entry] == [
        0,
        0,
        0,
        *[1] * 3,
        2,
        2,
        2,
    ]
    step = ScheduleFreeSignum.step

    def by_zero(self, *args, **kwargs):
        if found_steps[0] in (2, 5):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.zero_()
        found_steps[0] += 1
        step(self, *args, **kwargs)

    found_steps = [0]
    monkeypatch.setattr(ScheduleFreeSignum, "step", by_zero)
    wanted = run(make_model("qwen2"), tmp_path / "b", {}, **settings)
    assert found_steps == [9] and same(weights(found), weights(wanted))
    broken = dict.fromkeys(range(1, 9), float("nan"))
    with pytest.raises(TrainingError, match="not finite in 5 steps in a row"):
        run(make_model("qwen2"), tmp_path / "c", broken, **settings)


def test_no_checkpoint_has_weights_that_are_not_finite(make_model, tmp_path, fault):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 3:
                model.saes["layers.1"].W_dec.data[0, 0] = float("inf")

    args = config(tmp_path, save_strategy="steps", save_steps=1)
    trainer = SAETrainer(make_model("qwen2"), args, rows(24), callbacks=[Poison()])
    with pytest.raises(
        TrainingError, match=r"1 trained weights are not finite at step 3 \(the first: .*W_dec\)"
    ) as at:
        trainer.train()
    fault("infinity in an SAE's weight, Stage I", told=at.value, kept="the checkpoints before it")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


def test_an_sae_worse_than_the_mean_is_told_once(make_model, tmp_path):
    with pytest.warns(UserWarning, match=r"fvu/layers.1 is .*above 1") as found:
        train(make_model("qwen2"), config(tmp_path, learning_rate=0.5, max_steps=104, logging_steps=1))
    assert len([w for w in found if "above 1" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(make_model("qwen2"), config(tmp_path / "b", learning_rate=1e-3))


def test_saes_without_a_latent_that_fires_stop(make_model, tmp_path):
    trainer = SAETrainer(make_model("qwen2"), config(tmp_path, dead_after_tokens=60, logging_steps=1), rows(24))
    with torch.no_grad():
        trainer.saes["layers.1"].b_enc.fill_(-1e6)
    with pytest.raises(TrainingError, match=r"No latent of the SAE at layers.1 has fired.*auxk_alpha"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_an_sae_that_is_not_in_the_path_stops_at_the_first_step(tmp_path):
    trainer = make_trainer(tiny_model(), tmp_path, sae=nn.Identity(), hookpoint="layers.1", max_steps=3)
    with pytest.raises(TrainingError, match="exactly zero at the first step"):
        trainer.train()
    assert trainer.state.global_step == 0
    make_trainer(tiny_model(), tmp_path, sae=tiny_sae(), max_steps=1).train()


def test_tokens_that_the_model_does_not_know_are_refused_before_training(make_model, tmp_path):
    wrong = Dataset.from_dict({"input_ids": [[1, 2, 3] * 5, [4, VOCABULARY, 5] * 5]})
    with pytest.raises(DataError, match=r"token 64, but the model has embeddings of 64 tokens \(0 to 63\)"):
        make_trainer(tiny_model(), tmp_path, sae=tiny_sae(), dataset=wrong)
    with pytest.raises(DataError, match="train_dataset has the token 64"):
        SAETrainer(make_model("qwen2"), config(tmp_path), wrong)
    known = Dataset.from_dict({"input_ids": [[1, 2, 3] * 5, [4, VOCABULARY - 1, 5] * 5]})
    make_trainer(tiny_model(), tmp_path, sae=tiny_sae(), dataset=known)
    # As mllama, whose embedding has more rows than its vocabulary tokens.
    model = make_model("qwen2")
    model.get_input_embeddings().weight = torch.nn.Parameter(torch.zeros(VOCABULARY + 1, 32))
    SAETrainer(model, config(tmp_path), wrong)


def test_an_adapter_that_has_not_moved_is_told(tmp_path, capsys):
    def trained(**settings):
        model = moved_adapter(tiny_model(dtype=torch.float32), moved=False)
        trainer = make_trainer(model, tmp_path, sae=tiny_sae(torch.float32), max_steps=2, **settings)
        trainer.train()
        return warned_of(trainer)

    assert trained() == {}
    (told,) = trained(learning_rate=0.0)["warnings"]
    assert told.startswith("The adapter has not moved") and told in capsys.readouterr().out


def full_on_the_cpu():
    torch.empty(2**50)


def full_on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def full_in_python():
    raise MemoryError


@pytest.mark.parametrize("fill", [full_on_the_cpu, full_on_a_gpu, full_in_python])
def test_out_of_memory_says_what_to_change(tmp_path, fill):
    trainer = make_trainer(tiny_model(), tmp_path, sae=tiny_sae(), max_length=512, gradient_checkpointing=False)
    trainer.training_step = lambda *args: fill()
    with pytest.raises(TrainingError) as caught:
        train_from_last_checkpoint(trainer)
    told = str(caught.value)
    assert told.startswith("Out of memory at step 1: ")
    for change in (
        "per_device_train_batch_size: 2 (now 4) with gradient_accumulation_steps: 2 (now 1)",
        "gradient_checkpointing: true",
        "load_in_4bit: true",
        "max_length: 256 (now 512)",
    ):
        assert change in told


def test_only_what_takes_less_is_proposed(tmp_path):
    args = config(tmp_path, per_device_train_batch_size=1, num_latents=4096, hookpoints=HOOKPOINTS)
    told = less_memory(args, in_4bit=True)
    assert [line.partition(":")[0] for line in told] == ["num_latents", "hookpoints"]


def test_other_errors_stay_what_they_are(tmp_path):
    trainer = make_trainer(tiny_model(), tmp_path, sae=tiny_sae())

    def fail(*args):
        raise RuntimeError("shapes cannot be multiplied")

    trainer.training_step = fail
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train_from_last_checkpoint(trainer)


def test_rows_of_text_are_kept_beside_tensors(tmp_path):
    from resa_hf.guards import _save_batches

    _save_batches([[{"prompt": "1+1"}], {"input_ids": torch.arange(3)}], tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert json.loads(file.metadata()["0/rows"]) == [{"prompt": "1+1"}]
        assert file.get_tensor("1/input_ids").tolist() == [0, 1, 2]
