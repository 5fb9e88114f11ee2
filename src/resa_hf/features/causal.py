"""Edits of latents while a model runs, also while it generates: ablate, amplify, patch.

The SAE is spliced in with its error term kept, `x' = x + sum over edited latents of (z' - z) W_dec` (as in Marks et
al., huggingface.co/papers/2403.19647), so that nothing else changes: where `z' = z`, `x` comes back to the bit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..hookpoints import backbone, capture, resolve_hookpoint, splice
from ..modes import evaluating
from ..sae.autoencoder import SAELensSAE, TopKSAE
from .reading import active_latents, decoder_rows

Change = Callable[[Tensor], Tensor]


def ablate(z: Tensor) -> Tensor:
    """Sets latents to 0."""
    return torch.zeros_like(z)


def amplify(factor: float) -> Change:
    """Multiplies latents by `factor`. Those that are not active stay so; 1 changes nothing."""
    return lambda z: z * factor


def put(values: Tensor) -> Change:
    """Activation patching: gives latents the values that they have elsewhere, for example on another prompt.

    Args:
        values (`torch.Tensor`):
            `[n]`, or those of one token: at every token, those that are generated included. `[tokens, n]` or `[batch,
            tokens, n]`, as [`latent_values`] gives them: on a prompt of that many tokens (with its padding, which
            generation puts on the left); the tokens that are generated from it one by one keep their own values.

    Raises:
        `ValueError`: by the forward, if the prompt has another shape.
    """

    def change(z: Tensor) -> Tensor:
        if values.ndim > 1 and z.shape[-2] == 1 != values.shape[-2]:
            return z
        try:
            return values.to(z).expand_as(z)
        except RuntimeError:
            raise ValueError(
                f"Values of shape {tuple(values.shape)} cannot be put into latents of shape {tuple(z.shape)} ([batch, "
                "tokens, latents]): prompts must have as many tokens as that from which the values come."
            ) from None

    return change


@contextmanager
def edited(
    model: nn.Module,
    hookpoint: int | str,
    sae: TopKSAE | SAELensSAE,
    latents: Sequence[int],
    change: Change,
    *,
    excluded_token_ids: Sequence[int] = (),
) -> Iterator[None]:
    """Edits latents in every forward of the model inside the block.

    Args:
        model (`torch.nn.Module`):
            The causal LM, plain or wrapped.
        hookpoint (`int` or `str`):
            In any spelling that `resolve_hookpoint` takes.
        sae ([`TopKSAE`] or [`SAELensSAE`]):
            The SAE, on the model's device.
        latents (sequence of `int`):
            The n latents to edit.
        change (`Callable`):
            `z' = change(z)`, both `[..., n]`, dtype of the SAE: [`ablate`], [`amplify`]`(factor)`, [`put`]`(values)`,
            or any other function. `z` is 0 where a latent is not active.
        excluded_token_ids (sequence of `int`, *optional*, defaults to `()`):
            Tokens on which the SAE was not trained (`sae.metadata["exclude_special_tokens"]`): they pass untouched.

    Raises:
        `HookpointError`: if the hookpoint is unknown.
        `IncompatibleSAEError`: by the forward, if the hookpoint has another width than the SAE; or if the SAE
            normalises each token ([`~resa_hf.features.reading.decoder_rows`]).
        `ValueError`: if `latents` is empty, repeats one, or names one that the SAE does not have.
    """
    places = _places(sae, latents)
    rows = decoder_rows(sae, latents)
    excluded = torch.tensor(list(excluded_token_ids), dtype=torch.long, device=rows.device)
    untouched = torch.tensor(False, device=rows.device)

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal untouched
        ids = args[0] if args else kwargs["input_ids"]
        untouched = torch.isin(ids, excluded).unsqueeze(-1)

    def edit(x: Tensor) -> Tensor:
        z = _values(sae, x, places, len(latents))
        with torch.autocast(x.device.type, enabled=False):
            difference = change(z) - z
            moved = x + difference @ rows
        # Not left to adding 0: that changes the sign of a negative zero.
        return torch.where(difference.ne(0).any(-1, keepdim=True) & ~untouched, moved, x)

    with ExitStack() as stack:
        if len(excluded):
            stack.callback(backbone(model).register_forward_pre_hook(look, with_kwargs=True).remove)
        stack.enter_context(splice(model, hookpoint, edit))
        yield


@torch.no_grad()
def latent_values(
    model: nn.Module,
    hookpoint: int | str,
    sae: TopKSAE | SAELensSAE,
    latents: Sequence[int],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The values of latents on a prompt, for [`put`] to patch in elsewhere.

    Args:
        model (`torch.nn.Module`), hookpoint (`int` or `str`), sae ([`TopKSAE`] or [`SAELensSAE`]), latents (sequence
            of `int`):
            As in [`edited`].
        input_ids (`torch.Tensor`):
            `[batch, tokens]` int64.
        attention_mask (`torch.Tensor`, *optional*):
            The same shape; needed if padded, on either side.

    Returns:
        `torch.Tensor`: `[batch, tokens, n]`, dtype of the SAE, 0 where a latent is not active.

    Raises:
        As [`edited`].
    """
    places = _places(sae, latents)
    x = activations(model, hookpoint, input_ids, attention_mask)
    return _values(sae, x, places, len(latents))


def activations(
    model: nn.Module, hookpoint: int | str, input_ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """`[batch, tokens, d_in]` at the hookpoint, in evaluation mode."""
    with evaluating(model), capture(model, [hookpoint], stop_after_last=True) as hooked:
        model(**model_inputs(input_ids, attention_mask))
    return hooked[resolve_hookpoint(model, hookpoint)]


def model_inputs(input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor | bool]:
    """Keyword arguments of a forward without cache, in which padding on the left shifts no position."""
    if attention_mask is None:
        return {"input_ids": input_ids, "use_cache": False}
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": positions,
        "use_cache": False,
    }


def _places(sae: TopKSAE | SAELensSAE, latents: Sequence[int]) -> Tensor:
    """`[num_latents]`: the place of each latent in `latents`, `len(latents)` for all others."""
    chosen = [int(latent) for latent in latents]
    if not chosen or len(set(chosen)) < len(chosen) or not 0 <= min(chosen) <= max(chosen) < sae.num_latents:
        raise ValueError(f"latents is {chosen}; wanted: one or more, each once, from 0 to {sae.num_latents - 1}.")
    places = torch.full((sae.num_latents,), len(chosen), device=next(sae.parameters()).device)
    places[chosen] = torch.arange(len(chosen), device=places.device)
    return places


def _values(sae: TopKSAE | SAELensSAE, x: Tensor, places: Tensor, count: int) -> Tensor:
    """`[..., count]`: the values of the chosen latents on activations `[..., d_in]`."""
    values, indices = active_latents(sae, x.flatten(0, -2))
    # All others go to a last column, which is dropped; no [tokens, num_latents] tensor is made.
    z = values.new_zeros(len(values), count + 1).scatter_add(1, places[indices], values)
    return z[:, :count].view(*x.shape[:-1], count)
