"""What each latent contributes to a metric of the logits, for all latents at once, by gradients.

Gradient times activation is a first-order estimate of `metric(untouched) - metric(latent set to 0)`, the error term
kept as in [`~resa_hf.features.causal.edited`] (attribution patching, Syed et al., huggingface.co/papers/2310.10348;
Marks et al., huggingface.co/papers/2403.19647). Integrated gradients (Sundararajan et al.,
huggingface.co/papers/1703.01365) share out what all latents do together, which is another question: on the tiny
reasoner, with three SAEs, the rank correlation with ablating latents one by one is 0.86 to 0.91 for gradient times
activation, 0.11 to 0.30 for integrated gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..hookpoints import splice
from ..modes import evaluating
from ..sae.autoencoder import SAELensSAE, TopKSAE
from ..sae.sparse import row_products, weighted_row_sum
from .causal import activations, model_inputs
from .reading import active_latents, decoder_rows


def attribute(
    model: nn.Module,
    hookpoint: int | str,
    sae: TopKSAE | SAELensSAE,
    input_ids: Tensor,
    metric: Callable[[Tensor], Tensor],
    *,
    attention_mask: Tensor | None = None,
    steps: int | None = None,
    excluded_token_ids: Sequence[int] = (),
) -> Tensor:
    """Attributes a metric to the latents at a hookpoint, summed over tokens.

    Args:
        model (`torch.nn.Module`):
            The causal LM, plain or wrapped.
        hookpoint (`int` or `str`):
            In any spelling that `resolve_hookpoint` takes.
        sae ([`TopKSAE`] or [`SAELensSAE`]):
            The SAE, on the model's device.
        input_ids (`torch.Tensor`):
            `[batch, tokens]` int64.
        metric (`Callable`):
            Maps logits `[batch, tokens, vocabulary]` to a scalar, for example the difference of two tokens' logits.
        attention_mask (`torch.Tensor`, *optional*):
            The same shape as `input_ids`; needed if padded, on either side.
        steps (`int`, *optional*):
            `None`: gradient times activation, one forward and backward. A number: integrated gradients, by the
            midpoint rule with so many of each, on the way from all latents at 0 (the baseline; `b_dec` and the error
            term stay) to their values. They sum to `metric(untouched) - metric(baseline)` as `steps` grows.
        excluded_token_ids (sequence of `int`, *optional*, defaults to `()`):
            Tokens on which the SAE was not trained: their latents get nothing.

    Returns:
        `torch.Tensor`: `[num_latents]`, dtype of the SAE, but float32 at least; 0 for latents that are not active.

    Raises:
        `HookpointError`: if the hookpoint is unknown.
        `IncompatibleSAEError`: if the hookpoint has another width than the SAE.
        `ValueError`: if `steps` is below 1.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1, or None for gradient times activation.")
    with torch.no_grad():
        x = activations(model, hookpoint, input_ids, attention_mask)
        values, indices = active_latents(sae, x.flatten(0, -2))
        excluded = torch.isin(input_ids, torch.tensor(list(excluded_token_ids), dtype=torch.long, device=x.device))
        wide = torch.promote_types(values.dtype, torch.float32)  # bf16 would lose most of a sum over many tokens
        values = values.to(wide).masked_fill(excluded.view(-1, 1), 0)
        latents, places = indices.unique(return_inverse=True)
        rows = decoder_rows(sae, latents).to(wide)
        explained = weighted_row_sum(places, values, rows).view(x.shape)
    fractions = [1.0] if steps is None else [(step + 0.5) / steps for step in range(steps)]
    gradient, inputs = torch.zeros_like(explained), model_inputs(input_ids, attention_mask)
    for fraction in fractions:
        point = (x - (1 - fraction) * explained).to(x.dtype).requires_grad_()
        gradient += _gradient(model, hookpoint, point, inputs, metric) / len(fractions)
    products = values * row_products(places, rows, gradient.reshape(-1, sae.d_in))
    return values.new_zeros(sae.num_latents).index_add(0, indices.flatten(), products.flatten())


def _gradient(
    model: nn.Module, hookpoint: int | str, x: Tensor, inputs: dict[str, Any], metric: Callable[[Tensor], Tensor]
) -> Tensor:
    """Of the metric to the activations `x`, which are put at the hookpoint."""
    with torch.enable_grad(), evaluating(model), splice(model, hookpoint, lambda _: x):
        return torch.autograd.grad(metric(model(**inputs).logits), x)[0]
