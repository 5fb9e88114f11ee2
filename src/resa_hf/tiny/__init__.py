"""The tiny reasoner: a Qwen2 model of about 1M parameters, its source model, and the task they solve.

Both ship in the package, so that the whole method runs without network, GPU or account. `resa_hf.tiny.build` makes
them again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_tiny_base", "load_tiny_source", "load_tiny_tokenizer", "tiny_path"]


def tiny_path(which: Literal["base", "source"]) -> Path:
    """Where the shipped weights lie.

    Args:
        which (`str`): `"base"`, a full model with its tokenizer, or `"source"`, a PEFT LoRA adapter on that base.

    Returns:
        `Path`: a folder that `AutoModelForCausalLM.from_pretrained` or `PeftModel.from_pretrained` reads.

    Raises:
        `ValueError`: for any other name.
    """
    if which not in ("base", "source"):
        raise ValueError(f"the tiny reasoner ships 'base' and 'source', got {which!r}")
    return Path(__file__).parent / "weights" / which


def load_tiny_base(dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load the base, which reasons only sometimes.

    Args:
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): the weights are stored in bfloat16.

    Returns:
        `PreTrainedModel`: a `Qwen2ForCausalLM` on CPU, in evaluation mode.
    """
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_path("base"), dtype=dtype or torch.float32)


def load_tiny_source(dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load the source: the base with the adapter that GRPO trained merged into it.

    Args:
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): the weights are stored in bfloat16.

    Returns:
        `PreTrainedModel`: a plain `Qwen2ForCausalLM` on CPU, in evaluation mode.
    """
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load_tiny_base(dtype), str(tiny_path("source")))
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


def load_tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Load the tokenizer that base and source share."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_path("base"))
