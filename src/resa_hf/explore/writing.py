"""Completions that are written step by step, while other visitors use the same model."""

import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..errors import ExploreError
from ..evaluation.decoding import decode_steps
from ..evaluation.engine import Sampling
from ..evaluation.in_process import end_tokens, seeded_draw
from ..evaluation.store import Key
from ..hookpoints import causal_lm
from ..text import encode_prompt, evaluation_prompt
from .bench import Opened
from .values import checked_number, checked_text, checked_whole

MAX_CHARACTERS = 4_000  # of a problem
MAX_GOLD = 500

Edit = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Side:
    """One of the models that are compared.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        set_up (`Callable`):
            Gives a context in which the model is as this side has it.
    """

    model: PreTrainedModel | PeftModel
    set_up: Callable[[], AbstractContextManager[object]]


def sides(opened: Opened, strengths: Sequence[float], edit: Edit | None = None) -> list[Side]:
    """The base and the tuned model, if there are adapters; with an edit the same model without and with it."""

    def tuned() -> AbstractContextManager[object]:
        return opened.at_strengths(strengths)

    if edit is None:
        return [Side(opened.base, ExitStack), *([Side(opened.tuned, tuned)] if strengths else [])]
    then = edit

    @contextmanager
    def edited() -> Iterator[None]:
        with tuned(), then():
            yield

    return [Side(opened.tuned, tuned), Side(opened.tuned, edited)]


def write(
    opened: Opened, side: Side, prompts: Sequence[str], keys: Sequence[Key], sampling: Sampling
) -> Iterator[list[list[int]]]:
    """Yields the new tokens of each prompt so far, after every step.

    In between the model is as it was before and free for others; a visitor who goes away leaves nothing behind. Texts
    are those of [`~resa_hf.evaluation.in_process.TransformersEngine`], whoever else writes meanwhile.

    Args:
        opened ([`~resa_hf.explore.bench.Opened`]), side ([`Side`]):
            The model.
        prompts (sequence of `str`), keys (sequence of `tuple[int, int]`):
            What it reads, and the numbers of problem and sample, on which draws depend.
        sampling (`Sampling`):
            The settings. A completion is also cut where the model's context ends.

    Raises:
        `ExploreError`: for a prompt that does not fit into the context.
    """
    encoded = [tuple(encode_prompt(prompt, opened.tokenizer)) for prompt in prompts]
    model: PreTrainedModel = causal_lm(side.model)  # type: ignore[assignment]  # that of a PeftModel is one
    longest = max(map(len, encoded))
    # Some architectures, such as Bloom's, have no such limit.
    context: int = getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    if longest >= context:
        raise ExploreError(f"The prompt has {longest:,} tokens; the model reads at most {context:,}, answer included.")
    limit = min(sampling.max_new_tokens, context - longest)
    ends = end_tokens(model, opened.tokenizer)
    steps = decode_steps(model, encoded, seeded_draw(keys, sampling), ends=ends, limit=limit)
    tokens: list[list[int]] = [[] for _ in prompts]
    while True:
        with opened.lock, torch.no_grad(), side.set_up():
            step = next(steps, None)
        if step is None:
            return
        for row, token in step:
            tokens[row].append(token)
        yield tokens


def has_ended(opened: Opened, tokens: Sequence[int]) -> bool:
    """Whether the last token ends the completion."""
    model: PreTrainedModel = causal_lm(opened.base)  # type: ignore[assignment]  # it is one
    return bool(tokens) and tokens[-1] in end_tokens(model, opened.tokenizer)


def text_of(opened: Opened, tokens: Sequence[int]) -> str:
    """What tokens read as, without special ones."""
    return str(opened.tokenizer.decode(list(tokens), skip_special_tokens=True))


def prompt_of(opened: Opened, problem: str) -> str:
    """The prompt of a problem, as evaluations have it: by the model's chat template, or the paper's if it has none.

    A chat template is a program, and can run for ever: that of a model which a visitor has named is not used.
    """
    chat = opened.is_own and opened.tokenizer.chat_template
    return evaluation_prompt(problem, template="chat" if chat else "paper", tokenizer=opened.tokenizer)


def checked_problem(text: str) -> str:
    """A problem as a visitor typed it, stripped and without control characters.

    Raises:
        `ExploreError`: if it is empty, or has more than 4,000 characters.
    """
    text = _plain(text, "The problem", MAX_CHARACTERS)
    if not text:
        raise ExploreError("There is no problem: type one.")
    return text


def checked_gold(text: str) -> str:
    """A right answer as a visitor typed it; may be empty.

    Raises:
        `ExploreError`: if it has more than 500 characters.
    """
    return _plain(text, "The right answer", MAX_GOLD)


def _plain(text: str, what: str, longest: int) -> str:
    text = checked_text(what, text, longest)
    # Halves of surrogate pairs (Cs) cannot be encoded.
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs")).strip()


def checked_sampling(seed: float, temperature: float, max_new_tokens: float) -> Sampling:
    """The settings of a visitor.

    Raises:
        `ExploreError`: for a value out of its range.
    """
    return Sampling(
        temperature=checked_number("temperature", temperature, 0, 2),
        seed=checked_whole("seed", seed, 0, 2**31 - 1),
        max_new_tokens=checked_whole("max_new_tokens", max_new_tokens, 1, 4096),
    )


def checked_strengths(adapters: Mapping[str, float]) -> list[float]:
    """Of adapters, by name.

    Raises:
        `ExploreError`: for a strength out of its range.
    """
    return [checked_number(f"The strength of {name!r}", strength, -2, 2) for name, strength in adapters.items()]
