"""Small SAEs of several kinds, and reasoning features by dense latents and plain loops."""

from collections.abc import Sequence
from typing import Any

import torch
from sae_lens.registry import SAE_CLASS_REGISTRY
from torch import Tensor, nn

from resa_hf.sae.autoencoder import SAELensSAE, TopKSAE

Spans = Sequence[Sequence[Sequence[int]]]

# The prompt has fewer tokens than the activations dimensions, so a latent can be made to fire at any of them.
D_IN, LATENTS, K, PLANTED = 32, 200, 44, 60
KINDS = ("topk", "standard", "jumprelu", "abstopk")
PROMPT = "ab <think> </think> cd </think> ef <think> gh 12 </think> ab 3"


def make_sae(kind: str, x: Tensor, spans: Spans = (), seed: int = 0) -> TopKSAE | SAELensSAE:
    """An SAE whose first 60 latents fire at most cues and at few other tokens, the rest only at other tokens."""
    generator = torch.Generator().manual_seed(seed)
    planted = torch.arange(LATENTS) < PLANTED
    at_cue, elsewhere = torch.where(planted, 0.75, 0.0), torch.where(planted, 0.03, 0.9)
    cues = {at for occurrences in spans for span in occurrences for at in span}
    chance = torch.stack([at_cue if at in cues else elsewhere for at in range(len(x))])
    fires = torch.rand(chance.shape, generator=generator) < chance
    size = torch.rand(chance.shape, generator=generator) * 2 + torch.where(planted, 4, 1)
    if kind == "abstopk":
        size *= torch.randint(2, size.shape, generator=generator) * 2 - 1
    wanted = torch.where(fires, size, 0.05 * torch.randn(size.shape, generator=generator)).double()
    encoder, W_dec = torch.linalg.pinv(x - 0.1) @ wanted, torch.randn(LATENTS, D_IN, generator=generator).double()
    bias, b_dec = torch.full((LATENTS,), -0.5).double(), torch.full((D_IN,), 0.1).double()
    if kind == "topk":
        return TopKSAE.from_weights(encoder.T, bias, W_dec, b_dec, k=K)
    sae_class, config_class = SAE_CLASS_REGISTRY[kind]
    options = {"k": K, "rescale_acts_by_decoder_norm": False} if kind == "abstopk" else {}
    inner = sae_class(config_class(d_in=D_IN, d_sae=LATENTS, dtype="float64", apply_b_dec_to_input=True, **options))
    weights = {"W_enc": encoder, "b_enc": 0 * bias, "W_dec": W_dec, "b_dec": b_dec}
    if kind == "jumprelu":
        weights["threshold"] = -bias
    elif kind == "standard":
        weights["b_enc"] = bias
    inner.load_state_dict(weights)
    return SAELensSAE(inner)


@torch.no_grad()
def dense(sae: TopKSAE | SAELensSAE, x: Tensor) -> Tensor:
    """All latents; of TopK by its formula."""
    if isinstance(sae, SAELensSAE):
        return sae.sae.encode(x)
    pre = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    return torch.where(pre >= pre.topk(sae.k, dim=1).values[:, -1:], pre, 0)


@torch.no_grad()
def hidden(model: nn.Module, ids: Sequence[int]) -> list[Tensor]:
    """The outputs of all layers but the last, as transformers gives them."""
    states: Any = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    return [state[0] for state in states[1:-1]]


def brute_force(z: Tensor, spans: Spans, every: bool) -> list[int]:
    """The latents active at all cues and at no other token."""
    rows = z.tolist()
    at_cues = {at for occurrences in spans for span in occurrences for at in span}
    return [
        latent
        for latent in range(z.shape[1])
        if fires_at_cues(rows, latent, spans, every)
        and not any(rows[at][latent] != 0 for at in range(len(rows)) if at not in at_cues)
    ]


def fires_at_cues(rows: list[list[float]], latent: int, spans: Spans, every: bool) -> bool:
    needed = all if every else any
    return all(needed(any(rows[at][latent] != 0 for at in span) for span in occurrences) for occurrences in spans)
