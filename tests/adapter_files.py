"""Small LoRA adapters on disk, and what a model says."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

IDS = torch.tensor([[5, 17, 3, 41, 8, 60, 9], [7, 2, 55, 23, 11, 30, 4]])


def save_adapter(folder: Path, base: PreTrainedModel, seed: int = 0, **settings: Any) -> Path:
    """A random LoRA of every linear layer but the head, as a trainer would save it."""
    settings = {
        "r": 4,
        "lora_alpha": 10,
        "target_modules": "all-linear",
        "fan_in_fan_out": base.config.model_type == "gpt2",
    } | settings
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        peft = get_peft_model(copy.deepcopy(base), LoraConfig(init_lora_weights=False, **settings))
        peft.save_pretrained(folder)
    return folder


def logits(model: PreTrainedModel | PeftModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits
