"""Is it a reasoning feature, or a feature of the cue's tokens? Two controls of the count.

Most "reasoning features" fire on injected cue tokens (huggingface.co/papers/2601.05679): the count alone says little.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..errors import DataError
from ..sae.autoencoder import SAELensSAE, TopKSAE
from .reading import Active
from .reasoning import CuedPrompt, LayerLatents, Spans, cued_latents, fires_at_cues, read_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FEW = 20
_AT_ONCE = 8  # passages

Run = tuple[int, ...]  # tokens that follow each other


@dataclass(frozen=True)
class CountControl:
    """
    A count of reasoning features beside the counts of its controls.

    Args:
        count (`int`):
            The reasoning features.
        mean, low, high (`float`):
            Mean and 2.5th and 97.5th percentile, which is one of them, of the same count over the controls.
        p_value (`float`):
            Share of controls with at least as many, the cues themselves counted as one of them.
        controls (`int`):
            How many controls.
    """

    count: int
    mean: float
    low: float
    high: float
    p_value: float
    controls: int


@dataclass(frozen=True)
class FrequencyControl:
    """
    The same count for other tokens of the prompt.

    Args:
        layers (`tuple[CountControl, ...]`):
            One a layer, all with the same tokens.
        total (`CountControl`):
            Summed over the layers.
        frequency_gap (`int`):
            Largest difference between the occurrences of a cue and of a token that stands in for it.
    """

    layers: tuple[CountControl, ...]
    total: CountControl
    frequency_gap: int


@dataclass(frozen=True)
class ProseControl:
    """
    The same cues, at the same positions, in ordinary prose.

    Args:
        layers (`tuple[CountControl, ...]`):
            One a layer; the controls are the passages.
        total (`CountControl`):
            Summed over the layers.
        shares (`tuple[tuple[float, ...], ...]`):
            For each layer and each of its reasoning features, the share of passages in which it is active at all cues.
        cue_token_latents (`tuple[tuple[int, ...], ...]`):
            For each layer the reasoning features whose share is above 0.5: the cues alone suffice.
        context_latents (`tuple[tuple[int, ...], ...]`):
            For each layer the others.
    """

    layers: tuple[CountControl, ...]
    total: CountControl
    shares: tuple[tuple[float, ...], ...]
    cue_token_latents: tuple[tuple[int, ...], ...]
    context_latents: tuple[tuple[int, ...], ...]


def same_frequency_counts(
    found: Sequence[LayerLatents], prompt: CuedPrompt, *, every: bool = False, draws: int = 1000, seed: int = 0
) -> FrequencyControl:
    """
    How many latents are active at other tokens, and nowhere else, that occur in the prompt as often as the cues.

    In the place of each cue stands another token, or run of as many tokens, none of them part of a cue, nor the BOS.
    If fewer than 20 choices occur exactly as often, those of the closest frequencies join them.

    Args:
        found (sequence of [`LayerLatents`]):
            What [`reasoning_latents`] found.
        prompt ([`CuedPrompt`]):
            The prompt that it found them in.
        every (`bool`, *optional*, defaults to `False`):
            As there.
        draws (`int`, *optional*, defaults to `1000`):
            If there are more choices, so many are drawn.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.

    Raises:
        `DataError`: if the prompt has too few other tokens for even one choice.
    """
    choices, gap = _choices(prompt, draws, np.random.default_rng(seed))
    counts = np.array(
        [[len(cued_latents(one.active, one.num_latents, spans, every=every)) for spans in choices] for one in found]
    )
    return FrequencyControl(*_controls(found, counts), gap)


def _choices(prompt: CuedPrompt, draws: int, rng: np.random.Generator) -> tuple[list[Spans], int]:
    """Spans of tokens that stand in for the cues, and the largest difference in frequency among them."""
    by_cue = [(_runs(prompt, len(occurrences[0])), len(occurrences)) for occurrences in prompt.spans]
    chosen: list[list[Run]] = []
    gap = 0
    for gap in sorted({abs(len(spans) - often) for runs, often in by_cue for spans in runs.values()}):
        near = [[run for run, spans in runs.items() if abs(len(spans) - often) <= gap] for runs, often in by_cue]
        # Each set of tokens comes in every order, and some share a token: look at more than are wanted.
        chosen = _distinct(near, 4 * draws * len(near), rng)[:draws]
        if len(chosen) >= _FEW:
            break
    if not chosen:
        raise DataError("The prompt has no other tokens to compare its cues with. Use a longer prompt.")
    return [[runs[run] for (runs, _), run in zip(by_cue, picked, strict=True)] for picked in chosen], gap


def _distinct(near: Sequence[Sequence[Run]], most: int, rng: np.random.Generator) -> list[list[Run]]:
    """One run for each cue, no token in two of them, no set of runs twice; of at most so many drawn."""
    sizes = [len(runs) for runs in near]
    number = prod(sizes)  # of many cues more than an int64 holds
    few = (np.unravel_index(index, sizes) for index in rng.permutation(min(number, most)))
    chosen: dict[frozenset[Run], list[Run]] = {}
    for indices in few if number <= most else rng.integers(sizes, size=(most, len(sizes))):
        picked = [runs[one] for runs, one in zip(near, indices, strict=True)]
        if len({token for run in picked for token in run}) == sum(len(set(run)) for run in picked):
            chosen.setdefault(frozenset(picked), picked)
    return list(chosen.values())


def _runs(prompt: CuedPrompt, length: int) -> dict[Run, list[tuple[int, ...]]]:
    """Each run of so many tokens but the cues' and the BOS, and its positions, none overlapping the one before."""
    taken = {position for occurrences in prompt.spans for span in occurrences for position in span}
    left_out = {prompt.input_ids[position] for position in taken} | {prompt.bos_token_id}
    runs: dict[Run, list[tuple[int, ...]]] = {}
    for start in range(len(prompt.input_ids) - length + 1):
        run = prompt.input_ids[start : start + length]
        positions = tuple(range(start, start + length))
        if left_out.isdisjoint(run) and runs.get(run, [(-1,)])[-1][-1] < start:
            runs.setdefault(run, []).append(positions)
    return runs


def _controls(
    found: Sequence[LayerLatents], counts: NDArray[np.int64]
) -> tuple[tuple[CountControl, ...], CountControl]:
    """The counts, shape [layers, controls], by layer and summed."""
    by_layer = tuple(_control(len(one.latents), row) for one, row in zip(found, counts, strict=True))
    return by_layer, _control(sum(len(one.latents) for one in found), counts.sum(axis=0))


def _control(count: int, counts: NDArray[np.int64]) -> CountControl:
    low, high = np.quantile(counts, [0.025, 0.975], method="nearest").tolist()
    p_value = (1 + int((counts >= count).sum())) / (1 + len(counts))
    return CountControl(count, float(counts.mean()), low, high, p_value, len(counts))


def prose_passages(
    prompt: CuedPrompt, tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, count: int = 50, seed: int = 0
) -> list[tuple[int, ...]]:
    """
    Passages of prose with the prompt's cues, and its BOS, at the prompt's positions.

    Args:
        prompt ([`CuedPrompt`]):
            The prompt.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        texts (sequence of `str`):
            Prose, for example `load_prose()["text"]`. Tokens of the cues are left out of it.
        count (`int`, *optional*, defaults to `50`):
            Number of passages.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order of the texts.

    Returns:
        `list[tuple[int, ...]]`: tokens, each passage as long as the prompt.

    Raises:
        `DataError`: if the texts are too short for so many passages.
    """
    kept = {position for occurrences in prompt.spans for span in occurrences for position in span}
    cue_tokens = {prompt.input_ids[position] for position in kept}
    if prompt.input_ids[0] == tokenizer.bos_token_id:
        kept.add(0)
    free = [position for position in range(len(prompt.input_ids)) if position not in kept]
    prose: list[int] = []
    for index in np.random.default_rng(seed).permutation(len(texts)):
        ids = tokenizer(texts[int(index)], add_special_tokens=False, verbose=False)["input_ids"]
        prose += [token for token in ids if token not in cue_tokens]
        if len(prose) >= count * len(free):
            break
    else:
        raise DataError(f"The prose has {len(prose):,} tokens; {count} passages take {count * len(free):,}.")
    passages = np.tile(prompt.input_ids, (count, 1))
    passages[:, free] = np.reshape(prose[: count * len(free)], (count, len(free)))
    return [tuple(passage) for passage in passages.tolist()]


def prose_control(
    model: nn.Module,
    saes: Mapping[str, Callable[[], TopKSAE | SAELensSAE]],
    found: Sequence[LayerLatents],
    prompt: CuedPrompt,
    passages: Sequence[Sequence[int]],
    *,
    every: bool = False,
) -> ProseControl:
    """
    How many latents are active at the cues, and nowhere else, where the cues stand in prose; and which those are.

    Args:
        model (`torch.nn.Module`):
            The causal LM.
        saes (mapping of `str` to callable):
            As [`reasoning_latents`] took them, in the same order.
        found (sequence of [`LayerLatents`]):
            What it found.
        prompt ([`CuedPrompt`]):
            The prompt that it found them in.
        passages (sequence of sequences of `int`):
            What [`prose_passages`] made of it. They go through the model 8 at a time, once for each SAE, so that
            memory does not grow with their number.
        every (`bool`, *optional*, defaults to `False`):
            As there.

    Raises:
        `HookpointError`, `IncompatibleSAEError`: as [`reasoning_latents`] does.
    """
    counts, shares = [], []
    for one, (hookpoint, load) in zip(found, saes.items(), strict=True):
        each = list(_by_passage(model, hookpoint, load(), passages))
        counts.append([len(cued_latents(part, one.num_latents, prompt.spans, every=every)) for part in each])
        fires = [fires_at_cues(part, one.num_latents, prompt.spans, every=every)[list(one.latents)] for part in each]
        shares.append(tuple(np.mean([flags.numpy() for flags in fires], axis=0).tolist()))
    cue_token, context = (
        tuple(
            tuple(latent for latent, share in zip(one.latents, of_layer, strict=True) if (share > 0.5) == above)
            for one, of_layer in zip(found, shares, strict=True)
        )
        for above in (True, False)
    )
    return ProseControl(*_controls(found, np.array(counts)), tuple(shares), cue_token, context)


def _by_passage(
    model: nn.Module, hookpoint: str, sae: TopKSAE | SAELensSAE, passages: Sequence[Sequence[int]]
) -> Iterator[Active]:
    for start in range(0, len(passages), _AT_ONCE):
        part = passages[start : start + _AT_ONCE]
        for _, active, _ in read_prompts(model, {hookpoint: lambda: sae}, part):
            yield from (
                Active(*of_one) for of_one in zip(*(tensor.chunk(len(part)) for tensor in active), strict=True)
            )
