"""Question-answer rows as GRPO takes them: prompts that end where the response begins, golds that can be judged."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..evaluation.answers import is_verifiable
from ..on_disk import BATCH, write_arrow
from ..text import Template, encode_prompt, evaluation_prompt, trl_prompt

_COLUMNS = pa.schema([(name, pa.string()) for name in ("prompt", "problem", "answer")])


@dataclass(frozen=True)
class PromptReport:
    """What became of the rows.

    Args:
        rows (`int`): looked at.
        unverifiable (`int`): left out, because no answer could be compared with their gold.
        too_long (`int`): left out, because the prompt is longer than `max_prompt_length`.
        largest_token (`int`): in any prompt that is not left out.
    """

    rows: int
    unverifiable: int
    too_long: int
    largest_token: int

    @property
    def kept(self) -> int:
        """Rows to train on."""
        return self.rows - self.unverifiable - self.too_long

    def describe(self) -> str:
        """One sentence, for a log line or a report."""
        reasons = (
            (self.unverifiable, "whose answer cannot be parsed"),
            (self.too_long, "with a longer prompt than max_prompt_length"),
        )
        left_out = ", ".join(f"{count:,} {reason}" for count, reason in reasons if count)
        return f"{self.kept:,} of {self.rows:,} prompts" + (f"; left out: {left_out}." if left_out else ".")


def prompt_rows(
    rows: datasets.Dataset, template: Template, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int
) -> tuple[datasets.Dataset, PromptReport]:
    """Rows with `prompt`, `problem` and `answer`, as text.

    Args:
        rows (`datasets.Dataset`):
            With `problem` and `answer`.
        template (`str`):
            As for [`~resa_hf.text.evaluation_prompt`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's.
        max_prompt_length (`int`):
            In tokens.

    Raises:
        `DataError`: if no row is left, or the tokenizer cannot read a prompt as evaluation does.
    """
    counts = Counter[str]()

    def kept() -> Iterator[list[str]]:
        for batch in rows.iter(BATCH):
            for problem, answer in zip(batch["problem"], batch["answer"], strict=True):
                counts["rows"] += 1
                prompt = evaluation_prompt(problem, template=template, tokenizer=tokenizer)
                if not is_verifiable(answer):
                    counts["unverifiable"] += 1
                elif len(tokens := encode_prompt(prompt, tokenizer)) > max_prompt_length:
                    counts["too_long"] += 1
                else:
                    counts["largest_token"] = max((counts["largest_token"], *tokens))
                    yield [trl_prompt(prompt, tokenizer), problem, answer]

    made = write_arrow(kept(), _COLUMNS)
    names = ("rows", "unverifiable", "too_long", "largest_token")
    report = PromptReport(*(counts[name] for name in names))
    if not len(made):
        raise DataError(f"There is nothing to train on: {report.describe()}")
    return made, report
