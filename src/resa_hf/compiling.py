"""torch.compile for decoder layers one by one, so that hooks on a layer, and what replaces its forward, always act.

A model compiled as a whole keeps the hooks of its first forward and ignores in silence those that come or go later:
here the SAE, the captured activations and the shared prefix.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, TorchDynamoPlugin
from torch import nn

from .hookpoints import decoder_layers, layer_index, resolve_hookpoint

# Graphs of one class of layer: teacher, student and evaluation, the first layer and the others, sliding and full
# attention, one length and any. At torch's own limit of 8, layers go on uncompiled, with no more than a warning.
_GRAPHS = 64
_CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


class LayerCompiler:
    """
    Compiles the decoder layers of models while a block runs them; outside of it the models are as they were.

    It takes the place of accelerate's own compilation, as `torch_compile`, `torch_compile_backend` and
    `torch_compile_mode` or `accelerate launch` ask for it, and does nothing where they do not.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's, which is told not to compile what it prepares.
        models (sequence of `torch.nn.Module`):
            Causal LMs, plain or wrapped.
        hookpoints (sequence of `int` or `str`):
            A layer that holds one of them inside (`layers.12.mlp`) stays uncompiled. Hooks on a layer itself run
            outside of its compiled forward.

    Raises:
        `ValueError`: if the backend cannot compile on this machine, or keeps its results where the next run of a layer
        overwrites them; under DeepSpeed.
    """

    def __init__(self, accelerator: Accelerator, models: Sequence[nn.Module], hookpoints: Sequence[int | str]) -> None:
        self._layers: list[nn.Module] = []
        self._compiled: dict[type[nn.Module], type[nn.Module]] = {}
        plugin: TorchDynamoPlugin = accelerator.state.dynamo_plugin
        if plugin.backend == DynamoBackend.NO:
            return
        self._options = {"recompile_limit": _GRAPHS, "isolate_recompiles": True, **plugin.to_kwargs()}
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError("torch_compile does not work with DeepSpeed here: switch one of the two off.")
        _check(self._options, accelerator.device)
        accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
        for model in models:
            path, layers = decoder_layers(model)
            names = [resolve_hookpoint(model, hookpoint) for hookpoint in hookpoints]
            inside = {layer_index(model, name) for name in names if name.count(".") > path.count(".") + 1}
            self._layers += [layer for index, layer in enumerate(layers) if index not in inside]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside the block the layers run compiled."""
        with ExitStack() as stack:
            for layer in self._layers:
                # By its class and not by an attribute: that of a copied model would still run the layer copied from.
                own = type(layer)
                stack.callback(setattr, layer, "__class__", own)
                layer.__class__ = self._compiled_class(own)
            yield

    def _compiled_class(self, own: type[nn.Module]) -> type[nn.Module]:
        # Not before the first step: FSDP2 gives layers another class after the trainer was made.
        if own not in self._compiled:
            compiled = torch.compile(own.forward, **self._options)

            # Transformers wraps gradient checkpointing round the forward of each subclass, so it stays outside of the
            # compiled region. It must not find the marks that torch.compile leaves on its result.
            def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return compiled(layer, *args, **kwargs)

            self._compiled[own] = type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__})
        return self._compiled[own]


def _check(options: dict[str, Any], device: torch.device) -> None:
    """Compiles next to nothing, to see before training whether the machine can."""
    backend, mode = options["backend"], options.get("mode")
    if backend == "cudagraphs" or mode in _CUDA_GRAPH_MODES:
        raise ValueError(
            f"torch_compile_backend is {backend!r} and torch_compile_mode {mode!r}: with CUDA graphs the student's "
            "run of a layer would overwrite the teacher's. Use the backend 'inductor', with no mode or with "
            "'max-autotune-no-cudagraphs'."
        )
    try:
        torch.compile(lambda x: x.sin() + 1, **options)(torch.ones(8, device=device))
    except Exception as error:
        raise ValueError(
            f"torch_compile: the backend {backend!r} cannot compile on this machine ({str(error).splitlines()[0]}). "
            "'inductor' needs a C++ compiler (on Debian and Ubuntu: apt install g++), and Triton on a GPU. Or leave "
            "torch_compile off."
        ) from error
