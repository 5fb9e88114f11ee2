"""The device and the training precision that the machine at hand can run."""

import torch
from transformers.utils import is_torch_bf16_gpu_available


def runnable_precision(bf16: bool | None, fp16: bool, use_cpu: bool) -> dict[str, bool]:
    """Settles `bf16` and `use_cpu` before `TrainingArguments` checks them.

    TRL's default is bf16 wherever fp16 is not asked for, which raises on a machine without an accelerator, and
    `use_cpu` alone would turn bf16 autocast on there.

    Args:
        bf16 (`bool` or `None`): as asked; `None` means bf16 where the accelerator has it, never on CPU.
        fp16 (`bool`): as asked.
        use_cpu (`bool`): as asked; becomes `True` where there is no accelerator.

    Returns:
        `dict[str, bool]`: `bf16` and `use_cpu`.
    """
    use_cpu = use_cpu or not torch.accelerator.is_available()
    if bf16 is None:
        bf16 = not fp16 and not use_cpu and is_torch_bf16_gpu_available()
    return {"bf16": bf16, "use_cpu": use_cpu}


def runnable_device(use_cpu: bool = False) -> torch.device:
    """The accelerator, if there is one and it is not refused; otherwise the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if use_cpu or accelerator is None else accelerator
