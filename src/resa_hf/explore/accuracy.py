"""Many problems: the accuracies of a model without and with adapters, and whether they differ."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from ..errors import ExploreError
from ..evaluation.comparison import Answers, compare
from ..evaluation.engine import Sampling
from ..evaluation.scoring import score
from ..evaluation.tables import comparison_table
from ..tiny.task import make_rows, training_questions
from .bench import Opened, Workbench
from .values import checked_text, checked_whole
from .writing import (
    Side,
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

MIN_PROBLEMS, MAX_PROBLEMS = 2, 200  # of one, nothing can be said
MARGIN = 0.02  # below which a difference counts as none: that of `resa-hf evaluate`
_BATCH = 16
_MAX_TOKENS = 102_400  # of all answers of a side: 200 of 512
_JUDGED_WITHIN = 4  # seconds
_LONGEST = MAX_PROBLEMS * 5_000  # characters that are pasted


@dataclass(frozen=True)
class Measured:
    """How far it is, and in the end what was found.

    Args:
        done (`int`): problems that all sides have answered.
        total (`int`): of how many.
        table (`str`, *optional*): accuracies and their difference as a Markdown table; in the end.
        verdict (`str`, *optional*): one word for it, or a few; in the end, if there are adapters.
        sentence (`str`): what is being done; in the end the verdict with its numbers, as in reports.
    """

    done: int
    total: int
    table: str | None = None
    verdict: str | None = None
    sentence: str = ""


@dataclass(frozen=True)
class _Answered:
    correct: list[bool]
    lengths: list[int]
    truncated: list[bool]


def measure(
    bench: Workbench,
    model: str,
    adapters: Mapping[str, float],
    *,
    problems: Sequence[tuple[str, str]],
    seed: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int = 512,
) -> Iterator[Measured]:
    """Lets the model without and with adapters answer the same problems once each; yields after every step.

    Answers are those of an evaluation with the same seed and settings, but for the rounding of other batches, and near
    the context's end.

    Args:
        bench, model, adapters, seed, temperature, max_new_tokens: as in [`~resa_hf.explore.solving.solve`].
        problems (sequence of `tuple[str, str]`): 2 to 200 questions with their right answers.

    Raises:
        `ExploreError`: for anything that a visitor cannot have; before the first answer.
    """
    sampling, strengths = checked_sampling(seed, temperature, max_new_tokens), checked_strengths(adapters)
    checked = _checked(problems)
    if len(checked) * sampling.max_new_tokens > _MAX_TOKENS:
        raise ExploreError(
            f"{len(checked)} answers of up to {sampling.max_new_tokens:,} tokens are too much for a server that is "
            f"shared: {_MAX_TOKENS // len(checked):,} tokens each can be had."
        )
    opened = bench.open(model, list(adapters))
    both = sides(opened, strengths)
    answered = [_Answered([], [], []) for _ in both]
    for start in range(0, len(checked), _BATCH):
        batch = checked[start : start + _BATCH]
        waiting = Measured(start, len(checked), sentence=f"{start} of {len(checked)} problems answered.")
        yield waiting
        for _ in _answer(opened, both, batch, start, sampling, answered):
            yield waiting
    yield _found(["base", _name(adapters)], answered)


def tiny_problems(count: int, seed: int) -> list[tuple[str, str]]:
    """Chains for the tiny reasoner, none of which it or its source was trained on, with their answers.

    Raises:
        `ExploreError`: for a count that is not 2 to 200, or a seed that is not 0 to 2^31 - 1.
    """
    count = checked_whole("The number of problems", count, MIN_PROBLEMS, MAX_PROBLEMS)
    seed = checked_whole("seed", seed, 0, 2**31 - 1)
    return [(row["problem"], row["answer"]) for row in make_rows(count, seed, exclude=_trained_on())]


def problems_from_text(text: str) -> list[tuple[str, str]]:
    """Reads problems that a visitor has pasted.

    Args:
        text (`str`): a line each: question, tab, answer; or a JSON object with `problem` and `answer`. Empty lines do
            not count.

    Raises:
        `ExploreError`: for a line that is neither, with its number; for fewer than 2, or more than 200.
    """
    pasted = checked_text("What was pasted", text, _LONGEST).splitlines()
    lines = [(number, line) for number, line in enumerate(pasted, start=1) if line.strip()]
    if len(lines) > MAX_PROBLEMS:
        raise ExploreError(f"{len(lines):,} problems were pasted; at most {MAX_PROBLEMS} can be answered.")
    return _checked([_read(number, line) for number, line in lines])


def _read(number: int, line: str) -> tuple[str, str]:
    wanted = f"Line {number} is neither a question, a tab and its answer, nor JSON such as "
    wanted += '{"problem": "1+1", "answer": "2"}.'
    if not line.lstrip().startswith("{"):
        problem, tab, answer = line.rpartition("\t")
        if not tab:
            raise ExploreError(wanted)
        return problem, answer
    try:
        row = json.loads(line)
        return str(row["problem"]), str(row["answer"])
    except (ValueError, KeyError, RecursionError):
        raise ExploreError(wanted) from None


def _checked(problems: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    if not MIN_PROBLEMS <= len(problems) <= MAX_PROBLEMS:
        raise ExploreError(f"{len(problems)} problems were given; {MIN_PROBLEMS} to {MAX_PROBLEMS} can be answered.")
    checked = []
    for number, (problem, gold) in enumerate(problems, start=1):
        try:
            checked.append((checked_problem(problem), checked_gold(gold)))
        except ExploreError as error:
            raise ExploreError(f"Problem {number}: {error}") from None
        if not checked[-1][1]:
            raise ExploreError(f"Problem {number} has no right answer.")
    return checked


def _answer(
    opened: Opened,
    both: Sequence[Side],
    batch: Sequence[tuple[str, str]],
    start: int,
    sampling: Sampling,
    answered: Sequence[_Answered],
) -> Iterator[None]:
    """Adds the answers to a batch of problems; yields after every step."""
    prompts = [prompt_of(opened, problem) for problem, _ in batch]
    keys = [(start + row, 0) for row in range(len(batch))]
    writers = [write(opened, side, prompts, keys, sampling) for side in both]
    written: list[list[list[int]]] = [[] for _ in both]
    while any(steps := [next(writer, None) for writer in writers]):
        written = [step or before for step, before in zip(steps, written, strict=True)]
        yield
    for rows, side in zip(written, answered, strict=True):
        for number, (tokens, (_, gold)) in enumerate(zip(rows, batch, strict=True), start=start + 1):
            began = time.monotonic()
            side.correct.append(score("math", text_of(opened, tokens), gold)[0])
            # One process judges for all visitors, and an answer such as 9^{9^{9}} keeps it as long as it may.
            if time.monotonic() - began > _JUDGED_WITHIN:
                raise ExploreError(f"Problem {number}: it takes too long to tell whether an answer is {gold!r}.")
            side.lengths.append(len(tokens))
            side.truncated.append(not has_ended(opened, tokens))
            yield


def _found(names: Sequence[str], answered: Sequence[_Answered]) -> Measured:
    """One problem, one answer: the intervals are over problems."""
    base, *others = (
        Answers(name, {"problems": [np.array(side.correct)[:, None]]})
        for name, side in zip(names, answered, strict=False)
    )
    # No control was measured, and a verdict says so, as in the report of `resa-hf evaluate`.
    compared = compare(base, others, MARGIN, {other.name: () for other in others})
    columns = {
        "length": [f"{np.mean(side.lengths):.1f}" for side in answered],
        "truncated %": [f"{100 * np.mean(side.truncated):.1f}" for side in answered],
    }
    total, verdict = len(answered[0].correct), compared[-1].verdict
    return Measured(
        total,
        total,
        table=comparison_table(compared, columns, "model"),
        verdict=None if verdict is None else verdict.word,
        sentence=f"{total} problems answered." if verdict is None else f"{verdict.sentence}.",
    )


def _name(adapters: Mapping[str, float]) -> str:
    return " + ".join(name if strength == 1 else f"{strength:g} x {name}" for name, strength in adapters.items())


@cache  # it takes a second
def _trained_on() -> frozenset[str]:
    return training_questions()
