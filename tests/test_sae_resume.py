"""Stage I: what is saved, that a resumed run is the unbroken one, and starting from a given SAE."""

import json
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from conftest import ModelFactory
from sae_reference import HOOKPOINTS, LATENTS, LENGTH, K, config, logged, rows, same, train, weights
from safetensors.torch import load_file, save_file
from torch import nn

from resa_hf.errors import IncompatibleSAEError
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.checkpoint import load_sae, save_sae
from resa_hf.sae.trainer import SAETrainer


@pytest.fixture
def model(make_model: ModelFactory) -> nn.Module:
    return make_model("qwen2")


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


def test_resuming_from_what_does_not_fit_is_refused(model: nn.Module, tmp_path: Path) -> None:
    train(model, config(tmp_path, save_strategy="steps", save_steps=6))
    checkpoint = tmp_path / "checkpoint-6"
    with pytest.raises(IncompatibleSAEError, match=r"48 latents.*96"):
        SAETrainer(model, config(tmp_path, num_latents=96), rows(24)).train(str(checkpoint))
    save_file({"tokens_seen": torch.tensor(1)}, checkpoint / "sae_progress.safetensors")
    with pytest.raises(IncompatibleSAEError, match="cannot resume"):
        SAETrainer(model, config(tmp_path), rows(24)).train(str(checkpoint))


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
    states |= {"files.json"}
    assert names == expected | states


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


def test_weights_on_disk_are_those_in_memory(model: nn.Module, tmp_path: Path) -> None:
    trainer = train(model, config(tmp_path))
    trainer.save_model()
    stored = load_file(tmp_path / "layers.1" / "sae_weights.safetensors")
    assert same(stored, {name: tensor.contiguous() for name, tensor in trainer.saes["layers.1"].state_dict().items()})


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
