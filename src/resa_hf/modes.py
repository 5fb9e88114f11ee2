"""Running a model in evaluation mode, or without its adapters, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout and gradient checkpointing off inside the block; each submodule then gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class AdapterSwitch:
    """
    `PeftModel.disable_adapter` for every step, for forwards without gradient: PEFT's asks each time for the state of
    every layer, which takes longer than some models do. And it takes `requires_grad` from the adapters for a while,
    which FSDP2 would keep for ever if it happened at its first forward, so PEFT's own flag is set here (peft 0.21 has
    no public name for it alone).

    Args:
        model (`torch.nn.Module`): a model whose adapters are on.
    """

    def __init__(self, model: nn.Module) -> None:
        switched = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        self._layers = [module for module in model.modules() if isinstance(module, switched)]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Without adapters inside the block."""
        for layer in self._layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._layers:
                layer._disable_adapters = False
