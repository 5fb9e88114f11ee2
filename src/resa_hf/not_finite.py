"""The weight that makes everything behind it NaN or infinite, looked for once something is."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def broken_weight(modules: Iterable[nn.Module]) -> str | None:
    """
    Args:
        modules (iterable of `torch.nn.Module`): whose parameters are looked at, in their order.

    Returns:
        `str` or `None`: a sentence about the first that has a number which is NaN or infinite.
    """
    for module in modules:
        for name, parameter in module.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
            if not torch.isfinite(local).all():
                return f"the weight {name} of {type(module).__name__} has numbers that are NaN or infinite"
    return None


def cause_of_logits(model: PreTrainedModel) -> str:
    """Why a model gives logits that are NaN or infinite, as the end of a sentence."""
    return broken_weight([model]) or f"all weights are finite, so that activations overflow in {model.dtype}"
