"""The tiny reasoner's task: chains of single-digit arithmetic modulo 10, made and verified on the spot.

Writing the partial results out solves a chain; answering at once is close to guessing. That gap is what a method that
elicits reasoning can close. Everything here is pure Python and seeded; the questions that the shipped weights were
trained on can be made again (`training_questions`), so that nobody tests on them by accident.
"""

import operator
import random
import re
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

OPERATIONS: Final[dict[str, Callable[[int, int], int]]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}

# Of the shipped weights (`resa_hf.tiny.build` with `--seed 0`). Any other seed is free for the user.
BASE_SEED: Final = 10_000
BASE_COUNT: Final = 64_000
SOURCE_SEED: Final = 20_000
SOURCE_COUNT: Final = 800
MEASURE_SEED: Final = 30_000


@dataclass(frozen=True)
class Problem:
    """One chain, read strictly from left to right (no precedence), each result modulo 10.

    Attributes:
        question (`str`): the chain as the user asks it, for example `"7*4-2+8 mod 10"`.
        trace (`str`): the partial results, for example `"7*4=8;8-2=6;6+8=4"`.
        answer (`str`): the last result, one digit, for example `"4"`.
    """

    question: str
    trace: str
    answer: str


def make_problem(rng: random.Random, min_steps: int = 3, max_steps: int = 8) -> Problem:
    """Draw one chain of `min_steps` to `max_steps` operations.

    Args:
        rng (`random.Random`): the source of randomness; it is advanced.
        min_steps (`int`, *optional*, defaults to `3`): least number of operations.
        max_steps (`int`, *optional*, defaults to `8`): greatest number of operations.

    Returns:
        `Problem`: the question, its trace and its answer. The first operand is 0-9, the others are 1-9.

    Raises:
        `ValueError`: if not `1 <= min_steps <= max_steps`.
    """
    if not 1 <= min_steps <= max_steps:
        raise ValueError(f"needs 1 <= min_steps <= max_steps, got min_steps={min_steps}, max_steps={max_steps}")
    value = rng.randint(0, 9)
    question = str(value)
    steps = []
    for _ in range(rng.randint(min_steps, max_steps)):
        symbol = rng.choice("+-*")
        operand = rng.randint(1, 9)
        result = OPERATIONS[symbol](value, operand) % 10
        question += f"{symbol}{operand}"
        steps.append(f"{value}{symbol}{operand}={result}")
        value = result
    return Problem(question=f"{question} mod 10", trace=";".join(steps), answer=str(value))


def answer_of(question: str) -> str | None:
    """The answer to a chain that is written as in `Problem.question`, of any length; `None` for any other text."""
    if re.fullmatch(r"[0-9]([+*-][0-9])* mod 10", question) is None:
        return None
    value = int(question[0])
    for symbol, operand in re.findall(r"([+*-])([0-9])", question):
        value = OPERATIONS[symbol](value, int(operand)) % 10
    return str(value)


def make_problems(count: int, seed: int, exclude: AbstractSet[str] = frozenset(), max_steps: int = 8) -> list[Problem]:
    """Draw `count` chains with distinct questions.

    Args:
        count (`int`): how many.
        seed (`int`): the same seed and `exclude` give the same problems.
        exclude (`Set[str]`, *optional*, defaults to `frozenset()`): questions that must not occur.
        max_steps (`int`, *optional*, defaults to `8`): greatest number of operations, from 3 on.

    Returns:
        `list[Problem]`: `count` problems, in the order drawn.
    """
    rng = random.Random(seed)
    taken = set(exclude)
    problems: list[Problem] = []
    while len(problems) < count:
        problem = make_problem(rng, max_steps=max_steps)
        if problem.question not in taken:
            taken.add(problem.question)
            problems.append(problem)
    return problems


def make_rows(
    count: int, seed: int, exclude: AbstractSet[str] = frozenset(), max_steps: int = 8
) -> list[dict[str, str]]:
    """Draw verified question-answer rows without traces, as `resa_hf.data` reads them.

    Args:
        count (`int`): how many rows.
        seed (`int`): the same seed and `exclude` give the same rows.
        exclude (`Set[str]`, *optional*, defaults to `frozenset()`): questions that must not occur, for example
            `training_questions()` or those of another split.
        max_steps (`int`, *optional*, defaults to `8`): greatest number of operations, from 3 on.

    Returns:
        `list[dict[str, str]]`: rows with the keys `problem` and `answer`; no question occurs twice.
    """
    return [{"problem": p.question, "answer": p.answer} for p in make_problems(count, seed, exclude, max_steps)]


def base_problems(count: int = BASE_COUNT, seed: int = 0) -> list[Problem]:
    """The problems that the base was trained on, in their order; `count` and `seed` are the build's."""
    return make_problems(count, BASE_SEED + seed)


def source_problems(count: int = SOURCE_COUNT, seed: int = 0) -> list[Problem]:
    """The problems that the source was trained on by GRPO, in their order; `count` and `seed` are the build's."""
    return make_problems(count, SOURCE_SEED + seed)


def training_questions() -> frozenset[str]:
    """Every question that the shipped base or source was trained on; exclude these from any test."""
    return frozenset(p.question for p in base_problems() + source_problems())
