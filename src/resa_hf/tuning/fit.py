"""Whether an SAE fits the model and the hookpoint, found out before any training."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.utils import send_to_device
from torch import nn

from ..errors import IncompatibleSAEError
from ..hookpoints import backbone, capture, decoder_layers, hooked_module, resolve_hookpoint
from ..modes import evaluating
from ..sae.checkpoint import load_sae
from .config import SAETuningConfig
from .insertion import fvu_of, fvu_sums


@runtime_checkable
class DescribedSAE(Protocol):
    """An SAE that says where it was trained, as `load_sae` returns it."""

    d_in: int
    hookpoint: str | None
    metadata: dict[str, Any]


@dataclass
class PlacedSAE:
    """An SAE and its place in the model.

    Attributes:
        module (`torch.nn.Module`): maps `[..., d_in]` to `[..., d_in]`.
        hookpoint (`str`): canonical.
        mismatch (`str` or `None`): the SAE's own hookpoint, where that is another one.
        hands_tensor_through (`bool`): the hookpoint is a whole decoder layer that returns a tensor.
        special_tokens (`torch.Tensor` or `None`): ids `[n]` at which positions pass the SAE untouched.
    """

    module: nn.Module
    hookpoint: str
    mismatch: str | None
    hands_tensor_through: bool
    special_tokens: torch.Tensor | None = None

    def special_positions(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """`[batch, tokens]` -> `[batch, tokens]`, True where a position passes untouched; `None` if none ever does."""
        if self.special_tokens is None:
            return None
        return torch.isin(input_ids, self.special_tokens.to(input_ids.device))


def place_sae(model: nn.Module, args: SAETuningConfig, sae: str | nn.Module | None) -> PlacedSAE | None:
    """Loads the SAE if need be, settles its hookpoint, and tries it on a few tokens.

    Raises:
        `HookpointError`: if the model has no such hookpoint.
        `IncompatibleSAEError`: if the SAE is of another width, or of another hookpoint and that is not allowed.
        `ValueError`: if `sae` and `args.sae` disagree.
    """
    module = _agreed(sae, "SAE", args.sae, args.sae_id, args.sae_revision, args.sae_dtype)
    if module is None:
        return None
    own = module.hookpoint if isinstance(module, DescribedSAE) else None
    wanted = own if args.hookpoint is None else args.hookpoint
    if wanted is None:
        raise IncompatibleSAEError("The SAE does not say where it was trained: set `hookpoint`.")
    hookpoint = resolve_hookpoint(model, wanted)
    mismatch = own if own is not None and resolve_hookpoint(model, own) != hookpoint else None
    if mismatch is not None and not args.allow_hookpoint_mismatch:
        raise IncompatibleSAEError(
            f"The SAE was trained on {mismatch!r} and is to be spliced into {hookpoint!r}, whose activations it does "
            "not know. Set `hookpoint` to its own, take another SAE, or set `allow_hookpoint_mismatch: true`."
        )
    path, _ = decoder_layers(model)
    returns_tensor = _try(model, module, hookpoint)
    whole_layer = hookpoint.removeprefix(f"{path}.").isdigit()
    module.requires_grad_(False).eval()
    return PlacedSAE(module, hookpoint, mismatch, whole_layer and returns_tensor)


def load_control_sae(
    model: nn.Module, args: SAETuningConfig, placed: PlacedSAE, control_sae: str | nn.Module | None
) -> nn.Module | None:
    """Loads the SAE that stands in for the SAE, if the control takes one.

    Raises:
        `HookpointError`: if the model has no such hookpoint as it was trained on.
        `IncompatibleSAEError`: if it is of another width, or of a hookpoint that the control is not made for.
        `ValueError`: if `control_sae` and `args.control_sae` disagree.
    """
    other = _agreed(control_sae, "control SAE", args.control_sae, args.control_sae_id, None, args.sae_dtype)
    if other is None:
        return None
    if not isinstance(other, DescribedSAE) or other.hookpoint is None:
        raise IncompatibleSAEError("The control SAE does not say where it was trained.")
    _try(model, other, placed.hookpoint, "control SAE")
    own, wanted = (resolve_hookpoint(model, at) for at in (other.hookpoint, placed.mismatch or placed.hookpoint))
    if (own == wanted) == (args.control == "other_layer"):
        right = f"another hookpoint than {wanted!r}" if own == wanted else f"{wanted!r}, as the SAE"
        raise IncompatibleSAEError(
            f"The control SAE was trained on {own!r}; control: {args.control} needs one trained on {right}."
        )
    return other


def _agreed(
    given: str | nn.Module | None, kind: str, name: str | None, sae_id: str | None, revision: str | None, dtype: str
) -> nn.Module | None:
    """The SAE given to the trainer, or the one that its args name, which must be the same where there are both."""
    held = None if dtype == "auto" else getattr(torch, dtype)
    if isinstance(given, str):
        if name not in (None, given):
            raise ValueError(f"The trainer was given the {kind} {given!r} and its args name {name!r}: name one.")
        return load_sae(given, sae_id, revision=revision, dtype=held)
    if name is None:
        return given
    if given is None:
        return load_sae(name, sae_id, revision=revision, dtype=held)
    named = load_sae(name, sae_id, revision=revision)
    values, stored = given.state_dict(), named.state_dict()
    if values.keys() != stored.keys() or any(not torch.equal(values[key].cpu(), stored[key]) for key in stored):
        raise ValueError(f"The {kind} given to the trainer is not the one that its args name, {name!r}: name one.")
    return given


@torch.no_grad()
def _try(model: nn.Module, module: nn.Module, hookpoint: str, kind: str = "SAE") -> bool:
    """Runs the module on the activations of four tokens; returns whether the hookpoint's module returns a tensor."""
    returns_tensor = True

    def look(hooked: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal returns_tensor
        returns_tensor = isinstance(output, torch.Tensor)

    inner = backbone(model)
    tokens = torch.arange(4, device=next(inner.parameters()).device)[None]
    handle = hooked_module(model, hookpoint).register_forward_hook(look)
    try:
        with evaluating(model), capture(model, [hookpoint]) as activations:
            inner(input_ids=tokens, use_cache=False)
    finally:
        handle.remove()
    x = activations[hookpoint]
    width = x.shape[-1]
    if isinstance(module, DescribedSAE) and module.d_in != width:
        raise IncompatibleSAEError(
            f"The {kind} takes activations of width {module.d_in}, but those of {hookpoint!r} have width {width}: "
            "it was trained on another model, or on another kind of hookpoint."
        )
    # The trainer moves the module to the model's device later.
    parameter = next(module.parameters(), x)
    out = module(x.to(parameter.device))
    if out.shape != x.shape:
        raise IncompatibleSAEError(f"The module maps {tuple(x.shape)} to {tuple(out.shape)}; it must keep the shape.")
    return returns_tensor


def spliced_activations(
    model: nn.Module, placed: PlacedSAE, batches: Iterable[dict[str, Any]]
) -> Iterator[torch.Tensor]:
    """What the SAE replaces at the positions that count in the loss, batch by batch.

    Args:
        model (`torch.nn.Module`): the model that the SAE is spliced into; run without gradient, in evaluation mode.
        placed (`PlacedSAE`): the SAE's place.
        batches (iterable of `dict`): as the trainer collates them, on any device.

    Yields:
        `torch.Tensor`: `[positions, d_in]`.
    """
    inner = backbone(model)
    device = next(inner.parameters()).device
    for batch in batches:
        batch = send_to_device(batch, device)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad(), evaluating(model), capture(model, [placed.hookpoint], stop_after_last=True) as captured:
            inner(**inputs, use_cache=False)
        counted = nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1), value=False)
        special = placed.special_positions(inputs["input_ids"])
        yield captured[placed.hookpoint][counted if special is None else counted & ~special]


@torch.no_grad()
def warn_of_mismatch(placed: PlacedSAE, x: torch.Tensor) -> None:
    """Warns with the FVU of the SAE at a hookpoint that is not its own, on activations `[positions, d_in]`."""
    fvu = fvu_of(fvu_sums(x, placed.module(x), torch.ones_like(x[:, 0], dtype=torch.bool)))
    warnings.warn(
        f"The SAE was trained on {placed.mismatch!r} but is spliced into {placed.hookpoint!r}, where its FVU is "
        f"{fvu:.3f} (1 is no better than the mean activation).",
        stacklevel=4,
    )


def special_token_ids(args: SAETuningConfig, module: nn.Module, tokenizer: Any) -> torch.Tensor | None:
    """Ids `[n]` of the tokens that pass the SAE untouched: by the setting, or else as the SAE was trained."""
    exclude = args.exclude_special_tokens
    if exclude is None:
        exclude = isinstance(module, DescribedSAE) and bool(module.metadata.get("exclude_special_tokens", False))
    return torch.tensor(tokenizer.all_special_ids) if exclude else None
