"""The tiny reasoner as a workbench offers it, and adapters merged into it by hand."""

import json
from pathlib import Path

from safetensors.torch import load_file
from transformers import PreTrainedModel

from resa_hf.tiny import tiny_path

LOCAL = {"tiny": "resa_hf/tiny/base", "source": "resa_hf/tiny/source"}


def merged(base: PreTrainedModel, strength: float, folder: Path | None = None) -> PreTrainedModel:
    """Adds strength * alpha / r * B @ A to each weight that the adapter has an update of; the source's by default."""
    folder = folder or tiny_path("source")
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")]
            update = b.float() @ a.float() * config["lora_alpha"] / config["r"]
            base.get_submodule(module).weight.data += strength * update
    return base
