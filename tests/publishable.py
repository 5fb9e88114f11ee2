"""What there is to publish in tests: the output of a real run, as small as can be, and a plain adapter.

A test module takes these fixtures by `pytest_plugins = ("publishable",)`.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelFactory
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from resa_hf.cli import main

RECIPE = {
    "model_name_or_path": "resa_hf/tiny/base",
    "source_model": "resa_hf/tiny/source",
    "dtype": "float32",
    "dataset": "tiny-reasoner",
    "template": "chat",
    "limit": 40,
    "held_out": 6,
    "lora_r": 4,
    "lora_alpha": 32,
    "stage1": {"hookpoints": ["layers.1", "layers.2"], "num_latents": 256, "k": 8, "max_length": 64},
    "stage2": {
        "max_length": 64,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "sae_id": "layers.1",
    },
    "sampling": {"max_new_tokens": 4},
}


def train_run(folder: Path) -> Path:
    """`resa-hf run` with one arm and one seed; the output folder. A token is in the report's settings."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({**RECIPE, "output_dir": str(folder / "out")}))  # JSON is YAML
    assert main(["run", "--config", str(recipe)]) == 0
    path = folder / "out" / "report.json"
    report = json.loads(path.read_text())
    report["settings"]["stage2"]["hub_token"] = "hf_secret"
    path.write_text(json.dumps(report))
    return folder / "out"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such an output folder. Copy it before writing into it."""
    return train_run(tmp_path_factory.mktemp("tiny_run"))


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of it, to write into."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


@pytest.fixture
def adapter(make_model: ModelFactory, tmp_path: Path) -> Callable[..., Path]:
    """Writes a plain adapter of `you/base`, with random weights."""

    def write(name: str = "plain", seed: int = 0, base: str = "you/base", **config: Any) -> Path:
        model = make_model("qwen2")
        model.name_or_path = model.config._name_or_path = base
        settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}
        get_peft_model(model, LoraConfig(**settings)).save_pretrained(tmp_path / name)
        weights = tmp_path / name / "adapter_model.safetensors"
        noise = torch.Generator().manual_seed(seed)
        save_file({key: torch.randn(t.shape, generator=noise) for key, t in load_file(weights).items()}, weights)
        return tmp_path / name

    return write
