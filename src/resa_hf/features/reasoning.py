"""Reasoning features by a prompt alone: latents active at the thinking tokens and nowhere else in the prompt."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..hookpoints import decoder_layers, resolve_hookpoint
from ..sae.autoencoder import SAELensSAE, TopKSAE
from ..sae.source import ActivationSource
from ..text import R1_PROMPT, encode_prompt
from .reading import Active, active_latents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CUES", "R1_PROMPT", "CuedPrompt", "LayerLatents", "cued_prompt", "reasoning_latents"]

CUES: Final = ("<think>", "</think>")

# cue -> occurrence -> positions of its tokens
Spans = Sequence[Sequence[Sequence[int]]]


@dataclass(frozen=True)
class CuedPrompt:
    """
    A prompt in tokens, and where its cues are.

    Args:
        input_ids (`tuple[int, ...]`):
            The tokens, with the BOS that the tokenizer adds.
        tokens (`tuple[str, ...]`):
            Each of them as text.
        spans (`tuple[tuple[tuple[int, ...], ...], ...]`):
            For each cue and each of its occurrences, the positions of its tokens.
        bos_token_id (`int`, *optional*):
            The tokenizer's BOS, if it has one.
    """

    input_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    spans: tuple[tuple[tuple[int, ...], ...], ...]
    bos_token_id: int | None = None


@dataclass(frozen=True)
class LayerLatents:
    """
    The reasoning features at one hookpoint.

    Args:
        hookpoint (`str`):
            The hookpoint, in its canonical spelling.
        layer (`int`):
            The decoder layer that it is, or lies in, numbered from 0.
        latents (`tuple[int, ...]`):
            The reasoning features, ascending.
        num_latents (`int`):
            How many latents the SAE has.
        active ([`Active`]):
            The active latents at each token of the prompt, on the CPU.
    """

    hookpoint: str
    layer: int
    latents: tuple[int, ...]
    num_latents: int
    active: Active


def cued_prompt(
    tokenizer: "PreTrainedTokenizerBase", prompt: str = R1_PROMPT, cues: Sequence[str] = CUES
) -> CuedPrompt:
    """
    Tokenizes a prompt and finds its cues. A cue may be one token or several, and may share a token with other text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            A fast tokenizer.
        prompt (`str`, *optional*, defaults to `R1_PROMPT`):
            The text, by default the system prompt of DeepSeek-R1, which holds each thinking token twice.
        cues (sequence of `str`, *optional*, defaults to `("<think>", "</think>")`):
            What to look for.

    Raises:
        `DataError`: if there is no cue, if one does not occur in the prompt, or if the tokenizer has no token for it
            or tells no offsets.
    """
    if not tokenizer.is_fast:
        raise DataError(f"{type(tokenizer).__name__} tells no offsets, so cues cannot be found. Use a fast tokenizer.")
    if not cues:
        raise DataError(f"No cue given; at least one is needed, for example {CUES[0]!r}.")
    ids = encode_prompt(prompt, tokenizer)
    offsets = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    bos = len(ids) - len(offsets)
    spans = []
    for cue in cues:
        matches = re.finditer(re.escape(cue), prompt)
        spans.append(tuple(_overlapping(offsets, match.start(), match.end(), bos) for match in matches))
        if not (cue and spans[-1] and all(spans[-1])):
            raise DataError(f"The prompt has no tokens for the cue {cue!r}. It begins {prompt[:60]!r}.")
    tokens = tuple(str(tokenizer.decode([token])) for token in ids)
    return CuedPrompt(tuple(ids), tokens, tuple(spans), tokenizer.bos_token_id)


def _overlapping(offsets: Sequence[tuple[int, int]], start: int, end: int, bos: int) -> tuple[int, ...]:
    return tuple(bos + token for token, (begin, stop) in enumerate(offsets) if begin < end and stop > start)


def reasoning_latents(
    model: nn.Module,
    saes: Mapping[str, Callable[[], TopKSAE | SAELensSAE]],
    prompt: CuedPrompt,
    *,
    every: bool = False,
) -> list[LayerLatents]:
    """
    The reasoning features of SAEs: the latents active at all cues of a prompt and at no other token of it.

    The definition of the paper [Resa](https://huggingface.co/papers/2506.09967), table 6 ("exclusively and
    simultaneously activated at the `<think>` and `</think>` tokens"). One forward serves all hookpoints.

    Args:
        model (`torch.nn.Module`):
            The causal LM, plain or wrapped. It runs in evaluation mode and stays as it is.
        saes (mapping of `str` to callable):
            Hookpoint to what gives its SAE, for example `partial(load_sae, folder, "layers.12")`. They are called one
            after the other, and one SAE is held at a time.
        prompt ([`CuedPrompt`]):
            The prompt.
        every (`bool`, *optional*, defaults to `False`):
            A latent is active at a cue if it is active at one of its occurrences; with `True`, if it is at each. At an
            occurrence of several tokens it is active if it is at one of them.

    Returns:
        `list[LayerLatents]`: in the order of `saes`.

    Raises:
        `HookpointError`: if the model has no such hookpoint, or none is given.
        `IncompatibleSAEError`: if an SAE has another width than the activations.
    """
    path, _ = decoder_layers(model)
    found = []
    for name, active, num_latents in read_prompts(model, saes, [prompt.input_ids]):
        latents = cued_latents(active, num_latents, prompt.spans, every=every).tolist()
        layer = int(name.removeprefix(f"{path}.").partition(".")[0])  # layer_index would search the model each time
        found.append(LayerLatents(name, layer, tuple(latents), num_latents, active))
    return found


def read_prompts(
    model: nn.Module,
    saes: Mapping[str, Callable[[], TopKSAE | SAELensSAE]],
    prompts: Sequence[Sequence[int]],
) -> Iterator[tuple[str, Active, int]]:
    """
    The active latents of SAEs over prompts of one length, all in one forward.

    Args:
        model (`torch.nn.Module`):
            The causal LM.
        saes (mapping of `str` to callable):
            As [`reasoning_latents`] takes them.
        prompts (sequence of sequences of `int`):
            The tokens of each prompt.

    Yields:
        The canonical hookpoint, its active latents on the CPU, shape [prompts * tokens, k], and the SAE's number of
        latents.

    Raises:
        `HookpointError`, `IncompatibleSAEError`: as [`reasoning_latents`] does.
    """
    names = [resolve_hookpoint(model, hookpoint) for hookpoint in saes]
    inputs = {"input_ids": torch.tensor(prompts, device=next(model.parameters()).device)}
    activations = ActivationSource(model, names)(inputs, nullcontext()).activations
    for name, load in zip(names, saes.values(), strict=True):
        yield name, *_read(load(), activations[name])


def _read(sae: TopKSAE | SAELensSAE, x: Tensor) -> tuple[Active, int]:
    active = active_latents(sae, x.to(next(sae.parameters()).device))
    return Active(active.values.cpu(), active.indices.cpu()), sae.num_latents


def cued_latents(active: Active, num_latents: int, spans: Spans, *, every: bool) -> Tensor:
    """
    The latents active at all cues and at no other token.

    Args:
        active ([`Active`]):
            The active latents of one prompt, on the CPU.
        num_latents (`int`):
            How many latents the SAE has.
        spans (`CuedPrompt.spans`):
            For each cue and each of its occurrences, the positions of its tokens.
        every (`bool`):
            Whether each occurrence of a cue counts, as for [`reasoning_latents`].

    Returns:
        `torch.Tensor`: int64, ascending.
    """
    elsewhere = torch.ones(len(active.values), dtype=torch.bool)
    elsewhere[[position for occurrences in spans for span in occurrences for position in span]] = False
    at_cues = fires_at_cues(active, num_latents, spans, every=every)
    return (at_cues & ~_fires(active, num_latents, elsewhere)).nonzero().flatten()


def fires_at_cues(active: Active, num_latents: int, spans: Spans, *, every: bool) -> Tensor:
    """
    Whether each latent is active at all cues, wherever else it is.

    Args and definition are those of [`cued_latents`].

    Returns:
        `torch.Tensor`: bool, shape [num_latents].
    """
    together = torch.all if every else torch.any
    cues = [
        together(torch.stack([_fires(active, num_latents, torch.tensor(span)) for span in occurrences]), dim=0)
        for occurrences in spans
    ]
    return torch.stack(cues).all(dim=0)


def _fires(active: Active, num_latents: int, tokens: Tensor) -> Tensor:
    fires = torch.zeros(num_latents, dtype=torch.bool)
    fires[active.indices[tokens][active.values[tokens] != 0]] = True
    return fires
