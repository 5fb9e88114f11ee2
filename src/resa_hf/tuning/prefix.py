"""Running the layers up to the hookpoint once for teacher and student, where both would compute the same there.

With the gradient stopped at the SAE, adapters at or below a decoder-layer hookpoint stay at zero, so teacher and
student share their prefix exactly. The student's prefix layers are made to hand the teacher's state through, which
leaves masks, position embeddings and the layers above to the model's own code.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..hookpoints import backbone, capture, decoder_layers
from ..modes import evaluating
from .insertion import Insertion


@contextmanager
def passing_through(model: nn.Module, last_layer: int, state: torch.Tensor) -> Iterator[None]:
    """Makes layers 0 to `last_layer` return `state` `[batch, tokens, d_model]` without running."""
    _, layers = decoder_layers(model)

    def hand_through(*args: Any, **kwargs: Any) -> torch.Tensor:
        return state

    with ExitStack() as stack:
        for layer in list(layers)[: last_layer + 1]:
            own = layer.__dict__.get("forward")
            undo = (layer.__dict__.pop, "forward") if own is None else (setattr, layer, "forward", own)
            stack.callback(*undo)
            layer.forward = hand_through
        yield


@torch.no_grad()
def prefix_is_exact(model: nn.Module, insertion: Insertion, last_layer: int, batch: dict[str, Any]) -> bool:
    """Whether the student's prefix gives the base model's state to the bit, and the layers above need nothing else.

    Tried on the batch at hand: once in the present mode (so active dropout shows), once in evaluation mode with and
    without the pass-through (so that an architecture whose upper layers read more than the hidden state shows).
    Nothing runs compiled: two compiled graphs of the same layer may differ in the last bit.
    """
    path, _ = decoder_layers(model)
    name = f"{path}.{last_layer}"
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=device.type))
        # Without the insertion: what is asked is whether the layers agree, and a control may draw noise.
        stack.enter_context(insertion.off())
        base = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
        with evaluating(model), base, capture(model, [name], stop_after_last=True) as activations:
            backbone(model)(**batch)
            state = activations[name]
        with capture(model, [name], stop_after_last=True) as activations:
            backbone(model)(**batch)
        if not torch.equal(activations[name], state):
            return False
        with evaluating(model):
            plain = backbone(model)(**batch).last_hidden_state
            try:
                with passing_through(model, last_layer, state):
                    shared = backbone(model)(**batch).last_hidden_state
            except Exception:  # a layer above lacks what one below keeps for it, as Gemma3n's keys and values
                return False
    return torch.equal(plain, shared)
