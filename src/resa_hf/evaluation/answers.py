"""The answer in a completion, and whether it is right."""

import functools
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

_BOXED = "\\boxed{"
_NUMBER = re.compile(r"-?\d{1,15}(\.\d{1,15})?", re.ASCII)
# math-verify's grammar backtracks: 300 open brackets take it a second. Longer text is not parsed.
_MAX_PARSED = 512


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
            return _last_boxed(answer) or answer
    return _last_boxed(completion) or None


def is_correct(answer: str | None, gold: str) -> bool:
    r"""Whether an answer is the verified one: the same text, whitespace aside, or mathematically equal by math-verify.

    It may be called from any thread. math-verify runs in a process of its own, started when first needed; an answer on
    which it spends more than a few seconds, such as `9^{9^{9}}`, is wrong.

    Args:
        answer (`str` or `None`):
            What `extract_answer` returned; `None` is wrong.
        gold (`str`):
            The verified answer: plain, or LaTeX with or without its dollar signs.

    Raises:
        `RuntimeError`: if math-verify cannot be started. No answer raises anything.
    """
    if answer is None:
        return False
    given, wanted = _normalized(answer), _normalized(gold)
    if given == wanted:
        return bool(given)
    if not given or not wanted or max(len(given), len(wanted)) > _MAX_PARSED:
        return False
    if _NUMBER.fullmatch(given) and _NUMBER.fullmatch(wanted):
        return float(given) == float(wanted)
    # math-verify reads a word as a product of letters, and would take "silent" for "listen".
    if wanted.isalpha() and given.isalpha() and len(wanted) > 2:
        return given.casefold() == wanted.casefold()
    return _judge(os.getpid()).equal(given, wanted)


class _Judge:
    """The process that runs `judge.py`. It ends with ours, or at an answer that takes too long; another follows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = self._start()

    def equal(self, answer: str, gold: str) -> bool:
        with self._lock:
            if self._process.poll() is not None:
                self._process = self._start()
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps([answer, gold]) + "\n")
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


def _normalized(text: str) -> str:
    """One space for any whitespace; no dollar signs, display brackets or final full stop around the whole."""
    text = " ".join(text.split()).removesuffix(".")
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing):
            text = text[len(opening) : -len(closing)]
    return text.replace(r"\$", "").removeprefix("$").strip().removesuffix(".").strip()


def _last_boxed(text: str) -> str | None:
    start = text.rfind(_BOXED)
    while start >= 0:
        content = _braced(text, start + len(_BOXED))
        if content is not None:
            return content.strip()
        start = text.rfind(_BOXED, 0, start)
    return None


def _braced(text: str, start: int) -> str | None:
    r"""What stands before the brace that closes the one before `start`; `\{` and `\}` are no braces."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[start : match.start()]
    return None
