r"""The judgement of a whole completion. Imports no lighteval.

The final answer is looked for behind the reasoning, that is, after the last `</think>`, or in the whole completion
when it has no such tags: inside `<answer>`, in the last `\boxed{}`, or in a last line such as `Answer: C` or `the
final answer is 12`. Only when nothing is found there does an answer count that the reasoning itself marks with
`<answer>` or `\boxed{}`: some models end there. A number that is not marked as the answer is none.
"""

import re

from .answers import extract_answer, is_correct, last_boxed
from .benchmarks import Kind

# Minerva's numbers are rounded; of 125 with a decimal point or a power of ten, 59 are given to three digits and 28 to
# two. 1% is one unit in the last place of 1.00. Whole numbers below 100 must be met exactly, as 1% of them is below 1.
MINERVA_TOLERANCE = 0.01

_STATED = re.compile(r"(?:answer|option|choice)\**\s*(?:is\s*:?|:)\s*(.+?)\s*(?:\.\s.*|\.)?$", re.IGNORECASE)
_LETTER = re.compile(r"([A-D])(?:\s*$|\s*[).:,\-](?!\s*[A-D]\b))")


def score(kind: Kind, completion: str, gold: str) -> tuple[bool, str | None]:
    r"""Judges a completion.

    Args:
        kind (`str`):
            `"math"`: equal as mathematics. `"minerva"`: so too, real numbers within 1%. `"choice"`: a letter, A to D.
        completion (`str`):
            What the model wrote after the prompt.
        gold (`str`):
            The right answer: plain, as LaTeX, as a solution with the answer in its last `\boxed{}`, or a letter.

    Returns:
        `tuple[bool, str | None]`: whether it is right, and the answer found, if any.
    """
    answer = final_answer(completion)
    if kind == "choice":
        letter = _letter(answer) if answer else None
        return letter == gold, letter
    tolerance = MINERVA_TOLERANCE if kind == "minerva" else 0.0
    return is_correct(answer, last_boxed(gold) or gold, tolerance), answer


def final_answer(completion: str) -> str | None:
    """The answer that a completion ends with, and not one that its reasoning tried; see the top of this file."""
    reasoning, closed, rest = completion.rpartition("</think>")
    if not closed and "<think>" in completion:  # cut off while thinking
        reasoning, rest = completion, ""
    return extract_answer(rest) or _stated(rest) or extract_answer(reasoning)


def _stated(text: str) -> str | None:
    lines = text.strip().splitlines()
    # The pattern takes the square of the blanks in a row, of which a model may write thousands.
    match = _STATED.search(" ".join(lines[-1].split())) if lines else None
    return match[1].strip("* ") if match else None  # bold in Markdown


def _letter(answer: str) -> str | None:
    """The one letter that an answer names: `C`, `(C)`, `**C**`, `C) benzene`, but not `A or C`."""
    text = re.sub(
        r"\\(?:text|textbf|mathrm|mathbf)\{|[*$(){}\[\]_`]", lambda match: ")" if match[0] in ")]}" else "", answer
    )
    match = _LETTER.match(text.strip())
    return match[1] if match else None
