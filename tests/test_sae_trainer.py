"""Stage I: what is learnt, what is left alone, what counts, and what is logged."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelFactory
from datasets import Dataset
from sae_reference import HOOKPOINTS, LATENTS, LENGTH, K, activations, config, logged, naive_fvu, rows, train
from torch import nn

from resa_hf.sae.checkpoint import load_sae
from resa_hf.sae.trainer import SAETrainer


@pytest.fixture
def model(make_model: ModelFactory) -> nn.Module:
    return make_model("qwen2")


def test_source_model_is_left_alone(model: nn.Module, tmp_path: Path) -> None:
    model.train()
    model.get_submodule("model.layers.2").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    dataset = rows(24)
    train(model, config(tmp_path, hookpoints=HOOKPOINTS), dataset, eval_dataset=rows(3, seed=1)).evaluate()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert dataset.column_names == ["input_ids"]


def test_the_callers_arguments_are_left_alone(model: nn.Module, tmp_path: Path) -> None:
    args = config(tmp_path)
    before = copy.deepcopy(args.to_dict())
    train(model, args)
    assert args.to_dict() == before


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_fvu_falls_on_activations_that_can_be_learnt(model: nn.Module, tmp_path: Path, optimizer: str) -> None:
    # Three token ids in one-token rows give three activations at layer 0: the SAE can learn each by heart.
    dataset = Dataset.from_dict({"input_ids": [[5], [6], [7]] * 8})
    args = config(tmp_path, hookpoints=["layers.0"], sae_optimizer=optimizer, max_steps=150, learning_rate=None)
    trainer = SAETrainer(model, args, dataset, eval_dataset=dataset)
    start = trainer.evaluate()["eval_fvu/layers.0"]
    trainer.train()
    end = trainer.evaluate()["eval_fvu/layers.0"]
    assert start > 0.5
    assert end < 0.05
    fvu = logged(trainer, "fvu/layers.0")
    assert fvu[-1] < 0.2 * fvu[0]


def test_decoder_rows_keep_norm_one_and_the_average_is_what_is_left(model: nn.Module, tmp_path: Path) -> None:
    trainer = train(model, config(tmp_path))
    sae, state = trainer.saes["layers.1"], trainer.optimizer.state
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(LATENTS))
    assert torch.equal(sae.W_enc, state[sae.W_enc]["x"])
    assert not torch.equal(sae.W_enc, state[sae.W_enc]["z"])
    average = state[sae.W_dec]["x"]
    torch.testing.assert_close(sae.W_dec, average / average.norm(dim=1, keepdim=True))


def test_first_step_equals_a_step_by_hand(model: nn.Module, tmp_path: Path) -> None:
    dataset = rows(4)
    trainer = SAETrainer(model, config(tmp_path, max_steps=1), dataset)
    sae = trainer.saes["layers.1"]
    W_enc, b_enc, W_dec = (t.detach().double().requires_grad_() for t in (sae.W_enc, sae.b_enc, sae.W_dec))
    x = activations(model, dataset, "layers.1")
    b_dec = x.mean(0).requires_grad_()  # where the first batch puts it
    values, indices = torch.relu((x - b_dec) @ W_enc + b_enc).topk(K, dim=1)
    out = torch.einsum("tk,tkd->td", values, W_dec[indices]) + b_dec
    ((x - out).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).backward()
    trainer.train()
    # After one step the average is the first iterate. Gradients near zero have no certain sign in float32.
    for name, start, grad in (
        ("W_enc", W_enc, W_enc.grad),
        ("b_enc", b_enc, b_enc.grad),
        ("b_dec", b_dec, b_dec.grad),
    ):
        sure = grad.abs() > 1e-9
        step = getattr(sae, name).double() - start
        torch.testing.assert_close(step[sure], -5e-3 * grad[sure].sign(), rtol=1e-3, atol=1e-6)
    tangent = W_dec.grad - (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
    moved = W_dec - 5e-3 * tangent.sign() * (tangent.abs() > 1e-9)
    torch.testing.assert_close(sae.W_dec.double(), moved / moved.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_three_hookpoints_in_one_pass_equal_three_runs(model: nn.Module, tmp_path: Path) -> None:
    settings = {"auxk_alpha": 0.1, "dead_after_tokens": 100}
    together = train(model, config(tmp_path, hookpoints=HOOKPOINTS, **settings))
    for hookpoint in HOOKPOINTS:
        alone = train(model, config(tmp_path, hookpoints=[hookpoint], **settings))
        for name, tensor in alone.saes[hookpoint].state_dict().items():
            assert torch.equal(together.saes[hookpoint].state_dict()[name], tensor), (hookpoint, name)
        assert logged(alone, f"fvu/{hookpoint}") == logged(together, f"fvu/{hookpoint}")


def test_saes_of_two_hookpoints_do_not_start_alike(model: nn.Module, tmp_path: Path) -> None:
    saes = SAETrainer(model, config(tmp_path, hookpoints=HOOKPOINTS[:2])).saes
    assert not torch.equal(saes["layers.0"].W_enc, saes["layers.1"].W_enc)


def test_evaluation_is_exact_over_the_whole_dataset(model: nn.Module, tmp_path: Path) -> None:
    # 7 rows in batches of 3: a mean over batches would be another number.
    held_out = rows(7, seed=5)
    args = config(tmp_path, hookpoints=HOOKPOINTS[:2], per_device_eval_batch_size=3)
    trainer = train(model, args, eval_dataset=held_out)
    metrics = trainer.evaluate()
    for hookpoint, sae in trainer.saes.items():
        x = activations(model, held_out, hookpoint)
        assert metrics[f"eval_fvu/{hookpoint}"] == pytest.approx(naive_fvu(sae, x), rel=1e-5)
        latents = sae.encode(x.float())
        assert metrics[f"eval_l0/{hookpoint}"] == pytest.approx(float((latents > 0).sum() / len(x)))
        assert metrics[f"eval_dead_share/{hookpoint}"] == pytest.approx(
            float((latents > 0).sum(0).eq(0).float().mean())
        )
    assert metrics["eval_loss"] == pytest.approx(sum(metrics[f"eval_fvu/{hookpoint}"] for hookpoint in trainer.saes))


def test_training_logs_are_ratios_of_sums(model: nn.Module, tmp_path: Path) -> None:
    # Without a step of any size, the logs of two batches can be had from a full matrix.
    dataset = rows(8)
    args = config(tmp_path, learning_rate=1e-30, max_steps=2, logging_steps=2, train_sampling_strategy="sequential")
    trainer = train(model, args, dataset)
    sae = trainer.saes["layers.1"]
    halves = activations(model, dataset, "layers.1").split(4 * LENGTH)
    variance = [float((x - x.mean(0)).pow(2).sum()) for x in halves]
    expected = sum(naive_fvu(sae, x) * v for x, v in zip(halves, variance, strict=True)) / sum(variance)
    assert logged(trainer, "fvu/layers.1")[0] == pytest.approx(expected, rel=1e-4)
    active = sum(float((sae.encode(x.float()) > 0).sum()) for x in halves) / (8 * LENGTH)
    assert logged(trainer, "l0/layers.1")[0] == pytest.approx(active, rel=1e-2)
    assert logged(trainer, "tokens_seen") == [8 * LENGTH]


def test_dead_share_counts_tokens_since_the_last_firing(model: nn.Module, tmp_path: Path) -> None:
    # One-token rows of three ids, in order: a latent that fires for none of them is dead after the first 8 tokens.
    dataset = Dataset.from_dict({"input_ids": [[5], [6], [7], [5]] * 6})
    args = config(tmp_path, learning_rate=1e-30, dead_after_tokens=8, logging_steps=1, max_steps=4)
    trainer = train(model, args, dataset)
    x = activations(model, Dataset.from_dict({"input_ids": [[5], [6], [7]]}), "layers.1")
    never = float((trainer.saes["layers.1"].encode(x.float()) > 0).sum(0).eq(0).float().mean())
    assert 0 < never < 1
    shares = logged(trainer, "dead_share/layers.1")
    assert shares[:2] == [0, 0]  # 4 and 8 tokens: not more than 8
    assert shares[-1] >= never - 1e-6


def test_padding_changes_nothing(model: nn.Module, tmp_path: Path) -> None:
    plain = rows(24)
    ids = torch.tensor(plain["input_ids"][:])
    generator = torch.Generator().manual_seed(1)
    junk = torch.randint(3, 64, (24, 5), generator=generator)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(junk)], dim=1)
    padded = Dataset.from_dict({"input_ids": torch.cat([ids, junk], dim=1).tolist(), "attention_mask": mask.tolist()})
    held_out = rows(3, seed=8)
    one, other = (train(model, config(tmp_path), dataset, eval_dataset=held_out) for dataset in (plain, padded))
    # Three units of the last place in an activation may turn the sign of a gradient that is zero but for rounding.
    assert logged(one, "fvu/layers.1") == pytest.approx(logged(other, "fvu/layers.1"), rel=1e-3)
    assert one.evaluate()["eval_fvu/layers.1"] == pytest.approx(other.evaluate()["eval_fvu/layers.1"], rel=1e-3)
    assert logged(one, "tokens_seen") == logged(other, "tokens_seen")


def test_rows_of_different_length_are_padded_and_masked(model: nn.Module, tmp_path: Path) -> None:
    ragged = Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9, 10], [11, 12, 13]]})
    metrics = SAETrainer(model, config(tmp_path), eval_dataset=ragged)
    result = metrics.evaluate()
    parts = [activations(model, ragged.select([index]), "layers.1") for index in range(3)]
    assert result["eval_fvu/layers.1"] == pytest.approx(
        naive_fvu(metrics.saes["layers.1"], torch.cat(parts)), rel=1e-5
    )


def test_special_tokens_and_outlying_norms_do_not_count(model: nn.Module, tmp_path: Path, tiny_tokenizer: Any) -> None:
    special = tiny_tokenizer.all_special_ids
    usual = [index for index in range(3, 60) if index not in special][: LENGTH - 1]
    with torch.no_grad():  # one token with an enormous activation
        model.get_input_embeddings().weight[usual[-1]] *= 1e4
    dataset = Dataset.from_dict({"input_ids": [[special[0], *usual]] * 4})
    x = activations(model, dataset, "layers.0")
    norm = x.norm(dim=1)
    ids = torch.tensor(dataset["input_ids"][:]).flatten()
    is_special = torch.isin(ids, torch.tensor(special))
    kept = ~is_special & (norm <= 5 * norm[~is_special].median())
    assert int((~kept).sum()) >= 8  # the special token and the outlier of each row
    args = config(
        tmp_path,
        hookpoints=["layers.0"],
        exclude_special_tokens=True,
        max_norm_ratio=5.0,
        max_steps=1,
        learning_rate=1e-30,
        logging_steps=1,
    )
    trainer = SAETrainer(model, args, dataset, dataset, processing_class=tiny_tokenizer)
    trainer.train()
    sae = trainer.saes["layers.0"]
    torch.testing.assert_close(sae.b_dec.double(), x[kept].mean(0), rtol=1e-4, atol=1e-6)
    assert trainer.evaluate()["eval_fvu/layers.0"] == pytest.approx(naive_fvu(sae, x[kept]), rel=1e-4)
    assert logged(trainer, "tokens_seen") == [int((~is_special).sum())]
    trainer.save_model(str(tmp_path / "out"))
    assert load_sae(tmp_path / "out").metadata["exclude_special_tokens"] == tiny_tokenizer.all_special_ids


def test_bf16_source_model_trains_float32_saes(make_model: ModelFactory, tmp_path: Path) -> None:
    trainer = train(make_model("llama").to(torch.bfloat16), config(tmp_path))
    assert all(parameter.dtype == torch.float32 for parameter in trainer.saes["layers.1"].parameters())
    assert math.isfinite(logged(trainer, "fvu/layers.1")[-1])


TWO_PROCESSES = """
import sys
import torch
from conftest import _make_model
from resa_hf.sae.trainer import SAETrainer
from sae_reference import config, rows

args = config(sys.argv[1], hookpoints=["layers.0", "layers.1"], per_device_train_batch_size=2, eval_steps=3,
              per_device_eval_batch_size=2, gradient_accumulation_steps=2, auxk_alpha=0.1, dead_after_tokens=100)
trainer = SAETrainer(_make_model("qwen2"), args, rows(40), rows(7, seed=1))
trainer.train()
metrics = trainer.evaluate()
mine = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
everyones = [torch.empty_like(mine) for _ in range(args.world_size)]
torch.distributed.all_gather(everyones, mine)
assert args.world_size == 2 and torch.equal(everyones[0], everyones[1])
trainer.save_model()
if args.process_index == 0:
    trainer.state.log_history.append(metrics)
    trainer.state.save_to_json(sys.argv[1] + "/state.json")
"""


@pytest.mark.long
def test_two_processes_hold_the_same_saes_and_count_all_tokens(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [*run, str(tmp_path / "two.py"), str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    history = json.loads((tmp_path / "state.json").read_text())["log_history"]
    assert [entry["tokens_seen"] for entry in history if "tokens_seen" in entry] == [256, 512, 768]
    # 7 held-out rows do not divide among two processes: none may be left out or repeated.
    held_out = rows(7, seed=1)
    for hookpoint in HOOKPOINTS[:2]:
        expected = naive_fvu(load_sae(tmp_path, hookpoint), activations(model, held_out, hookpoint))
        assert history[-1][f"eval_fvu/{hookpoint}"] == pytest.approx(expected, rel=1e-5)
