"""4-bit weights (NF4) by bitsandbytes, for cards that do not hold a model in bfloat16."""

from importlib.util import find_spec

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from .precision import runnable_precision

# Of a weight in NF4: half a byte, and a float32 scale for each 64 weights.
NF4_BYTES = 0.5 + 4 / 64


def nf4_config() -> BitsAndBytesConfig:
    """NF4 for the linear layers; embeddings, norms and the LM head, from which the KL is made, stay as they are.

    Products are computed in bfloat16 where the accelerator has it, otherwise in float32.

    Raises:
        `ValueError`: if bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit needs bitsandbytes: pip install 'resa-hf[quant]'.")
    bf16 = runnable_precision(None, False, False)["bf16"]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
    )


def keep_layout(model: nn.Module) -> None:
    """Forbids bitsandbytes to repack weights for the CPU.

    With AVX512-BF16 it does so in the first forward without gradient, an evaluation or a teacher; the backward reads
    the repacked bytes as if they were not, and gradients are wrong in silence.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def is_in_4bit(model: nn.Module) -> bool:
    """Whether a linear layer of the model is bitsandbytes' 4-bit one."""
    if find_spec("bitsandbytes") is None:
        return False
    from bitsandbytes.nn import Linear4bit

    return any(isinstance(module, Linear4bit) for module in model.modules())


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes a 4-bit model compute in `dtype`, in place: its other weights are cast, the 4-bit ones stay."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def adapter_in_float32(model: nn.Module) -> None:
    """Gives the adapter on a 4-bit model the precision that it has on any other.

    TRL casts it to bfloat16 there, where steps of 1e-6 are rounded away as soon as a weight exceeds 2.6e-4.
    """
    if not is_in_4bit(model):
        return
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
