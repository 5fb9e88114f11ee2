"""The SAEs that Stage I starts from: new ones, or any TopK SAE that can be loaded."""

import warnings
import zlib

import torch
from torch import nn

from ..errors import HookpointError, IncompatibleSAEError
from ..hookpoints import capture, resolve_hookpoint
from ..modes import evaluating
from ..places import parse_place
from ..provenance import place_revision
from .autoencoder import TopKSAE
from .checkpoint import list_saes, load_sae
from .config import SAETrainingConfig


def resolved_hookpoints(model: nn.Module, args: SAETrainingConfig) -> list[str]:
    """
    The canonical hookpoints, in the order of the settings.

    Raises:
        `HookpointError`: if a hookpoint is unknown or named twice, or if there is none.
    """
    hookpoints = [resolve_hookpoint(model, hookpoint) for hookpoint in args.hookpoints]
    for hookpoint in hookpoints:
        if hookpoints.count(hookpoint) > 1:
            raise HookpointError(f"hookpoints names {hookpoint!r} twice: {', '.join(args.hookpoints)}.")
    if not hookpoints:
        raise HookpointError("There is no hookpoint to train an SAE at: name one in `hookpoints`.")
    return hookpoints


def initial_saes(model: nn.Module, args: SAETrainingConfig, hookpoints: list[str]) -> dict[str, TopKSAE]:
    """
    One float32 SAE for each hookpoint, on the CPU.

    Args:
        model (`torch.nn.Module`):
            The source model.
        args ([`SAETrainingConfig`]):
            The settings.
        hookpoints (`list[str]`):
            Canonical ones.

    Returns:
        `dict[str, TopKSAE]`: hookpoint to SAE, in that order.

    Raises:
        `IncompatibleSAEError`: if the initial SAE cannot be read, is not TopK, or does not fit the activations.
    """
    widths = _widths(model, hookpoints)
    if args.initial_sae is None:
        return {hookpoint: _from_scratch(args, hookpoint, widths[hookpoint]) for hookpoint in hookpoints}
    found = list_saes(args.initial_sae, revision=args.initial_sae_revision)
    saes = {hookpoint: _from_sae(args, hookpoint, widths[hookpoint], found) for hookpoint in hookpoints}
    for hookpoint, sae in saes.items():
        if not _is_at(model, sae.hookpoint, hookpoint):
            warnings.warn(
                f"initial_sae {args.initial_sae!r} was trained at {sae.hookpoint!r}; here it starts at {hookpoint!r}.",
                stacklevel=2,
            )
        sae.hookpoint = hookpoint
    return saes


def _is_at(model: nn.Module, own: str | None, hookpoint: str) -> bool:
    """Whether an SAE's own hookpoint, in whichever spelling, is this one."""
    try:
        return own is not None and resolve_hookpoint(model, own) == hookpoint
    except HookpointError:
        return False


def _widths(model: nn.Module, hookpoints: list[str]) -> dict[str, int]:
    """Width of the activations, seen in a forward of one token: no configuration tells it for every hookpoint."""
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad(), evaluating(model), capture(model, hookpoints, stop_after_last=True) as activations:
        model(input_ids=token)
        return {hookpoint: activations[hookpoint].shape[-1] for hookpoint in hookpoints}


def _from_scratch(args: SAETrainingConfig, hookpoint: str, d_in: int) -> TopKSAE:
    num_latents = args.num_latents or (args.expansion_factor or 32) * d_in
    # By name, so that an SAE starts the same whichever others are trained beside it; and not the same for all
    # hookpoints, so that latents of two layers are not alike from the start.
    seed = (args.seed + zlib.crc32(hookpoint.encode())) % 2**63
    return TopKSAE(d_in, num_latents, args.k or 32, hookpoint=hookpoint, seed=seed)


def _from_sae(args: SAETrainingConfig, hookpoint: str, d_in: int, found: list[str]) -> TopKSAE:
    sae_id = args.initial_sae_id or (hookpoint if hookpoint in found else None)
    source, revision = str(args.initial_sae), args.initial_sae_revision
    start = load_sae(source, sae_id, revision=revision, dtype=torch.float32)
    place = parse_place(source, revision=revision)
    if not isinstance(start, TopKSAE):
        raise IncompatibleSAEError(
            f"initial_sae {source!r} is a {type(start.sae).__name__}; only plain TopK SAEs can be finetuned."
        )
    if start.d_in != d_in:
        raise IncompatibleSAEError(
            f"initial_sae {source!r} takes activations of width {start.d_in}, but those at {hookpoint!r} have {d_in}."
        )
    if args.num_latents not in (None, start.num_latents):
        raise IncompatibleSAEError(
            f"initial_sae {source!r} has {start.num_latents} latents, and num_latents is {args.num_latents}: drop it."
        )
    sae = TopKSAE.from_weights(
        start.W_enc.data.t(),
        start.b_enc.data,
        start.W_dec.data,
        start.b_dec.data,
        k=args.k or start.k,
        hookpoint=start.hookpoint,
        metadata={"initial_sae": {**place_revision(place), "id": sae_id, "revision": place.revision}},
    )
    _fold_decoder_norm(sae, source)
    return sae


@torch.no_grad()
def _fold_decoder_norm(sae: TopKSAE, source: str) -> None:
    """
    Training gives decoder rows norm 1. Rows far from it would change what a latent contributes, so their norm goes to
    the encoder; rows near it, as a rounded file has them, stay bit for bit.
    """
    norm = sae.W_dec.norm(dim=1)
    if bool(((norm - 1).abs() < 0.01).all()):
        return
    norm = norm.clamp(min=torch.finfo(norm.dtype).tiny)
    sae.W_enc.mul_(norm)
    sae.b_enc.mul_(norm)
    sae.unit_norm_decoder()
    warnings.warn(
        f"The decoder of initial_sae {source!r} has no unit norm. The norms were moved to the encoder: each latent "
        "contributes as before, but another latent may be among the k largest.",
        stacklevel=2,
    )
