"""Sampling answers from a model in process, and scoring them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import DataError
from ..hookpoints import causal_lm
from ..modes import evaluating
from ..text import encode_prompt
from .answers import extract_answer, is_correct


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Args:
        temperature (`float`, *optional*, defaults to `1.0`):
            0 is greedy.
        top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus sampling.
        samples (`int`, *optional*, defaults to `1`):
            Answers a problem; must be 1 when greedy.
        max_new_tokens (`int`, *optional*, defaults to `2048`):
            A completion that is longer is cut, and counted as truncated.
        batch_size (`int`, *optional*, defaults to `16`):
            Completions generated at once.
        seed (`int`, *optional*, defaults to `0`):
            Two models with equal logits get equal completions for the same problems, settings and seed.

    Raises:
        `ValueError`: for a setting out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    samples: int = 1
    max_new_tokens: int = 2048
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature is {self.temperature} and top_p {self.top_p}; valid: >= 0, and 0 to 1.")
        for name in ("samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"temperature 0 gives one answer a problem, but samples is {self.samples}.")

    def generation_config(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        """Transformers' settings; nothing is taken from the model's own generation_config.json but its end tokens."""
        own: GenerationConfig | None = causal_lm(model).generation_config  # type: ignore[assignment]
        ends = own.eos_token_id if own is not None else None
        sampled = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.temperature > 0 else {}
        return GenerationConfig(
            do_sample=self.temperature > 0,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=ends if ends is not None else tokenizer.eos_token_id,
            pad_token_id=_pad_token(tokenizer),
            **sampled,
        )


@dataclass(frozen=True)
class Outcomes:
    """What a model answered.

    Args:
        correct (`numpy.ndarray`): `[problems, samples]` bool.
        lengths (`numpy.ndarray`): `[problems, samples]` int, new tokens, the end token included.
        truncated (`numpy.ndarray`): `[problems, samples]` bool, cut at `max_new_tokens`.
        completions (`list[list[str]]`): `[problems][samples]`, text behind the prompt.
    """

    correct: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray
    completions: list[list[str]]


def answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    golds: Sequence[str],
    sampling: Sampling,
    *,
    progress: bool = True,
) -> Outcomes:
    """Samples answers to prompts and scores them against the gold answers.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Plain or PEFT-wrapped; its adapters act as they are set.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts, golds (sequences of `str`):
            One entry a problem.
        sampling (`Sampling`):
            The settings. Torch's global random state is put back afterwards.

    Raises:
        `DataError`: if there is no problem, or not one gold answer a prompt.
    """
    if not prompts or len(prompts) != len(golds):
        raise DataError(
            f"{len(prompts)} prompts and {len(golds)} gold answers: at least one of each, and equally many."
        )
    encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    # Prompts of like length need little padding, and tend to have answers of like length.
    order = sorted((i for i in range(len(prompts)) for _ in range(sampling.samples)), key=lambda i: len(encoded[i]))
    config = sampling.generation_config(model, tokenizer)
    ends = set(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id])
    device = next(model.parameters()).device
    completions: list[list[str]] = [[] for _ in prompts]
    lengths: list[list[int]] = [[] for _ in prompts]
    truncated: list[list[bool]] = [[] for _ in prompts]
    with (
        evaluating(model),
        torch.no_grad(),
        _without_own_settings(model),
        torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=device.type),
    ):
        torch.manual_seed(sampling.seed)
        for start in tqdm(range(0, len(order), sampling.batch_size), "Answering", unit="batch", disable=not progress):
            batch = order[start : start + sampling.batch_size]
            ids, mask = _left_padded([encoded[i] for i in batch], _pad_token(tokenizer))
            output = model.generate(  # type: ignore[operator]  # mypy takes it for a submodule
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
            for index, row in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
                length = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
                truncated[index].append(row[length - 1] not in ends)
                lengths[index].append(length)
                completions[index].append(str(tokenizer.decode(row[:length], skip_special_tokens=True)))
    correct = [
        [is_correct(extract_answer(text), gold) for text in texts]
        for texts, gold in zip(completions, golds, strict=True)
    ]
    return Outcomes(np.array(correct), np.array(lengths), np.array(truncated), completions)


@contextmanager
def _without_own_settings(model: nn.Module) -> Iterator[None]:
    """`generate` fills whatever its settings leave open from the model's own, a repetition penalty for example."""
    bare = causal_lm(model)
    own, bare.generation_config = bare.generation_config, GenerationConfig()  # type: ignore[assignment]
    try:
        yield
    finally:
        bare.generation_config = own


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(pad)


def _left_padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
