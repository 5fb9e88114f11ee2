"""The tiny reasoner's accuracy, by plain generation."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resa_hf.tiny.task import Problem


@dataclass(frozen=True)
class Accuracy:
    """What `measure` found.

    Attributes:
        accuracy (`float`): share of problems answered correctly, 0 to 1.
        standard_error (`float`): of `accuracy`, binomial.
        traced (`float`): share of replies whose thought is more than a bare answer, 0 to 1.
        count (`int`): how many problems.
    """

    accuracy: float
    standard_error: float
    traced: float
    count: int

    def __str__(self) -> str:
        return f"{self.accuracy:.4f} +- {self.standard_error:.4f} (n={self.count}, traced {self.traced:.2f})"


def read_answer(reply: str) -> str | None:
    """The text between the reply's last answer tags, stripped; `None` if it has none."""
    answers = re.findall(r"<answer>(.*?)</answer>", reply, flags=re.DOTALL)
    return answers[-1].strip() if answers else None


def prompt_text(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The question as chat, up to and with the `<think>` that opens the reply."""
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@torch.no_grad()
def sample_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    temperature: float,
    seed: int,
    batch_size: int = 250,
) -> list[str]:
    """One reply to each question, of at most 64 new tokens, without the special tokens.

    Args:
        model (`PreTrainedModel`): a tiny reasoner in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, padding on the left.
        questions (`Sequence[str]`): as in `Problem.question`.
        temperature (`float`): 0 for greedy decoding.
        seed (`int`): of the sampling; torch's global generator is left as it was found.
        batch_size (`int`, *optional*, defaults to `250`): questions a call of `generate`.
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    replies: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(questions), batch_size):
            prompts = [prompt_text(tokenizer, question) for question in questions[start : start + batch_size]]
            encoded = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
            # transformers types `generate` for its mixin only, which `PreTrainedModel` does not name.
            output = model.generate(**encoded, max_new_tokens=64, **sampling)  # type: ignore[operator]
            new_tokens = output[:, encoded["input_ids"].shape[1] :]
            replies += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return replies


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    temperature: float = 1.0,
    seed: int = 0,
) -> Accuracy:
    """Sample one reply to each problem and count the correct ones; the arguments are those of `sample_replies`."""
    replies = sample_replies(model, tokenizer, [problem.question for problem in problems], temperature, seed)
    count = len(problems)
    accuracy = sum(read_answer(r) == p.answer for r, p in zip(replies, problems, strict=True)) / count
    traced = sum("=" in reply.split("</think>")[0] for reply in replies) / count
    return Accuracy(accuracy, (accuracy * (1 - accuracy) / count) ** 0.5, traced, count)
