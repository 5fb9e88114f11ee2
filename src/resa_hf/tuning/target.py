"""The model that Stage II trains, as it is given to TRL."""

from typing import Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from ..arguments import LoraArguments
from ..models import load_causal_lm
from .config import SAETuningConfig


def load_target(model: str | PreTrainedModel | PeftModel, args: SAETuningConfig) -> PreTrainedModel | PeftModel:
    """The target by its name, or as it is given; a base with an adapter that is not trainable is merged."""
    if isinstance(model, str):
        kwargs: dict[str, Any] = {"dtype": "float32", **(args.model_init_kwargs or {})}  # type: ignore[dict-item]
        return load_causal_lm(model, **kwargs)
    if isinstance(model, PeftModel) and not any(parameter.requires_grad for parameter in model.parameters()):
        merged = model.merge_and_unload()
        # What is trained on it does not fit the base alone, and its adapter_config.json must not say so.
        merged.config._name_or_path = merged.name_or_path = f"{merged.name_or_path}+merged adapter"
        return merged
    return model


def own_config(peft_config: PeftConfig | None) -> PeftConfig:
    """A copy, since TRL writes into the config that it is given; `None` means the released code's LoRA."""
    if peft_config is None:
        return LoraArguments().lora_config()
    return type(peft_config)(**peft_config.to_dict())
