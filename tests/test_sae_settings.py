"""Stage I: the data, hookpoints and settings it takes, and those it refuses."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelFactory
from datasets import Dataset
from sae_reference import LENGTH, config, rows
from torch import nn

from resa_hf.errors import DataError, HookpointError
from resa_hf.sae.config import SAETrainingConfig
from resa_hf.sae.trainer import SAETrainer


@pytest.fixture
def model(make_model: ModelFactory) -> nn.Module:
    return make_model("qwen2")


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
