"""Where in a model an SAE reads and writes: name a hookpoint, capture its activations, splice a module into it.

Hookpoints are spelled relative to the bare backbone, as sparsify does (`layers.12`, `layers.12.mlp`; `h.12` on GPT-2).
Everything here is a context manager whose hooks are gone when the block ends, also after an exception.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import HookpointError, IncompatibleSAEError

_LENS_NAME = re.compile(r"blocks\.(\d+)\.hook_(resid_post|resid_pre|mlp_out|attn_out)")


class _ForwardStopped(Exception):
    """Raised by `capture` behind the deepest hookpoint; never leaves this module."""


def causal_lm(model: nn.Module) -> nn.Module:
    """The bare causal LM inside DDP and PEFT wrappers. Its own `lm_head` and `config` are there."""
    while isinstance(model, DistributedDataParallel | PeftModel):
        model = model.module if isinstance(model, DistributedDataParallel) else model.get_base_model()
    return model


def backbone(model: nn.Module) -> nn.Module:
    """The decoder without its LM head (`model.model` on Qwen2, `model.transformer` on GPT-2)."""
    inner = causal_lm(model)
    prefix: str = getattr(inner, "base_model_prefix", "")  # every PreTrainedModel has it; other modules may not
    return getattr(inner, prefix) if prefix in dict(inner.named_children()) else inner


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path of the decoder layer list relative to the backbone, and the list itself.

    Raises:
        `HookpointError`: if the model has no such list.
    """
    inner = backbone(model)
    count: int | None = getattr(getattr(inner, "config", None), "num_hidden_layers", None)
    # Nearly always a child of the backbone; a walk through all modules would cost a training step some milliseconds.
    for modules in (inner.named_children(), inner.named_modules()):
        lists = [(name, child) for name, child in modules if isinstance(child, nn.ModuleList) and len(child)]
        lists = [(name, child) for name, child in lists if count is None or len(child) == count]
        if lists:
            return min(lists, key=lambda item: item[0].count("."))
    raise HookpointError(f"{type(inner).__name__} has no list of decoder layers, so it has no hookpoints.")


def resolve_hookpoint(model: nn.Module, hookpoint: int | str) -> str:
    """Returns the canonical spelling of a hookpoint, relative to the bare backbone.

    Args:
        model (`torch.nn.Module`):
            A causal LM of any architecture with a decoder layer list: plain, PEFT-wrapped or DDP-wrapped.
        hookpoint (`int` or `str`):
            `12`, `"12"`, `"layers.12"`, `"model.layers.12"`, `"layers.12.mlp"`, or sae-lens'
            `"blocks.12.hook_resid_post"`,
            `"blocks.12.hook_resid_pre"` (the output of layer 11), `"blocks.12.hook_mlp_out"`,
            `"blocks.12.hook_attn_out"`.

    Returns:
        `str`: for example `"layers.12"`.

    Raises:
        `HookpointError`: if the model has no such hookpoint; the message lists the valid ones.
    """
    path, layers = decoder_layers(model)
    if isinstance(hookpoint, bool) or not isinstance(hookpoint, int | str):
        raise _unknown(hookpoint, path, layers)
    spelled = _from_lens(str(hookpoint).strip(), path, layers)
    index, _, inside = _relative(spelled, model, path).partition(".")
    if not re.fullmatch(r"\d+", index, re.ASCII) or int(index) >= len(layers):
        raise _unknown(hookpoint, path, layers)
    # A name that ends in a dot would find the layer itself.
    if spelled.endswith(".") or (inside and inside not in dict(layers[int(index)].named_modules())):
        raise _unknown(hookpoint, path, layers)
    return f"{path}.{int(index)}" + (f".{inside}" if inside else "")


def hooked_module(model: nn.Module, hookpoint: int | str) -> nn.Module:
    """The module whose output is the hookpoint."""
    return backbone(model).get_submodule(resolve_hookpoint(model, hookpoint))


def layer_index(model: nn.Module, hookpoint: int | str) -> int:
    """The number of the decoder layer that the hookpoint is, or lies in."""
    path, _ = decoder_layers(model)
    return int(resolve_hookpoint(model, hookpoint).removeprefix(f"{path}.").partition(".")[0])


def _relative(spelled: str, model: nn.Module, path: str) -> str:
    """Cuts whatever stands before the layer number; `layers` names the list on every architecture."""
    inner = causal_lm(model)
    prefix: str = getattr(inner, "base_model_prefix", "")
    for start in (f"{prefix}.{path}.", f"{path}.", "model.layers.", "layers."):
        if spelled.startswith(start):
            return spelled.removeprefix(start)
    return spelled


def _from_lens(spelled: str, path: str, layers: nn.ModuleList) -> str:
    match = _LENS_NAME.fullmatch(spelled)
    if match is None:
        return spelled
    index, kind = int(match[1]), match[2]
    if kind == "resid_post":
        return f"{path}.{index}"
    if kind == "resid_pre":
        return f"{path}.{index - 1}"
    names = ("mlp",) if kind == "mlp_out" else ("self_attn", "attn", "attention")
    children = dict(layers[0].named_children())
    if "post_feedforward_layernorm" in children:  # Gemma 2 and 3, OLMo 2: sae-lens hooks what is added to the residual
        names = ("post_feedforward_layernorm",) if kind == "mlp_out" else ("post_attention_layernorm",)
    return f"{path}.{index}." + next((name for name in names if name in children), kind)


def _unknown(hookpoint: object, path: str, layers: nn.ModuleList) -> HookpointError:
    children = ", ".join(f"{path}.N.{name}" for name, _ in layers[0].named_children())
    return HookpointError(
        f"Unknown hookpoint {hookpoint!r}. Valid: {path}.0 to {path}.{len(layers) - 1} (or just the number), "
        f"and what lies inside a layer: {children}."
    )


def hidden_states(output: Any) -> torch.Tensor:
    """The hidden states in a module's output: the tensor itself, or the first entry of a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def capture(
    model: nn.Module, hookpoints: Sequence[int | str], stop_after_last: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """Collects the activations at hookpoints while the block runs the model.

    Args:
        model (`torch.nn.Module`):
            The causal LM, plain or wrapped.
        hookpoints (sequence of `int` or `str`):
            In any spelling that `resolve_hookpoint` takes.
        stop_after_last (`bool`, *optional*, defaults to `False`):
            End each forward behind the deepest hookpoint. That forward returns `None`; the block goes on.

    Yields:
        `dict[str, torch.Tensor]`: canonical hookpoint -> activations `[batch, tokens, d_in]` in the model's dtype,
        still in the autograd graph if there is one. Filled anew at each forward.

    Raises:
        `HookpointError`: if a hookpoint is unknown, or none is given.
    """
    names = list(dict.fromkeys(resolve_hookpoint(model, hookpoint) for hookpoint in hookpoints))
    if not names:
        raise HookpointError("No hookpoint given; at least one is needed.")
    inner = backbone(model)
    activations: dict[str, torch.Tensor] = {}
    running = False  # the recomputation of gradient checkpointing, in the backward, must not overwrite anything

    def begin(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal running
        running = True
        activations.clear()

    def end(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal running
        running = False

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not running:
                return
            activations[name] = hidden_states(output)
            if stop_after_last and len(activations) == len(names):
                raise _ForwardStopped

        return hook

    with ExitStack() as stack:
        if stop_after_last:
            stack.enter_context(_catching_stop(model))
        handles = [inner.register_forward_pre_hook(begin), inner.register_forward_hook(end, always_call=True)]
        handles += [inner.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        for handle in handles:
            stack.callback(handle.remove)
        yield activations


@contextmanager
def _catching_stop(model: nn.Module) -> Iterator[None]:
    """Ends a stopped forward at the outermost module that the caller called, whichever wrapper that is."""
    chain = [model]
    while isinstance(chain[-1], DistributedDataParallel | PeftModel):
        last = chain[-1]
        chain.append(last.module if isinstance(last, DistributedDataParallel) else last.get_base_model())
    chain.append(backbone(model))
    depth = 0

    def catching(forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                return forward(*args, **kwargs)
            except _ForwardStopped:
                if depth > 1:
                    raise
                return None
            finally:
                depth -= 1

        return wrapped

    with ExitStack() as stack:
        for module in dict.fromkeys(chain):
            # `forward` on the instance may be somebody else's wrapper (accelerate's, TRL's): put back what was there.
            own = module.__dict__.get("forward")
            undo = (module.__dict__.pop, "forward") if own is None else (setattr, module, "forward", own)
            stack.callback(*undo)
            module.forward = catching(module.forward)
        yield


@contextmanager
def splice(model: nn.Module, hookpoint: int | str, module: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Passes the activations at a hookpoint through `module` while the block runs the model.

    Args:
        model (`torch.nn.Module`):
            The causal LM, plain or wrapped.
        hookpoint (`int` or `str`):
            In any spelling that `resolve_hookpoint` takes.
        module (`torch.nn.Module` or callable):
            Maps `[..., d_in]` to `[..., d_in]`. Its output is cast to the dtype of its input. It must not change
            between a forward and its backward: gradient checkpointing may run it again.

    Raises:
        `HookpointError`: if the hookpoint is unknown.
        `IncompatibleSAEError`: if the module's output has another shape than its input.
    """

    def hook(hooked: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        before = hidden_states(output)
        after = module(before)
        if after.shape != before.shape:
            raise IncompatibleSAEError(
                f"What is spliced into {hookpoint!r} maps {tuple(before.shape)} to {tuple(after.shape)}; "
                "it must keep the shape."
            )
        after = after.to(before.dtype)
        return (after, *output[1:]) if isinstance(output, tuple) else after

    handle = hooked_module(model, hookpoint).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
