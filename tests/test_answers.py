"""Answers taken from completions, and judged: pairs that a person has judged."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from resa_hf.evaluation import answers
from resa_hf.evaluation.answers import extract_answer, is_correct

RIGHT = [
    ("4", "4"),
    (" 4\n", "4"),
    ("007", "7"),
    ("5.", "5"),
    ("3.0", "3"),
    ("$12$", "12"),
    ("12", "$12$"),
    (r"\(12\)", "12"),
    (r"\[ 12 \]", "$$12$$"),
    ("-2/3", r"-\frac{2}{3}"),
    (r"\dfrac{2}{3}", r"\frac23"),
    ("0.5", r"\frac{1}{2}"),
    (r"1\frac12", "1.5"),
    ("1,234", "1234"),
    ("1234", "1{,}234"),
    (r"\$18.90", "18.90"),
    ("$18.90", "18.90"),
    (r"12\%", r"12\%"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    ("2^{10}", "1024"),
    ("10!", "3628800"),
    (r"\log_2 8", "3"),
    (r"\pi/2", r"\frac{\pi}{2}"),
    (r"90^\circ", "90"),
    (r"10 \text{ cm}", "10"),
    ("(1,2)", "(1, 2)"),
    (r"\left(1,2\right)", "(1,2)"),
    ("[0,1)", "[0, 1)"),
    (r"(-\infty, 3]", r"(-\infty,3]"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("6, 7", "7,6"),
    ("x = 5", "5"),
    ("5", "x=5"),
    ("y=2x+1", "y = 1+2x"),
    ("x>3", "3<x"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    (r"\text{(C)}", "(C)"),
    ("C", r"\text{C}"),
    ("Evelyn", r"\text{Evelyn}"),
    ("evelyn", "Evelyn"),
]
WRONG = [
    (None, "4"),
    ("", "4"),
    ("", ""),
    ("5", "4"),
    ("-4", "4"),
    ("44", "4"),
    ("4 4", "4"),
    ("10", "0"),
    ("1.5", "1.05"),
    ("0.9999", "1"),
    ("0.33", r"\frac{1}{3}"),
    ("3.14", r"\pi"),
    ("12345", "1234"),
    (r"\frac{3}{2}", r"\frac{2}{3}"),
    (r"\sqrt{2}", "2"),
    ("2^{9}", "1024"),
    (r"\frac{0}{0}", "0"),
    (r"\infty", r"-\infty"),
    ("-1", "i"),
    ("1", "1,2"),
    ("1,2", "1"),
    ("4 or 5", "4"),
    ("x=3 or x=4", "4"),
    ("(2,1)", "(1,2)"),
    ("[0,1]", "[0,1)"),
    (r"\{1,2,3\}", r"\{1,2\}"),
    ("x+1", "x+2"),
    ("x<3", "x>3"),
    ("y=2x", "y=3x"),
    (r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ("A", "B"),
    (r"\text{(C)}", "(D)"),
    ("Carla", "Evelyn"),
    ("silent", "listen"),
    ("unknown", "4"),
    ("4abc", "4"),
    ("not 4", "4"),
    ("2+3", "6"),
    ("5+", "6"),
    ("{", "4"),
    ("1" * 600, "1" * 601),
]


@pytest.mark.parametrize(("answer", "gold"), RIGHT)
def test_right(answer: str, gold: str) -> None:
    assert is_correct(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), WRONG)
def test_wrong(answer: str | None, gold: str) -> None:
    assert not is_correct(answer, gold)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>2+2=4</think><answer>4</answer>", "4"),
        (" 4 </think>\n<answer> Answer: 4</answer>", "4"),
        ("<answer>\nanswer : x = 4 \n</answer>", "x = 4"),
        ("<answer>3</answer> wait <answer>4</answer>", "4"),
        ("<answer>3</answer> wait <answer>4", "3"),
        ("<answer> so <answer>4</answer>", "4"),
        (r"<answer>It is $\boxed{\frac{1}{2}}$.</answer>", r"\frac{1}{2}"),
        (r"\boxed{3}<answer>4</answer>", "4"),
        (r"\boxed{3}<answer> </answer>", "3"),
        (r"\boxed{3}</answer>", "3"),
        (r"first \boxed{1}, then \boxed{\frac{a}{b^{2}}}.", r"\frac{a}{b^{2}}"),
        (r"\boxed{ \{1,2\} }", r"\{1,2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{4} and cut off \boxed{\frac{1", "4"),
        (r"\boxed{\boxed{4}}", "4"),
        (r"\boxed{\frac{1", None),
        (r"\boxed{}", None),
        ("<answer></answer>", None),
        ("</answer>4<answer>", None),
        ("the answer is 4", None),
        ("", None),
    ],
)
def test_extract_answer(completion: str, answer: str | None) -> None:
    assert extract_answer(completion) == answer


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("123xyab+-*/=(){}[]<>,.;:$%& \\_√π\n\0"), max_size=30))
@example("\\frac")
@example("(" * 300)
@example("\\left(\\right)" * 20)
def test_any_text_is_judged_without_an_error(text: str) -> None:
    assert is_correct(text, "unlikely 17/19") is False


def test_judges_in_threads() -> None:
    def judge(index: int) -> tuple[bool, bool]:
        return is_correct(f"{index}/2", rf"\frac{{{index}}}{{2}}"), is_correct(f"{index}/3", rf"\frac{{{index}}}{{2}}")

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(judge, range(1, 41))) == [(True, False)] * 40


def test_goes_on_when_its_process_has_died() -> None:
    assert is_correct("1/2", r"\frac12")
    answers._judge(os.getpid())._process.kill()
    # The death may be noticed before the answer is sent, or only when no reply comes.
    is_correct("1/2", r"\frac12")
    assert is_correct("1/2", r"\frac12")


@pytest.mark.slow
def test_an_answer_that_takes_forever_is_wrong() -> None:
    start = time.monotonic()
    assert not is_correct("9^{9^{9}}", "7+y")
    assert is_correct("y+7", "7+y")
    assert time.monotonic() - start < 30
