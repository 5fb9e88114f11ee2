"""What an edit of latents does to a model, and whether random latents like them would do as much."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import DataError
from ..evaluation.engine import Outcomes, Sampling, answer
from ..evaluation.statistics import Difference, Interval, paired_over_problems, paired_over_strata
from ..modes import evaluating
from ..sae.autoencoder import SAELensSAE, TopKSAE
from ..sae.dataset import padded_batches
from ..sae.totals import wide_dtype
from ..tuning.loss import tile_tokens
from .causal import Change, edited, model_inputs
from .matched import Null, decoder_norms, latent_statistics, matched_latents

Rows = Sequence[Mapping[str, Any]]
Edit = Callable[[Sequence[int]], AbstractContextManager[None]]  # of these latents


@dataclass(frozen=True)
class Effect:
    """The effect of an edit: edited minus untouched, at 95% confidence.

    Args:
        kl (`Interval`):
            KL(untouched || edited) of the next token, nats a token, mean over rows.
        accuracy (`Difference`, *optional*):
            Of answers, paired over problems.
        length (`Interval`, *optional*):
            New tokens of an answer, mean paired difference over problems.
        nulls (`dict[str, Null]`):
            The same of matched random latents, under the names above.
    """

    kl: Interval
    accuracy: Difference | None
    length: Interval | None
    nulls: dict[str, Null]


def next_token_kl(
    model: nn.Module,
    hookpoint: int | str,
    sae: TopKSAE | SAELensSAE,
    latents: Sequence[int],
    change: Change,
    rows: Rows,
    *,
    excluded_token_ids: Sequence[int] = (),
    batch_size: int = 8,
) -> NDArray[np.float64]:
    """KL(untouched || edited) of the next token, the mean of each row's tokens.

    Args:
        model (`torch.nn.Module`), hookpoint (`int` or `str`), sae ([`TopKSAE`] or [`SAELensSAE`]), latents (sequence
            of `int`), change (`Callable`), excluded_token_ids (sequence of `int`, *optional*, defaults to `()`):
            As in [`~resa_hf.features.causal.edited`].
        rows (sequence of mappings):
            Rows with `input_ids`, and `attention_mask` if padded. Every token counts but padding.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows a forward.

    Returns:
        `numpy.ndarray`: `[rows]` float64, nats a token.

    Raises:
        As [`~resa_hf.features.causal.edited`].
    """
    edit = partial(edited, model, hookpoint, sae, change=change, excluded_token_ids=excluded_token_ids)
    return _next_token_kls(model, edit, [latents], rows, batch_size)[0]


@torch.no_grad()
def _next_token_kls(
    model: nn.Module, edit: Edit, sets: Sequence[Sequence[int]], rows: Rows, batch_size: int
) -> NDArray[np.float64]:
    """`[sets, rows]`; a batch's untouched logits serve all sets."""
    found: list[list[list[float]]] = []
    for ids, mask in _batches(model, rows, batch_size):
        inputs = model_inputs(ids, mask)
        with evaluating(model):
            untouched = model(**inputs).logits
            of_batch = []
            for latents in sets:
                with edit(latents):
                    logits = model(**inputs).logits
                counted = zip(untouched, logits, mask.bool(), strict=True)
                of_batch.append([_mean_kl(before[kept], after[kept]) for before, after, kept in counted])
        found.append(of_batch)
    return np.concatenate([np.array(of_batch) for of_batch in found], axis=1)


def _mean_kl(before: Tensor, after: Tensor) -> float:
    """Mean KL of logits `[tokens, vocabulary]`; in float64, since a small KL is a difference of larger numbers."""
    total, dtype = 0.0, wide_dtype(before.device)
    size = tile_tokens(before.shape[1], before.device)
    for first, second in zip(before.split(size), after.split(size), strict=True):
        log_p, log_q = first.to(dtype).log_softmax(-1), second.to(dtype).log_softmax(-1)
        total += F.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
    return total / max(len(before), 1)


def measure_effect(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    hookpoint: int | str,
    sae: TopKSAE | SAELensSAE,
    latents: Sequence[int],
    change: Change,
    *,
    rows: Rows,
    prompts: Sequence[str] = (),
    golds: Sequence[str] = (),
    sampling: Sampling | None = None,
    nulls: int = 99,
    answer_nulls: int = 19,
    seed: int = 0,
    excluded_token_ids: Sequence[int] = (),
    batch_size: int = 8,
) -> Effect:
    """Measures an edit by next-token KL, answer accuracy and answer length, against matched random latents.

    Args:
        model (`PreTrainedModel` or `PeftModel`), tokenizer (`PreTrainedTokenizerBase`): the causal LM.
        hookpoint, sae, latents, change, excluded_token_ids: as in [`~resa_hf.features.causal.edited`]; the random
            latents get the same change.
        rows (sequence of mappings): with `input_ids`, and `attention_mask` if padded: on these KL is measured, and
            rates and norms to match.
        prompts, golds (sequences of `str`, *optional*): problems and gold answers; without them only KL is measured.
        sampling (`Sampling`, *optional*): how problems are answered, with the same draws under every edit. `None`:
            greedily.
        nulls (`int`, *optional*, defaults to `99`), answer_nulls (`int`, *optional*, defaults to `19`): random sets
            for KL, and how many of these answer the problems. Where fewer can be matched, they are fewer.
        seed (`int`, *optional*, defaults to `0`): of the random sets and the bootstrap.
        batch_size (`int`, *optional*, defaults to `8`): rows a forward; the logits of two forwards are held.

    Raises:
        `DataError`: for fewer than two rows or problems, or as [`matched_latents`].
        `ValueError`: if `nulls` is below 1, or `answer_nulls` is not between 1 and `nulls`; and as `edited`.
    """
    if not 1 <= answer_nulls <= nulls:
        raise ValueError(f"nulls is {nulls} and answer_nulls {answer_nulls}; wanted: nulls >= answer_nulls >= 1.")
    if len(rows) < 2 or len(prompts) == 1:
        raise DataError(f"{len(rows)} rows, {len(prompts)} prompts: an interval needs at least two of each.")
    edit = partial(edited, model, hookpoint, sae, change=change, excluded_token_ids=excluded_token_ids)
    rates, values = latent_statistics(
        model, hookpoint, sae, rows, excluded_token_ids=excluded_token_ids, batch_size=batch_size
    )
    matched = matched_latents(rates, values * decoder_norms(sae), latents, count=nulls, seed=seed).tolist()
    sets = [list(latents), *matched]
    kls = _next_token_kls(model, edit, sets, rows, batch_size)
    kl = _interval(kls[0], seed)
    kl = replace(kl, low=max(kl.low, 0.0))  # the bootstrap's interval is symmetric
    kl_null = Null.of(kls[0].mean(), kls[1:].mean(axis=1))
    if not prompts:
        return Effect(kl, None, None, {"kl": kl_null})
    settings = Sampling(temperature=0) if sampling is None else sampling
    ask = partial(answer, model, tokenizer, prompts, golds, settings, progress=False)
    accuracy, length, nulls_of = _on_answers(ask, edit, sets[: 1 + answer_nulls], seed)
    return Effect(kl, accuracy, length, {"kl": kl_null, **nulls_of})


def _on_answers(
    ask: Callable[[], Outcomes], edit: Edit, sets: Sequence[Sequence[int]], seed: int
) -> tuple[Difference, Interval, dict[str, Null]]:
    """Accuracy and length under an edit of the first set, and of the others as their nulls."""
    untouched = ask()
    correct, longer = [], []
    for latents in sets:
        with edit(latents):
            outcomes = ask()
        correct.append(outcomes.correct)
        longer.append((outcomes.lengths - untouched.lengths).mean(axis=1))
    better = [right.mean() - untouched.correct.mean() for right in correct]
    nulls = {
        "accuracy": Null.of(better[0], better[1:]),
        "length": Null.of(longer[0].mean(), [difference.mean() for difference in longer[1:]]),
    }
    return paired_over_problems(correct[0], untouched.correct, seed=seed), _interval(longer[0], seed), nulls


def _interval(values: NDArray[np.float64], seed: int) -> Interval:
    mean = paired_over_strata([values], 0.95, 10_000, seed)
    return Interval(mean.estimate, mean.low, mean.high, mean.level)


def _batches(model: nn.Module, rows: Rows, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`input_ids` and `attention_mask` of `batch_size` rows at a time, padded on the right, on the model's device."""
    indexed = (rows[index] for index in range(len(rows)))
    for batch in padded_batches(indexed, batch_size, next(model.parameters()).device):
        ids = batch["input_ids"]
        yield ids, batch.get("attention_mask", torch.ones_like(ids))
