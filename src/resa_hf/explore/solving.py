"""One problem, solved by a model and by the same model with adapters, or with latents edited."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ..evaluation.scoring import final_answer, score
from ..experiment.features import excluded
from ..features.causal import amplify, edited
from ..tiny.task import answer_of
from .bench import Opened, Workbench
from .values import checked_number
from .writing import (
    Edit,
    checked_gold,
    checked_problem,
    checked_sampling,
    checked_strengths,
    has_ended,
    prompt_of,
    sides,
    text_of,
    write,
)


@dataclass(frozen=True)
class Change:
    """Latents that are edited while the model writes.

    Args:
        sae (`str`): as [`~resa_hf.explore.bench.Workbench.sae`] takes it.
        hookpoint (`str`, *optional*): which of the SAEs there.
        latents (`tuple[int, ...]`): which latents.
        factor (`float`): what they are multiplied by: 0 ablates them, 1 changes nothing.
    """

    sae: str
    hookpoint: str | None
    latents: tuple[int, ...]
    factor: float


@dataclass(frozen=True)
class Written:
    """What one side has written so far.

    Args:
        thinking (`str`), answer (`str`): before and behind `</think>`, without special tokens.
        text (`str`): both, as the model wrote them.
        found (`str`, *optional*): the final answer, as evaluations extract it; once it is finished.
        correct (`bool`, *optional*): whether that is right; once it is finished, if the right answer is known.
        tokens (`int`): how many are new, the end token included.
        finished (`bool`): whether nothing will be added.
        truncated (`bool`): whether it was cut, at `max_new_tokens` or where the context ends.
        token_ids (`tuple[int, ...]`): the new tokens.
    """

    thinking: str = ""
    answer: str = ""
    text: str = ""
    found: str | None = None
    correct: bool | None = None
    tokens: int = 0
    finished: bool = False
    truncated: bool = False
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Solution:
    """Both sides.

    Args:
        prompt (`str`): what both read.
        base ([`Written`]): of the model without adapters; with an edit, of the model with them and without the edit.
        tuned ([`Written`], *optional*): of the model with adapters, and the edit; `None` if there is neither.
    """

    prompt: str
    base: Written
    tuned: Written | None


def solve(
    bench: Workbench,
    model: str,
    adapters: Mapping[str, float],
    problem: str,
    *,
    gold: str | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int = 512,
    change: Change | None = None,
) -> Iterator[Solution]:
    """Yields what both sides have written after each step, one token more each; in the end with the judgement.

    The same arguments give the same text, whoever else uses the models meanwhile, and it is that of an evaluation with
    the same seed and settings. Closing the iterator, as leaving a loop over it does, stops the work.

    Args:
        bench ([`~resa_hf.explore.bench.Workbench`]):
            Where models come from.
        model (`str`), adapters (`Mapping[str, float]`):
            As [`~resa_hf.explore.bench.Workbench.open`] takes them; the adapters' strengths, -2 to 2: 1 is the adapter
            as trained, 0 the base.
        problem (`str`):
            The question, at most 4,000 characters.
        gold (`str`, *optional*):
            The right answer. Without it nothing is judged, but for the tiny reasoner's own chains of arithmetic.
        seed (`int`, *optional*, defaults to `0`), temperature (`float`, *optional*, defaults to `1.0`):
            Of sampling: 0 to 2^31 - 1, and 0 (greedy) to 2.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            1 to 4,096 for each side.
        change ([`Change`], *optional*):
            Latents to edit.

    Raises:
        `ExploreError`: for anything that a visitor cannot have; before the first token.
        `HookpointError`, `IncompatibleSAEError`, `ValueError`: for an SAE or latents that do not fit the model.
    """
    problem, sampling = checked_problem(problem), checked_sampling(seed, temperature, max_new_tokens)
    strengths = checked_strengths(adapters)
    opened = bench.open(model, list(adapters))
    edit = None if change is None else _edit(bench, opened, change)
    gold = checked_gold(gold or "") or (answer_of(problem) if opened.is_tiny_reasoner else None)
    prompt = prompt_of(opened, problem)
    both = sides(opened, strengths, edit)
    writers = [write(opened, side, [prompt], [(0, 0)], sampling) for side in both]
    written = [Written() for _ in both]
    while any(steps := [next(writer, None) for writer in writers]):
        written = [
            before if step is None else _so_far(opened, step[0], gold)
            for before, step in zip(written, steps, strict=True)
        ]
        yield _solution(prompt, written)
    yield _solution(prompt, [one if one.finished else _judged(opened, one.token_ids, gold, True) for one in written])


def split_thinking(text: str, ended: bool) -> tuple[str, str]:
    """Tells thinking and answer apart, behind a prompt that ends with `<think>`.

    Args:
        text (`str`): the completion so far.
        ended (`bool`): whether the model has ended it by itself.

    Returns:
        `tuple[str, str]`: what stands before and behind the last `</think>`. Without that tag the answer begins at
        `<answer>`; without either, what a model ends by itself is an answer without thinking, and all else thinking.
    """
    thinking, closed, answer = text.rpartition("</think>")
    if not closed:
        thinking, opened, rest = text.partition("<answer>")
        answer = opened + rest
        if not opened and ended:
            thinking, answer = "", text
    return thinking.removeprefix("<think>").strip(), answer.strip()


def _edit(bench: Workbench, opened: Opened, change: Change) -> Edit:
    hookpoint, sae = bench.sae(change.sae, change.hookpoint)
    factor = checked_number("The factor", change.factor, -1000, 1000)
    return partial(
        edited,
        opened.tuned,
        hookpoint,
        sae,
        change.latents,
        amplify(factor),
        excluded_token_ids=excluded(sae),
    )


def _solution(prompt: str, written: list[Written]) -> Solution:
    return Solution(prompt, written[0], written[1] if len(written) > 1 else None)


def _so_far(opened: Opened, tokens: Sequence[int], gold: str | None) -> Written:
    if has_ended(opened, tokens):
        return _judged(opened, tokens, gold, False)
    # A character may take several tokens: until the last has come it reads as U+FFFD.
    text = text_of(opened, tokens).rstrip("\ufffd")
    thinking, answer = split_thinking(text, ended=False)
    return Written(thinking, answer, text, tokens=len(tokens), token_ids=tuple(tokens))


def _judged(opened: Opened, tokens: Sequence[int], gold: str | None, truncated: bool) -> Written:
    text = text_of(opened, tokens)
    thinking, answer = split_thinking(text, ended=not truncated)
    correct, found = score("math", text, gold) if gold else (None, final_answer(text))
    return Written(thinking, answer, text, found, correct, len(tokens), True, truncated, tuple(tokens))
