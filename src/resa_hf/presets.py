"""The paper's datasets as they lie on the Hub: names, revisions, licences, and where question and answer stand.

All have one split, `train`. Sources of what is written here (none of it could be checked against the Hub itself):
the released code of Resa and Tina for the columns (github.com/shangshang-wang/Resa, scripts/train/sae_tuning.py;
github.com/shangshang-wang/Tina, tina/post_train_hf/grpo.py), the dataset cards for the rest, and for the commits the
public code that pins them, named beside each.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Read = Callable[[Any], Any]
Columns = Mapping[str, tuple[str, Read]]


def _text(cell: Any) -> Any:
    return cell


def _first_user_message(messages: Any) -> Any:
    """The content of the first message of the user."""
    return next((message["content"] for message in messages if message["role"] == "user"), None)


def _verified_value(info: Any) -> Any:
    """`'{"type": "math_verifiable", "answer": {"value": "152"}}'`; "152" is the answer."""
    return json.loads(info)["answer"]["value"]


@dataclass(frozen=True)
class QAPreset:
    """A Hub dataset of question-answer rows, and how to read it.

    Args:
        repo (`str`):
            Its id.
        question_column (`str`), answer_column (`str`):
            The columns to read.
        read_question (`Callable`), read_answer (`Callable`):
            From a cell that is not missing to its text. What they raise (`ValueError`, `TypeError`, `LookupError`)
            means that the cell cannot be read.
        config (`str`, *optional*):
            The configuration, of a dataset with several.
        revision (`str`, *optional*):
            The commit to read. `None` where no public record of a full commit hash was found: then the newest is
            read, and the report tells which.
        licence (`str`, *optional*):
            The Hub's id of its licence; `None` where its card names none.
    """

    repo: str
    question_column: str = "problem"
    answer_column: str = "answer"
    read_question: Read = _text
    read_answer: Read = _text
    config: str | None = None
    revision: str | None = None
    licence: str | None = None

    def columns(self, question: str | None = None, answer: str | None = None, solution: str | None = None) -> Columns:
        """Where `problem`, `answer` and, if named, `solution` stand, and how to read them: what is named, as text."""
        columns = {
            "problem": (question, _text) if question else (self.question_column, self.read_question),
            "answer": (answer, _text) if answer else (self.answer_column, self.read_answer),
        }
        return columns | {"solution": (solution, _text)} if solution else columns


PRESETS: Mapping[str, QAPreset] = {
    # 33k rows: question, answer.
    "still": QAPreset("RUC-AIBOX/STILL-3-Preview-RL-Data", question_column="question"),
    # 40.3k rows: problem, answer, solution. Pinned by Prime Intellect's DeepScaleR environment, among others.
    "deepscaler": QAPreset(
        "agentica-org/DeepScaleR-Preview-Dataset",
        revision="b6ae8c60f5c1f2b594e2140b91c49c9ad0949e29",
        licence="mit",
    ),
    # 18.6k rows: problem, solution, answer, source, messages.
    "open-s1": QAPreset("knoveleng/open-s1", licence="mit"),
    # 7k rows: problem, solution, answer, level. Commit: Tina, outputs/rl_signal_split_open_rs3_vllm_final.
    "open-rs": QAPreset("knoveleng/open-rs", revision="8de2b2d11162d97b45c7606902eae2bb1ff629b4", licence="mit"),
    # 53.3k rows: messages, verification_info (its JSON: github.com/Intelligent-Internet/ii-thought, rl_verifier). The
    # released code takes the first message, and puts the answer between dollars.
    "ii-thought": QAPreset(
        "Intelligent-Internet/II-Thought-RL-v0-Math-50K",
        question_column="messages",
        answer_column="verification_info",
        read_question=_first_user_message,
        read_answer=_verified_value,
    ),
    # 93.7k rows: problem, solution, answer, generations, messages and ten more. The commit's page is
    # huggingface.co/datasets/open-r1/OpenR1-Math-220k/tree/e4e141ec9dea9f8326f4d347be56105859b2bd68.
    "openr1-math": QAPreset(
        "open-r1/OpenR1-Math-220k",
        config="default",
        revision="e4e141ec9dea9f8326f4d347be56105859b2bd68",
        licence="apache-2.0",
    ),
    # 1.39k rows in limr.json: prompt, answer.
    "limr": QAPreset("GAIR/LIMR", question_column="prompt"),
}
