r"""The rewards of GRPO, as Tina (huggingface.co/papers/2504.15777) and its forerunners have them.

Each is called as [`~trl.GRPOTrainer`] calls it, with a batch, and gives a number for each completion. A completion is
text behind a prompt that has opened `<think>`, or a conversation, of which the last message counts. The verified
answer is in the column `answer`. Lengths are in tokens.

| reward | range | |
|---|---|---|
| `accuracy` | 0, 1 | the final answer is the verified one ([`resa_hf.evaluation.scoring.score`]) |
| `format` | 0, 1 | reasoning, `</think>`, `<answer>`, an answer, `</answer>`, and nothing more |
| `tag_count` | 0 to 1 | a third for each of these three tags that occurs exactly once |
| `cosine` | `cosine_wrong`, `cosine_correct` | right and short is best, wrong and short is worst |
| `length` | -0.5 to 0.5 | right and shorter than others of the same prompt is best |
| `repetition_penalty` | `repetition_max_penalty` to 0 | the share of repeated n-grams |

No completion makes a reward raise: what cannot be parsed scores as wrong, and is counted in the metric
`completions/malformed`; what fails in an unforeseen way scores 0, and is counted in `rewards/<name>/failed`.
"""

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trl.rewards import get_repetition_penalty_reward

from ..evaluation.answers import is_correct
from ..evaluation.scoring import final_answer, score
from .config import BUILT_IN, RLConfig
from .limited import LimitedReward

logger = logging.getLogger(__name__)

_JUDGED = ("accuracy", "cosine", "length")
_TAG = re.compile(r"(</?(?:think|answer)>)")


class Reward(Protocol):
    """What [`~trl.GRPOTrainer`] calls; its name is that of its metrics."""

    __name__: str

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float | None]: ...


def make_rewards(args: RLConfig) -> list[Reward]:
    """
    The rewards that the settings name, in their order. math-verify's process, if it is needed, and those of functions
    of one's own are started at once, so that what is wrong with them shows before the training begins.

    Args:
        args ([`RLConfig`]):
            The settings.

    Returns:
        `list[Reward]`: for `reward_funcs` of [`~trl.GRPOTrainer`]. They share what they know of a batch's answers.

    Raises:
        `ValueError`: for a function that cannot be imported, two rewards of one name, or `cosine` without a length.
        `RuntimeError`: if math-verify cannot be started.
    """
    names = [path.rpartition(".")[2] for path in args.reward_funcs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"Two of reward_funcs are called {', '.join(sorted(twice))} ({', '.join(args.reward_funcs)}), and their "
            "metrics would be one: rename a function."
        )
    judgements = Judgements()
    built_in = [name for name in args.reward_funcs if name in BUILT_IN]
    judged = [name for name in built_in if name in _JUDGED]
    if judged:
        is_correct("1/2", r"\frac{1}{2}")
    reporter = next(iter(judged or built_in), None)
    return [
        BuiltInReward(name, _score_of(name, args), judgements, name in _JUDGED, name == reporter)
        if name in BUILT_IN
        else LimitedReward(name, args.reward_time_limit)
        for name in args.reward_funcs
    ]


class Judgements:
    """What is known of the answers of a batch, so that several rewards judge each completion once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], bool] = {}

    def right(self, text: str, gold: str) -> bool:
        """Whether a completion's final answer is the verified one."""
        if (text, gold) not in self._known:
            self._known[text, gold] = score("math", text, gold)[0]
        return self._known[text, gold]

    def keep(self, texts: Sequence[str], golds: Sequence[str]) -> None:
        """Forgets all but a batch's judgements."""
        wanted = set(zip(texts, golds, strict=True))
        self._known = {pair: right for pair, right in self._known.items() if pair in wanted}


@dataclass(frozen=True)
class Batch:
    """What a reward is called with, and whether each answer in it is right."""

    prompts: Sequence[Any]
    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    golds: Sequence[str]
    judgements: Judgements

    def right(self, index: int) -> bool:
        return self.judgements.right(self.texts[index], self.golds[index])


class BuiltInReward:
    """
    One of the rewards of this file.

    Args:
        name (`str`):
            The name, as in `reward_funcs`.
        score (`Callable[[Batch, int], float]`):
            The reward of a batch's completion.
        judgements (`Judgements`):
            Shared with the other rewards of the run.
        needs_answer (`bool`):
            Whether `score` compares with the verified answer.
        reports (`bool`):
            Whether this is the one that logs what has no answer, and adds the answers to the completions' table.
    """

    def __init__(
        self,
        name: str,
        score: Callable[[Batch, int], float],
        judgements: Judgements,
        needs_answer: bool,
        reports: bool,
    ) -> None:
        self.__name__ = name
        self._score = score
        self._judgements = judgements
        self._needs_answer = needs_answer
        self._reports = reports
        self._warned = False

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        answer: Sequence[str] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Rewards a batch.

        Args:
            prompts (`list`):
                A prompt for each completion. Neighbours with the same prompt are a group.
            completions (`list[str]` or `list[list[dict]]`):
                Texts, or conversations.
            completion_ids (`list[list[int]]`):
                Their tokens.
            answer (`list[str]`, *optional*):
                The verified answers; `format`, `tag_count` and `repetition_penalty` need none.
            log_extra, log_metric (`Callable`, *optional*):
                TRL's.
            columns:
                Whatever else the dataset has is not looked at.

        Raises:
            `ValueError`: if there is no column `answer` and the reward needs it. No completion raises anything.
        """
        if self._needs_answer and answer is None:
            raise ValueError(
                f"The reward {self.__name__} compares with the verified answer, but the dataset has no column "
                f"'answer'; beside the prompt it has: {', '.join(columns) or 'nothing'}."
            )
        texts = [_text(completion) for completion in completions]
        golds = answer if self._needs_answer and answer is not None else [""] * len(texts)
        if self._needs_answer:
            self._judgements.keep(texts, golds)
        batch = Batch(prompts, texts, completion_ids, golds, self._judgements)
        rewards = [self._one(batch, index) for index in range(len(texts))]
        if log_metric is not None and rewards:
            log_metric(f"rewards/{self.__name__}/failed", rewards.count(None) / len(rewards))
        if self._reports and texts:
            _report(texts, log_extra, log_metric)
        return [reward or 0.0 for reward in rewards]

    def _one(self, batch: Batch, index: int) -> float | None:
        try:
            return self._score(batch, index)
        except Exception as error:  # a model's text must not end the training
            if not self._warned:
                logger.warning("The reward %s failed, and counts 0 there: %r", self.__name__, error)
            self._warned = True
            return None


def _text(completion: Any) -> str:
    """A completion's text; of a conversation, that of its last message, which need not have any."""
    text = completion if isinstance(completion, str) else completion[-1].get("content") if completion else None
    return text if isinstance(text, str) else ""


def _report(
    texts: Sequence[str],
    log_extra: Callable[[str, list[Any]], None] | None,
    log_metric: Callable[[str, float], None] | None,
) -> None:
    answers = [final_answer(text) for text in texts]
    if log_metric is not None:
        log_metric("completions/malformed", answers.count(None) / len(answers))
    if log_extra is not None:
        log_extra("extracted_answer", answers)


def _score_of(name: str, args: RLConfig) -> Callable[[Batch, int], float]:
    if name == "cosine":
        return _cosine(args)
    if name == "repetition_penalty":
        penalty = get_repetition_penalty_reward(args.repetition_ngram, args.repetition_max_penalty)
        return lambda batch, index: penalty([batch.ids[index]])[0]
    return {"accuracy": _accuracy, "format": _format, "tag_count": _tag_count, "length": _length}[name]


def _accuracy(batch: Batch, index: int) -> float:
    return float(batch.right(index))


def _format(batch: Batch, index: int) -> float:
    """1 for reasoning, `</think>`, `<answer>`, an answer, `</answer>`, with nothing but whitespace between and after
    the tags, and none of them elsewhere. The prompt has opened `<think>`; that the completion does so again, at its
    very start, is fine. Neither the reasoning nor the answer may be blank."""
    parts = _TAG.split(batch.texts[index])
    if len(parts) > 1 and parts[1] == "<think>" and not parts[0].strip():
        parts = parts[2:]
    blank = [not part.strip() for part in parts[::2]]
    return float(parts[1::2] == ["</think>", "<answer>", "</answer>"] and blank == [False, True, False, True])


def _tag_count(batch: Batch, index: int) -> float:
    """A third for each of `</think>`, `<answer>` and `</answer>` that occurs exactly once: partial credit on the way
    to `format`, as in open-r1. `<think>` is in the prompt, and earns nothing."""
    return sum(batch.texts[index].count(tag) == 1 for tag in ("</think>", "<answer>", "</answer>")) / 3


def _cosine(args: RLConfig) -> Callable[[Batch, int], float]:
    """TRL's reward (huggingface.co/papers/2502.03373, C.1) with our judgement: from the bound for the shortest to that
    for the longest, on half a cosine of the length, and flat beyond.

    TRL's own [`~trl.rewards.get_cosine_scaled_reward`] takes conversations only, and finds an answer in a `\\boxed{}`
    only: to it, each answer in `<answer>` is wrong.
    """
    longest = args.cosine_max_length or args.max_completion_length
    if longest is None:
        raise ValueError(
            "The reward cosine needs the length of a long completion: set cosine_max_length, or max_completion_length."
        )

    def reward(batch: Batch, index: int) -> float:
        short, long = args.cosine_correct if batch.right(index) else args.cosine_wrong
        progress = min(len(batch.ids[index]) / longest, 1.0)
        return long + (short - long) * (1 + math.cos(math.pi * progress)) / 2

    return reward


def _length(batch: Batch, index: int) -> float:
    """Kimi 1.5's reward (huggingface.co/papers/2501.12599): 0.5 for the shortest of a prompt's completions, -0.5 for
    the longest, linear between; a wrong one gets no more than 0. Are all of one length, each gets 0.

    Tina's released code takes characters. The completions of the same prompt are its neighbours in the batch, which on
    several processes are those of this process.
    """
    first = last = index
    while first > 0 and batch.prompts[first - 1] == batch.prompts[index]:
        first -= 1
    while last + 1 < len(batch.prompts) and batch.prompts[last + 1] == batch.prompts[index]:
        last += 1
    lengths = [len(ids) for ids in batch.ids[first : last + 1]]
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return 0.0
    reward = 0.5 - (len(batch.ids[index]) - shortest) / (longest - shortest)
    return reward if batch.right(index) else min(0.0, reward)
