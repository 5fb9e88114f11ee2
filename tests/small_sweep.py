"""A sweep's recipe on the tiny reasoner that runs in seconds."""

from pathlib import Path
from typing import Any

import yaml


def recipe(output: Path, **changes: Any) -> dict[str, Any]:
    """Two steps a stage, eight questions; `changes` are fields at the top or whole sections."""
    content: dict[str, Any] = {
        "model_name_or_path": "resa_hf/tiny/base", "source_model": "resa_hf/tiny/source", "dtype": "float32",
        "lora_r": 4, "dataset": "tiny-reasoner", "limit": 60, "held_out": 8, "template": "chat", "pack": False,
        "seeds": [0], "output_dir": str(output),
        "stage1": {"hookpoints": ["layers.2"], "num_latents": 64, "k": 4, "sae_optimizer": "adam",
                   "learning_rate": 1e-3, "max_length": 64, "max_steps": 3},
        "stage2": {"learning_rate": 1e-3, "max_length": 64, "max_steps": 2},
        "sampling": {"temperature": 1.0, "max_new_tokens": 24, "batch_size": 8},
        "arms": {"SAE-Tuning": {}},
    }  # fmt: skip
    return content | changes


def write(path: Path, content: dict[str, Any]) -> Path:
    """The recipe as a file."""
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
