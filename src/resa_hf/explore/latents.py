"""What an SAE's latents read in a text, and what is known of one of them.

Each of these runs the model with hooks on it: a caller whose visitors share the model holds its lock.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ExploreError
from ..experiment.features import excluded
from ..features.causal import activations
from ..features.examples import Example, nearest_tokens, top_examples
from ..features.reading import active_latents
from ..hookpoints import causal_lm, resolve_hookpoint
from ..sae.autoencoder import SAELensSAE, TopKSAE
from ..text import cot_text, encode_prompt
from ..tiny.task import make_problems
from ..tiny.tokenizer import build_tokenizer
from .values import checked_text

MOST_TOKENS = 2048
MOST_CHARACTERS = 100_000  # beyond, tokenising alone would keep other visitors waiting


@dataclass(frozen=True)
class Reading:
    """
    The latents that are active at each token of a text.

    Args:
        tokens (`tuple[str, ...]`): as [`token_texts`] gives them.
        values (`numpy.ndarray`): shape [tokens, k], float32; 0 where an entry is not active, and at tokens on which
            the SAE was not trained.
        indices (`numpy.ndarray`): the latents, shape [tokens, k], int64.
        hookpoint (`str`): where they were read, in the canonical spelling.
    """

    tokens: tuple[str, ...]
    values: NDArray[np.float32]
    indices: NDArray[np.int64]
    hookpoint: str

    def of_latent(self, latent: int) -> list[float]:
        """The latent's value at each token, 0 where it is not active."""
        return [float(value) for value in np.where(self.indices == latent, self.values, 0).sum(axis=1)]

    def strongest(self, token: int | None = None, count: int = 10) -> list[tuple[int, float]]:
        """
        The latents that are largest, by magnitude: some kinds of SAE have negative ones.

        Args:
            token (`int`, *optional*): which token, from 0; `None` for each latent's peak in the whole text.
            count (`int`, *optional*, defaults to `10`): how many, at most.

        Returns:
            `list[tuple[int, float]]`: latents and values, largest first; of equal ones the lower latent.

        Raises:
            `ExploreError`: if the text has no such token.
        """
        if token is not None and not 0 <= token < len(self.tokens):
            raise ExploreError(f"There is no token {token}; the text has tokens 0 to {len(self.tokens) - 1}.")
        rows = slice(None) if token is None else slice(token, token + 1)
        values, latents = self.values[rows].ravel(), self.indices[rows].ravel()
        peaks: dict[int, float] = {}
        for entry in np.lexsort((latents, -np.abs(values))):
            if values[entry] != 0:
                peaks.setdefault(int(latents[entry]), float(values[entry]))
        return list(peaks.items())[:count]


@dataclass(frozen=True)
class Latent:
    """
    What is known of a latent.

    Args:
        latent (`int`): its number.
        examples (`list[Example]`): where it is largest, largest first ([`top_examples`]).
        promoted (`list[tuple[str, float]]`): its decoder's nearest tokens and their logits ([`nearest_tokens`]).
        tokens (`list[tuple[str, ...]]`): the text of each example's tokens.
    """

    latent: int
    examples: list[Example]
    promoted: list[tuple[str, float]]
    tokens: list[tuple[str, ...]]


@torch.no_grad()
def read(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    hookpoint: int | str,
    sae: TopKSAE | SAELensSAE,
    text: str | Sequence[int],
) -> Reading:
    """
    Reads an SAE at every token of a text.

    Args:
        model (`torch.nn.Module`):
            The causal LM, plain or wrapped.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        hookpoint (`int` or `str`):
            Where the SAE reads, in any spelling.
        sae ([`TopKSAE`] or [`SAELensSAE`]):
            The SAE, on the model's device.
        text (`str` or sequence of `int`):
            Encoded as a prompt is, so that special tokens may be in it; or the token ids of a prompt and of what a
            model wrote, which another encoding of the same text could cut otherwise.

    Raises:
        `ExploreError`: if the text has no token, or more than 2,048 or the model's context.
        `HookpointError`: if the hookpoint is unknown.
        `IncompatibleSAEError`: if the SAE has another width than the activations.
    """
    name = resolve_hookpoint(model, hookpoint)
    ids = _encoded(text, tokenizer) if isinstance(text, str) else list(text)
    most = _most_tokens(model)
    if not 0 < len(ids) <= most:
        raise ExploreError(f"The text has {len(ids):,} tokens that the model knows; wanted: 1 to {most:,}.")
    inputs = torch.tensor([ids], device=next(model.parameters()).device)
    values, indices = active_latents(sae, activations(model, name, inputs)[0])
    untrained = torch.isin(inputs[0], torch.tensor(excluded(sae), device=inputs.device, dtype=inputs.dtype))
    values = values.masked_fill(untrained[:, None], 0)
    return Reading(token_texts(tokenizer, ids), values.float().cpu().numpy(), indices.cpu().numpy(), name)


def look_up(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    hookpoint: int | str,
    sae: TopKSAE | SAELensSAE,
    latent: int,
    texts: Iterable[str],
) -> Latent:
    """
    Where in some texts a latent is largest, and the tokens that it speaks for.

    Args:
        model, tokenizer, hookpoint, sae:
            As for [`read`].
        latent (`int`):
            Which latent.
        texts (iterable of `str`):
            The texts, encoded as a prompt is and cut at 2,048 tokens or the model's context.

    Raises:
        `ExploreError`: if the SAE has no such latent.
        `HookpointError`, `IncompatibleSAEError`: as [`read`] and [`nearest_tokens`] do.
    """
    if not 0 <= latent < sae.num_latents:
        raise ExploreError(f"There is no latent {latent}; the SAE has latents 0 to {sae.num_latents - 1:,}.")
    most = _most_tokens(model)
    encoded = (_encoded(text, tokenizer)[:most] for text in texts)
    rows = ({"input_ids": ids} for ids in encoded if ids)
    found = top_examples(model, hookpoint, sae, rows, [latent], excluded_token_ids=excluded(sae))[latent]
    promoted = nearest_tokens(model, sae, latent, tokenizer)
    return Latent(latent, found, promoted, [token_texts(tokenizer, example.tokens) for example in found])


def tiny_texts(count: int = 200, seed: int = 0) -> list[str]:
    """Problems of the tiny reasoner's task as it writes them where it reasons: prompt, trace and answer.

    Args:
        count (`int`, *optional*, defaults to `200`): how many.
        seed (`int`, *optional*, defaults to `0`): of the problems.
    """
    tokenizer = build_tokenizer()
    return [
        cot_text(problem.question, problem.trace, problem.answer, template="chat", tokenizer=tokenizer)
        for problem in make_problems(count, seed)
    ]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token; joined, the text of all. Special tokens are in it.

    Of tokens that make a character together, the first one has it and the others are empty.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer.
        ids (sequence of `int`): the tokens.
    """
    whole = _decoded(tokenizer, ids)
    texts, begun, end = [""] * len(ids), 0, 0
    for place in range(len(ids)):
        prefix = _decoded(tokenizer, ids[: place + 1])
        # Decoded alone, the first bytes of a character are another one, which the whole text does not have there.
        if whole.startswith(prefix):
            texts[begun] = whole[end : len(prefix)]
            begun, end = place + 1, max(end, len(prefix))
    return tuple(texts)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _encoded(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Half of a surrogate pair is no text, and tokenizers fail on it.
    text = checked_text("The text", text, MOST_CHARACTERS)
    return encode_prompt(text.encode(errors="replace").decode(), tokenizer)


def _most_tokens(model: nn.Module) -> int:
    config = cast(PreTrainedModel, causal_lm(model)).config.get_text_config()
    most: int = getattr(config, "max_position_embeddings", MOST_TOKENS)  # models without positions have none
    return min(MOST_TOKENS, most)
