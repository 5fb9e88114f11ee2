"""Weights that FSDP2 or ZeRO-3 spread over processes, made whole where they are read outside of a model's forward."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled

from ..trl_internals import maybe_gather_lm_head_ctx
from .config import SAETuningConfig
from .loss import LMHead


def weights_are_spread(accelerator: Accelerator) -> bool:
    """Whether a process holds only a part of each weight between two forwards."""
    zero3 = accelerator.distributed_type == DistributedType.DEEPSPEED and is_deepspeed_zero3_enabled()
    return accelerator.distributed_type == DistributedType.FSDP or zero3


def check_spreading(args: SAETuningConfig, accelerator: Accelerator) -> None:
    """
    Refuses what cannot be done with weights that are spread over processes.

    Raises:
        `ValueError`: for FSDP1, for a model that one process has alone until training begins, for a source as the
            teacher under ZeRO-3, and for a teacher cache.
    """
    if not weights_are_spread(accelerator):
        return
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version is {plugin.fsdp_version}, and SAE-Tuning runs under FSDP2: set it to 2.")
    if plugin is not None and plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading leaves all processes but the first without weights until training "
            "begins, and SAE-Tuning tries the SAE on them before: set it to false."
        )
    if plugin is None and args.kl_reference == "source":
        raise ValueError(
            "kl_reference: source does not run under ZeRO-3, which would spread the source's weights, too: take "
            "ZeRO-2, FSDP2 or DDP, where each process holds the whole source."
        )
    if args.teacher_cache is not None:
        raise ValueError(
            "teacher_cache is known by the whole weights, which no process has under FSDP2 and ZeRO-3: leave it out, "
            "or take DDP or ZeRO-2."
        )


def whole_weights(model: Any) -> AbstractContextManager[None]:
    """
    All weights of a model whole inside the block, if transformers loaded it in parts, as it does under ZeRO-3; what is
    changed in them is kept.

    Args:
        model (`str` or `torch.nn.Module`): a name stands for nothing loaded yet.
    """
    if not isinstance(model, nn.Module) or not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    parts = [parameter for parameter in model.parameters() if is_zero_param(parameter)]
    gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(parts, modifier_rank=0)
    return gathered


@contextmanager
def whole_head(head: LMHead, layer: nn.Module) -> Iterator[LMHead]:
    """
    The head as [`~resa_hf.tuning.loss.frozen_head`] read it, with the weights that its layer has by now: those that it
    was read with are copies of the whole once training has begun.

    Args:
        head ([`~resa_hf.tuning.loss.LMHead`]): with weights to be replaced.
        layer (`torch.nn.Linear`): the LM head itself, whose weight may be spread over processes.
    """
    weight: Any = layer.weight
    bias: Any = layer.bias
    with maybe_gather_lm_head_ctx(weight, bias):
        yield replace(head, weight=whole(weight), bias=whole(bias))


def whole(tensor: Any) -> Any:
    """A tensor as one process would have it, if it is spread over processes as a DTensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
