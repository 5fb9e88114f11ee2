"""What the best of several points is worth: the best of n equal ones looks good, too, by luck alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..evaluation.comparison import SEEDS_FOR_THE_METHOD, Answers
from ..evaluation.resampling import ROUNDING


@dataclass(frozen=True)
class BestOf:
    """The best of n points beside what the best of n equally good ones would be. Accuracies are fractions of 1.

    Args:
        point (`str`): the best.
        n (`int`): how many it is the best of.
        best, mean (`float`): its accuracy, and that of all of them.
        expected, low, high (`float`): the best of n equal ones: mean, and the range of 95% of the shufflings.
        p_value (`float`): the share of shufflings whose best is as good.
        over (`str`): what was shuffled within, `"seeds"` or `"problems"`.
    """

    point: str
    n: int
    best: float
    mean: float
    expected: float
    low: float
    high: float
    p_value: float
    over: Literal["seeds", "problems"]


def best_of(points: Mapping[str, Answers], seed: int = 0, shufflings: int = 10_000) -> BestOf:
    """Compares the best point with the best after the points' accuracies were shuffled: within each seed, or with
    fewer than 5 seeds within each problem. Were all points equally good, each shuffling would be as likely.

    Args:
        points (`Mapping[str, Answers]`): what an arm answered at each point: two or more, the same problems and seeds.
        seed (`int`, *optional*, defaults to `0`): equal seeds give equal results.
        shufflings (`int`, *optional*, defaults to `10_000`): how many are drawn.
    """
    over_seeds = next(iter(points.values())).seeds >= SEEDS_FOR_THE_METHOD
    columns = [answers.over_seeds() if over_seeds else _by_problem(answers) for answers in points.values()]
    table = np.array(columns).T  # [blocks, points]
    means = table.mean(axis=0)
    rng = np.random.default_rng(seed)
    shuffled = np.array([rng.permuted(table, axis=1).mean(axis=0).max() for _ in range(shufflings)])
    low, high = np.quantile(shuffled, [0.025, 0.975])
    # What was observed is one of the draws, so that p is never 0.
    beyond = 1 + int(np.sum(shuffled >= means.max() - ROUNDING))
    return BestOf(
        point=list(points)[int(means.argmax())],
        n=len(points),
        best=float(means.max()),
        mean=float(means.mean()),
        expected=float(shuffled.mean()),
        low=float(low),
        high=float(high),
        p_value=beyond / (shufflings + 1),
        over="seeds" if over_seeds else "problems",
    )


def _by_problem(answers: Answers) -> NDArray[np.float64]:
    """`[problems]` of all tasks, scaled so that their mean is the macro-average."""
    tasks = [correct.mean(axis=1) for correct in answers.pooled.values()]
    problems = sum(map(len, tasks))
    return np.concatenate([task * problems / (len(tasks) * len(task)) for task in tasks])


def best_lines(found: Mapping[str, BestOf]) -> str:
    """In words, by arm."""
    return "\n".join(f"- {name}: {_sentence(best)}" for name, best in found.items())


def _sentence(best: BestOf) -> str:
    return (
        f"the best of {best.n} points is {best.point}, {100 * best.best:.1f}% (all: {100 * best.mean:.1f}%). Were all "
        f"equally good, the best would show {100 * best.expected:.1f}% by luck alone ({100 * best.low:.1f} to "
        f"{100 * best.high:.1f}% in 95 of 100 shufflings of the points within each {best.over.removesuffix('s')}); "
        f"p = {best.p_value:.2g}."
    )
