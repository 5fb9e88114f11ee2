"""What stands in for the SAE in a control arm: an error as large as the SAE's, without what the SAE has learned.

If an arm with a control does as well as the arm with the SAE, then the SAE's dictionary is not what did it.
"""

import torch
from torch import nn

from ..sae.autoencoder import TopKSAE


class NoiseControl(nn.Module):
    """x + e, where e has a fresh random direction at every token and the norm of the SAE's reconstruction error there.

    The norm is taken without gradient. The directions come from torch's global generator, so a resumed run and the
    recomputation of gradient checkpointing draw the same ones.

    Args:
        sae (`torch.nn.Module`): maps `[..., d_in]` to `[..., d_in]`; gives the norm of the error only.
    """

    def __init__(self, sae: nn.Module) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., d_in]` -> the same shape and dtype."""
        direction = torch.randn_like(x)
        return x + direction * (_error_norm(self.sae, x) / direction.norm(dim=-1, keepdim=True)).detach()


class RandomSAEControl(nn.Module):
    """x + c (r(x) - x), r an untrained SAE of the same shape, c such that the error has the SAE's norm at every token.

    r keeps the SAE's `b_dec` (the mean of the activations), so that only its dictionary is random. c is taken without
    gradient; the gradient through r is the one that an SAE would give.

    Args:
        sae (`TopKSAE`): the SAE that it stands in for.
        seed (`int`): of r's dictionary.
    """

    def __init__(self, sae: TopKSAE, seed: int) -> None:
        super().__init__()
        self.sae = sae
        self.random = TopKSAE(
            sae.d_in, sae.num_latents, sae.k, dtype=sae.b_dec.dtype, device=sae.b_dec.device, seed=seed
        )
        with torch.no_grad():
            self.random.b_dec.copy_(sae.b_dec)
        self.random.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., d_in]` -> the same shape and dtype."""
        error = self.random(x).to(x.dtype) - x
        tiny = torch.finfo(x.dtype).tiny
        return x + error * (_error_norm(self.sae, x) / error.detach().norm(dim=-1, keepdim=True).clamp_min(tiny))


@torch.no_grad()
def _error_norm(sae: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`[..., 1]`: the norm of the SAE's reconstruction error."""
    return (sae(x).to(x.dtype) - x).norm(dim=-1, keepdim=True)


def make_control(control: str | None, sae: nn.Module, seed: int) -> nn.Module:
    """The module that takes the SAE's place.

    Args:
        control (`str` or `None`): `None` for the SAE itself, `"noise"` or `"random_sae"`.
        sae (`torch.nn.Module`): the SAE.
        seed (`int`): of a control's random weights.

    Raises:
        `ValueError`: if the control is unknown, or `"random_sae"` is asked for with something else than a TopK SAE.
    """
    if control is None:
        return sae
    if control == "noise":
        return NoiseControl(sae)
    if control == "random_sae" and isinstance(sae, TopKSAE):
        return RandomSAEControl(sae, seed)
    if control == "random_sae":
        raise ValueError(f"control: random_sae needs a TopK SAE to copy the shape of, not a {type(sae).__name__}.")
    raise ValueError(f"control is {control!r}; it must be one of none, noise, random_sae.")
