"""The answer in a completion, and whether it is right."""

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

from .normalization import normalized, unit, without_unit, words

_BOXED = "\\boxed{"
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_NUMBER = re.compile(r"-?\d{1,15}(\.\d{1,15})?", re.ASCII)
_BASED = re.compile(r"(\w+)_\{?(\w+)\}?")  # 52_8
# What needs no parser to be known as mathematics: numbers, terms of one variable or root, and sums and lists of them.
_POWER = r"(?:\^(?:\d|\{-?\d{1,3}\}))?"
_TERM = (
    r"-?(?:\d+(?:\.\d+)?|\d+/0*[1-9]\d*|\\[dt]?frac\{-?\d+\}\{0*[1-9]\d*\}"
    rf"|\d*(?:\\sqrt\{{\d+\}}|\\pi|[A-Za-hj-z]){_POWER})"
)
_TERMS = rf"(?:[A-Za-z] ?= ?)?{_TERM}(?: ?[-+,] ?{_TERM})*"
_PLAIN = re.compile(rf"{_TERMS}|\({_TERMS}\)|[^\W_]+_(?:[^\W_]+|\{{[^\W_]+\}})", re.ASCII)
# math-verify's grammar backtracks: 300 open brackets take it a second. Longer text is not parsed.
_MAX_PARSED = 512
# Of digits in a row, normalization takes the square of their number. Longer text is compared as it is.
_MAX_NORMALIZED = 4 * _MAX_PARSED


def extract_answer(completion: str) -> str | None:
    r"""Returns the final answer in a completion.

    It is what stands between the last `<answer>` and `</answer>` (a leading `Answer:`, as the paper's template has it,
    is dropped, and a `\boxed{...}` in it opened); without such tags the content of the last complete `\boxed{...}`;
    without either, or if that is blank, `None`.

    Args:
        completion (`str`):
            What the model wrote, without its prompt.
    """
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        inside = completion[start + len("<answer>") : end]
        answer = re.sub(r"^\s*answer\s*:", "", inside, flags=re.IGNORECASE).strip()
        if answer:
            return last_boxed(answer) or answer
    return last_boxed(completion) or None


def is_correct(answer: str | None, gold: str, tolerance: float = 0.0) -> bool:
    r"""Whether an answer is the verified one: the same text, whitespace aside, or mathematically equal by math-verify.

    Words are compared as words, without their case and article. Units are left out, unless both sides name one and
    they are known to differ (`cm`, `m`). Of numbers with a base (`52_8`) both must agree, if both are given. `10\%` is
    both 0.1 and 10.

    It may be called from any thread. math-verify runs in a process of its own, started when first needed; an answer on
    which it spends more than a few seconds, such as `9^{9^{9}}`, is wrong.

    Args:
        answer (`str` or `None`):
            What `extract_answer` returned; `None` is wrong.
        gold (`str`):
            The verified answer: plain, or LaTeX with or without its dollar signs.
        tolerance (`float`, *optional*, defaults to 0.0):
            Relative error at which two real numbers are still equal. 0 means math-verify's rule, six decimals, and as
            many digits for numbers near zero, where math-verify has any two equal.

    Raises:
        `RuntimeError`: if math-verify cannot be started. No answer raises anything.
    """
    if answer is None:
        return False
    given, wanted = " ".join(answer.split()), " ".join(gold.split())
    if max(len(given), len(wanted)) > _MAX_NORMALIZED:
        return given == wanted
    given, wanted = normalized(answer), normalized(gold)
    if given == wanted:
        return bool(given)
    if not given or not wanted or max(len(given), len(wanted)) > _MAX_PARSED:
        return False
    if not tolerance and _NUMBER.fullmatch(given) and _NUMBER.fullmatch(wanted):
        return float(given) == float(wanted)
    if (based := _BASED.fullmatch(given)) and (gold_based := _BASED.fullmatch(wanted)):
        return based.groups() == gold_based.groups()
    texts = words(given), words(wanted)
    # math-verify reads a word as a product of letters, and would take "silent" for "listen".
    if None not in texts:
        return texts[0] == texts[1]
    units = unit(answer), unit(gold)
    if None not in units and units[0] != units[1]:
        return False
    given, wanted = without_unit(given, wanted), without_unit(wanted, wanted)
    judge = _judge(os.getpid())
    if judge.equal(given, wanted, tolerance):
        return True
    without = given.replace(r"\%", ""), wanted.replace(r"\%", "")
    return (r"\%" in given) != (r"\%" in wanted) and judge.equal(*without, tolerance=tolerance)


def is_verifiable(gold: str) -> bool:
    r"""Whether answers can be compared with a gold at all: it is a number, a word, or mathematics.

    `\frac{1}{`, `??` and a page of proof are not: nothing but the same text would ever be right. A choice's letter and
    a variable are. Of a solution, its last `\boxed{...}` counts, as in [`resa_hf.evaluation.scoring.score`].

    Most numbers, fractions and words are known at sight, in microseconds; the rest is parsed by math-verify, in
    hundredths of a second, in the process of [`is_correct`] and with its limit of time.

    Args:
        gold (`str`):
            The answer that is to be verified against.

    Raises:
        `RuntimeError`: if math-verify cannot be started. No gold raises anything.
    """
    gold = last_boxed(gold) or gold
    if len(" ".join(gold.split())) > _MAX_NORMALIZED:
        return False
    wanted = normalized(gold)
    if not wanted or len(wanted) > _MAX_PARSED:
        return False
    # In other scripts, two letters are a word, and digits of their own a number.
    if _PLAIN.fullmatch(wanted) or words(wanted) is not None or (wanted.isalnum() and not wanted.isascii()):
        return True
    return _judge(os.getpid()).parses(without_unit(wanted, wanted))


class _Judge:
    """The process that runs `judge.py`. It ends with ours, or at an answer that takes too long; another follows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = self._start()

    def equal(self, answer: str, gold: str, tolerance: float) -> bool:
        return self._ask("equal", answer, gold, tolerance)

    def parses(self, gold: str) -> bool:
        return self._ask("parses", gold)

    def _ask(self, *question: str | float) -> bool:
        with self._lock:
            if self._process.poll() is not None:
                self._process = self._start()
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it has just died: no reply follows
                self._process.stdin.write(json.dumps(question) + "\n")
                self._process.stdin.flush()
            reply = self._process.stdout.readline()
            if not reply:
                self._process.wait()
            return reply == "true\n"

    @staticmethod
    def _start() -> subprocess.Popen[str]:
        # -P: our own folder must not come before the standard library's modules.
        command = [sys.executable, "-P", str(Path(__file__).with_name("judge.py"))]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", bufsize=1
        )
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("math-verify could not be started; its error stands above.")
        return process


@functools.cache  # one for all calls, as starting it takes a second; a forked process must not talk into its parent's
def _judge(pid: int) -> _Judge:
    return _Judge()


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}`, if there is one; `\{` and `\}` are no braces."""
    if _BOXED not in text:
        return None
    opened: list[int] = []
    last = None
    for match in _BRACE.finditer(text):
        if match.group() == "{":
            opened.append(match.end())
        elif match.group() == "}" and opened:
            start = opened.pop()
            if text.endswith(_BOXED, 0, start) and (last is None or start > last[0]):
                last = start, match.start()
    return text[slice(*last)].strip() if last else None
