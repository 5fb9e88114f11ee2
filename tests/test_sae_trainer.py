"""Stage I: what is learnt, what is left alone, what is logged, and that a resumed run is the unbroken one."""

import copy
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from conftest import ModelFactory
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from resa_hf.errors import DataError, HookpointError, IncompatibleSAEError
from resa_hf.hookpoints import capture
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.checkpoint import load_sae, save_sae
from resa_hf.sae.config import SAETrainingConfig
from resa_hf.sae.signum import ScheduleFreeSignum
from resa_hf.sae.trainer import SAETrainer

LENGTH, LATENTS, K = 16, 48, 4
HOOKPOINTS = ["layers.0", "layers.1", "layers.2"]


@pytest.fixture
def model(make_model: ModelFactory) -> nn.Module:
    return make_model("qwen2")


def rows(count: int, seed: int = 0, length: int = LENGTH) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_dict({"input_ids": torch.randint(3, 64, (count, length), generator=generator).tolist()})


def config(folder: Path, **changes: Any) -> SAETrainingConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "hookpoints": ["layers.1"],
        "num_latents": LATENTS,
        "k": K,
        "learning_rate": 5e-3,
        "max_length": LENGTH,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }
    return SAETrainingConfig(**{**settings, **changes})


def train(model: nn.Module, args: SAETrainingConfig, dataset: Any = None, **kwargs: Any) -> SAETrainer:
    trainer = SAETrainer(model, args, rows(24) if dataset is None else dataset, **kwargs)
    trainer.train()
    return trainer


def logged(trainer: SAETrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(trainer: SAETrainer) -> dict[str, Tensor]:
    return {f"{hp}/{name}": t.clone() for hp, sae in trainer.saes.items() for name, t in sae.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def activations(model: nn.Module, dataset: Dataset, hookpoint: str) -> Tensor:
    with torch.no_grad(), capture(model, [hookpoint]) as hooked:
        model(input_ids=torch.tensor(dataset["input_ids"][:]))
    return hooked[hookpoint].flatten(0, 1).double()


def naive_fvu(sae: TopKSAE, x: Tensor) -> float:
    W_enc, b_enc, W_dec, b_dec = (t.detach().double() for t in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    pre = torch.relu((x - b_dec) @ W_enc + b_enc)
    z = torch.where(pre >= pre.topk(sae.k, dim=1).values[:, -1:], pre, 0)
    return float((x - (z @ W_dec + b_dec)).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


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


@pytest.mark.parametrize(("optimizer", "stop_at"), [("signum", 4), ("adam", 7)])
def test_resumed_run_equals_the_unbroken_one(model: nn.Module, tmp_path: Path, optimizer: str, stop_at: int) -> None:
    settings: dict[str, Any] = {"hookpoints": HOOKPOINTS[:2], "sae_optimizer": optimizer, "max_steps": 10}
    settings |= {"auxk_alpha": 0.1, "dead_after_tokens": 200, "gradient_accumulation_steps": 2}
    unbroken = train(model, config(tmp_path / "a", **settings), eval_dataset=rows(2, seed=9))
    # Saves and evaluates on its way, as the unbroken run does not: neither may leave a trace.
    on_the_way = {"save_strategy": "steps", "save_steps": stop_at, "eval_strategy": "steps", "eval_steps": 3}
    train(model, config(tmp_path / "b", **settings, **on_the_way), eval_dataset=rows(2, seed=9))
    checkpoint = tmp_path / "b" / f"checkpoint-{stop_at}"
    resumed = SAETrainer(model, config(tmp_path / "c", **settings), rows(24))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 10
    assert same(weights(resumed), weights(unbroken))
    assert same(resumed.progress.tensors(), unbroken.progress.tensors())
    assert logged(resumed, "tokens_seen")[-1] == 10 * 2 * 4 * LENGTH


def test_checkpoints_hold_saes_and_no_pickled_weights(model: nn.Module, tmp_path: Path) -> None:
    trainer = train(model, config(tmp_path, hookpoints=HOOKPOINTS[:2], save_strategy="steps", save_steps=6))
    checkpoint = tmp_path / "checkpoint-6"
    for hookpoint, sae in trainer.saes.items():
        loaded = load_sae(checkpoint, hookpoint)
        assert same(dict(loaded.state_dict()), dict(sae.state_dict()))
    names = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    files = ("cfg.json", "sae_weights.safetensors")
    expected = {f"{hookpoint}/{file}" for hookpoint in HOOKPOINTS[:2] for file in files}
    states = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "sae_progress.safetensors"}
    assert names == expected | states


def test_save_model_writes_one_folder_a_hookpoint_with_its_story(model: nn.Module, tmp_path: Path) -> None:
    model.config.name_or_path = "someone/source"
    dataset = rows(24)
    trainer = train(model, config(tmp_path, hookpoints=["0", "model.layers.1.mlp"]), dataset)
    trainer.save_model(str(tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["layers.0", "layers.1.mlp"]
    metadata = json.loads((tmp_path / "out" / "layers.1.mlp" / "cfg.json").read_text())["metadata"]
    expected = {
        "model_name": "someone/source",
        "hookpoint": "layers.1.mlp",
        "hook_name": "blocks.1.hook_mlp_out",
        "tokens_seen": 6 * 4 * LENGTH,
        "max_length": LENGTH,
        "k": K,
        "seed": 3,
        "exclude_special_tokens": False,
        "dataset_fingerprint": dataset._fingerprint,
    }
    assert metadata.items() >= expected.items()
    assert metadata["versions"]["torch"] == torch.__version__
    x = torch.randn(4, 32)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "out" / "layers.1.mlp")
    torch.testing.assert_close(theirs(x), trainer.saes["layers.1.mlp"](x))


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
    assert load_sae(tmp_path / "out").metadata["exclude_special_tokens"] is True


def test_finetuning_starts_from_the_given_weights(model: nn.Module, tmp_path: Path) -> None:
    first = train(model, config(tmp_path / "a", hookpoints=HOOKPOINTS[:2]))
    first.save_model(str(tmp_path / "a"))
    args = config(tmp_path / "b", hookpoints=HOOKPOINTS[:2], num_latents=None, k=None, initial_sae=str(tmp_path / "a"))
    second = SAETrainer(model, args, rows(24))
    assert same(weights(second), weights(first))
    assert second.saes["layers.1"].k == K
    b_dec = second.saes["layers.1"].b_dec.clone()
    second.train()
    assert not torch.equal(second.saes["layers.1"].W_enc, first.saes["layers.1"].W_enc)
    # b_dec moves by the optimiser's steps alone, not to the mean of the first batch.
    assert (second.saes["layers.1"].b_dec - b_dec).abs().max().item() <= 6 * 5e-3 + 1e-6
    second.save_model(str(tmp_path / "b"))
    assert load_sae(tmp_path / "b", "layers.0").metadata["initial_sae"]["name"] == str(tmp_path / "a")


def test_finetuning_at_another_hookpoint_only_warns(model: nn.Module, tmp_path: Path) -> None:
    save_sae(TopKSAE(32, LATENTS, K, hookpoint="layers.2.mlp"), tmp_path / "layers.2.mlp")
    args = config(tmp_path, num_latents=None, k=None, initial_sae=str(tmp_path))
    with pytest.warns(UserWarning, match=r"trained at 'layers\.2\.mlp'; here it starts at 'layers\.1'"):
        trainer = SAETrainer(model, args, rows(24))
    assert trainer.saes["layers.1"].hookpoint == "layers.1"


def test_finetuning_knows_the_hookpoint_in_the_words_of_sae_lens(
    model: nn.Module, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=32, d_sae=LATENTS, k=K))
    sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.save_model(tmp_path)
    trainer = SAETrainer(model, config(tmp_path, num_latents=None, k=None, initial_sae=str(tmp_path)), rows(24))
    assert trainer.saes["layers.1"].hookpoint == "layers.1"
    assert not [warning for warning in recwarn if "starts at" in str(warning.message)]


def test_finetuning_moves_decoder_norms_to_the_encoder(model: nn.Module, tmp_path: Path) -> None:
    sae = TopKSAE(32, LATENTS, LATENTS, hookpoint="layers.1")  # k = all latents: the choice of the k largest is moot
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, LATENTS)[:, None])
        sae.b_enc.uniform_(-0.1, 0.1)
    save_sae(sae, tmp_path)
    with pytest.warns(UserWarning, match="no unit norm"):
        trainer = SAETrainer(model, config(tmp_path, num_latents=None, k=None, initial_sae=str(tmp_path)))
    start = trainer.saes["layers.1"]
    torch.testing.assert_close(start.W_dec.norm(dim=1), torch.ones(LATENTS))
    x = torch.randn(10, 32)
    torch.testing.assert_close(start(x), sae(x))


@pytest.mark.parametrize(
    ("sae", "changes", "message"),
    [
        (TopKSAE(16, LATENTS, K, hookpoint="layers.1"), {}, "width 16.*have 32"),
        (TopKSAE(32, LATENTS, K, hookpoint="layers.1"), {"num_latents": 8}, "48 latents.*8"),
        (sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=32, d_sae=LATENTS)), {}, "StandardSAE"),
    ],
)
def test_initial_saes_that_do_not_fit_are_refused(
    model: nn.Module, tmp_path: Path, sae: Any, changes: dict[str, Any], message: str
) -> None:
    if isinstance(sae, TopKSAE):
        save_sae(sae, tmp_path)
    else:
        sae.save_model(tmp_path)
    settings = {"num_latents": None, "k": None, "initial_sae": str(tmp_path), **changes}
    with pytest.raises(IncompatibleSAEError, match=message):
        SAETrainer(model, config(tmp_path, **settings))


def test_text_is_packed_into_chunks_of_exactly_max_length(
    make_model: ModelFactory, tmp_path: Path, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("qwen2", vocab_size=len(tiny_tokenizer))
    texts = [f"{number} + {number} = {2 * number}" for number in range(60)]
    with caplog.at_level(logging.INFO, logger="resa_hf.sae.dataset"):
        trainer = SAETrainer(
            model, config(tmp_path), Dataset.from_dict({"text": texts}), processing_class=tiny_tokenizer
        )
    stream = [token for text in texts for token in [*tiny_tokenizer(text)["input_ids"], tiny_tokenizer.eos_token_id]]
    expected = [stream[start : start + LENGTH] for start in range(0, len(stream) - LENGTH + 1, LENGTH)]
    assert trainer.train_dataset["input_ids"][:] == expected
    assert "60 documents" in caplog.text


def test_bad_data_is_refused(model: nn.Module, tmp_path: Path, tiny_tokenizer: Any) -> None:
    args = config(tmp_path)
    with pytest.raises(DataError, match="train_dataset is empty"):
        SAETrainer(model, args, rows(0))
    with pytest.raises(DataError, match=r"'text'; it has question"):
        SAETrainer(model, args, rows(2), Dataset.from_dict({"question": ["a"]}))
    with pytest.raises(DataError, match="do not fill one chunk"):
        SAETrainer(model, args, Dataset.from_dict({"text": ["1"]}), processing_class=tiny_tokenizer)
    with pytest.raises(ValueError, match="processing_class"):
        SAETrainer(model, args, Dataset.from_dict({"text": ["1"]}))
    with pytest.raises(ValueError, match="processing_class"):
        SAETrainer(model, config(tmp_path, exclude_special_tokens=True), rows(2))
    with pytest.raises(ValueError, match="eval_dataset"):
        SAETrainer(model, args, rows(2)).evaluate()


@pytest.mark.parametrize(
    ("hookpoints", "message"), [([], "hookpoint"), (["layers.9"], r"layers\.9"), (["1", "layers.1"], "twice")]
)
def test_bad_hookpoints_are_refused(model: nn.Module, tmp_path: Path, hookpoints: list[str], message: str) -> None:
    with pytest.raises(HookpointError, match=message):
        SAETrainer(model, config(tmp_path, hookpoints=hookpoints))


def test_resuming_from_what_does_not_fit_is_refused(model: nn.Module, tmp_path: Path) -> None:
    train(model, config(tmp_path, save_strategy="steps", save_steps=6))
    checkpoint = tmp_path / "checkpoint-6"
    with pytest.raises(IncompatibleSAEError, match=r"48 latents.*96"):
        SAETrainer(model, config(tmp_path, num_latents=96), rows(24)).train(str(checkpoint))
    save_file({"tokens_seen": torch.tensor(1)}, checkpoint / "sae_progress.safetensors")
    with pytest.raises(IncompatibleSAEError, match="cannot resume"):
        SAETrainer(model, config(tmp_path), rows(24)).train(str(checkpoint))


def test_the_best_checkpoint_is_loaded_at_the_end(model: nn.Module, tmp_path: Path) -> None:
    every_two = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    # A learning rate far too large: it gets worse as it goes.
    args = config(tmp_path, load_best_model_at_end=True, learning_rate=0.5, **every_two)
    trainer = train(model, args, eval_dataset=rows(4, seed=6))
    losses = logged(trainer, "eval_loss")
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert best.endswith(f"checkpoint-{2 * (losses.index(min(losses)) + 1)}")
    assert same(dict(load_sae(best, "layers.1").state_dict()), dict(trainer.saes["layers.1"].state_dict()))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_bf16_source_model_trains_float32_saes(make_model: ModelFactory, tmp_path: Path) -> None:
    trainer = train(make_model("llama").to(torch.bfloat16), config(tmp_path))
    assert all(parameter.dtype == torch.float32 for parameter in trainer.saes["layers.1"].parameters())
    assert math.isfinite(logged(trainer, "fvu/layers.1")[-1])


def test_signum_equals_a_loop_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    target = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    parameter = nn.Parameter(start.clone())
    optimizer = ScheduleFreeSignum([parameter], lr=0.1)
    z, iterates, y = start.clone(), [], start.clone()
    for _ in range(20):
        optimizer.zero_grad()
        (parameter - target)[1:].pow(2).sum().backward()
        optimizer.step()
        z = torch.cat([z[:1], z[1:] - 0.1 * (y - target)[1:].sign()])  # the first row has no gradient and stays
        iterates.append(z)
        average = torch.stack(iterates).mean(0)
        y = 0.05 * z + 0.95 * average
        torch.testing.assert_close(parameter.detach(), y, rtol=1e-12, atol=1e-12)
    optimizer.use_average()
    torch.testing.assert_close(parameter.detach(), average, rtol=1e-12, atol=1e-12)
    assert torch.equal(parameter[0], start[0])
    optimizer.use_training_point()
    torch.testing.assert_close(parameter.detach(), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("lr", "momentum"), [(-1.0, 0.9), (0.1, 1.0), (0.1, -0.1)])
def test_signum_refuses_what_makes_no_sense(lr: float, momentum: float) -> None:
    with pytest.raises(ValueError, match="lr|momentum"):
        ScheduleFreeSignum([nn.Parameter(torch.zeros(1))], lr=lr, momentum=momentum)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae_optimizer": "adamw"}, "signum, adam, not 'adamw'"),
        ({"optim": "adamw_torch"}, "optim.*sae_optimizer"),
        ({"weight_decay": 0.1}, r"weight_decay \(0.1\)"),
        ({"num_latents": 64, "expansion_factor": 2}, r"num_latents \(64\) and expansion_factor \(2\)"),
        ({"initial_sae": "a/b", "num_latents": None, "expansion_factor": 2}, "expansion_factor"),
        ({"initial_sae_id": "layers.1"}, "initial_sae"),
        ({"k": 0}, "k must be at least 1, not 0"),
        ({"k": 99}, r"k \(99\).*48"),
        ({"num_latents": -1, "k": None}, "num_latents"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"auxk_alpha": -0.1}, "auxk_alpha"),
        ({"max_norm_ratio": 1.0}, "max_norm_ratio"),
        ({"dead_after_tokens": 0}, "dead_after_tokens"),
        ({"max_length": 0}, "max_length"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_defaults(tmp_path: Path) -> None:
    args = SAETrainingConfig(output_dir=str(tmp_path), hookpoints=["12"], initial_sae="none")
    assert args.initial_sae is None
    assert args.lr_scheduler_type == "constant"
    assert args.max_grad_norm == 0
    assert args.learning_rate_for(65_536) == pytest.approx(2.5e-3)  # the released run's
    assert args.learning_rate_for(16_384) == pytest.approx(5e-3)
    adam = SAETrainingConfig(output_dir=str(tmp_path), sae_optimizer="adam")
    assert adam.learning_rate_for(65_536) == pytest.approx(1e-4)
    if not torch.accelerator.is_available():
        assert args.use_cpu
        assert not args.bf16
    copied = SAETrainingConfig(**{name: getattr(args, name) for name in ("output_dir", "hookpoints", "optim")})
    assert copied.hookpoints == ["12"]


def test_command_line_and_yaml(tmp_path: Path) -> None:
    from trl import TrlParser

    path = tmp_path / "sae.yaml"
    path.write_text("hookpoints: [1, layers.2]\nk: 8\ninitial_sae: 'null'\nlearning_rate: 1.0e-3\n")
    (args,) = TrlParser([SAETrainingConfig]).parse_args_and_config(
        ["--config", str(path), "--output_dir", str(tmp_path), "--k", "16", "--initial_sae", "none"]
    )
    assert args.hookpoints == ["1", "layers.2"]
    assert (args.k, args.learning_rate, args.initial_sae) == (16, 1e-3, None)
    path.write_text("sae_optimizer: lion\n")
    with pytest.raises(ValueError, match="not 'lion'"):
        TrlParser([SAETrainingConfig]).parse_args_and_config(["--config", str(path), "--output_dir", str(tmp_path)])


TWO_PROCESSES = """
import sys
import torch
from conftest import _make_model
from resa_hf.sae.trainer import SAETrainer
from test_sae_trainer import config, rows

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


@pytest.mark.slow
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


def test_weights_on_disk_are_those_in_memory(model: nn.Module, tmp_path: Path) -> None:
    trainer = train(model, config(tmp_path))
    trainer.save_model()
    stored = load_file(tmp_path / "layers.1" / "sae_weights.safetensors")
    assert same(stored, {name: tensor.contiguous() for name, tensor in trainer.saes["layers.1"].state_dict().items()})
