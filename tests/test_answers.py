"""Answers taken from completions, and judged: pairs that a person has judged."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from resa_hf.evaluation import answers
from resa_hf.evaluation.answers import extract_answer, is_correct, is_verifiable, last_boxed

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


# What is known at sight, and what math-verify must read.
PLAIN_GOLDS = [
    *("0", "4", " 4\n", "-7", "$12$", "3.50", "1,234", "9" * 500, "3/4", "-3/4"),
    *(r"\frac{1}{2}", r"\dfrac{-1}{20}", r"-\frac{1}{2}", r"\sqrt{2}", r"2\sqrt{3}", r"\pi", "5π"),
    *("2x+1", "y = 2x - 3", "(1, 2)", "(C)", "6, 7", "x=3", r"3 - \sqrt{5}"),
    *("A", "x", "-x", "52_8", "1A_{16}", "Evelyn", r"\text{Evelyn}", "no real solution", "zwölf", "无解", "四", "١٢"),
    *(r"Hence it is $\boxed{7}$.", r"\boxed{\frac{1}{2}}"),
]
PARSED_GOLDS = [
    *(r"\text{(C)}", "No", "[0,1)", r"\{1,2\}", "x>3", "x = 1, y = 2", "2xy", r"10\%"),
    *(r"\frac12", r"\frac{x}{2}", r"\frac{1}{\sqrt{2}}", "2^{10}", "10!", r"90^\circ", r"10 \text{ cm}", "x^2+2x+1"),
    *(r"\infty", r"\emptyset", r"(-\infty, 3]", r"2 \text{ and } 3", r"0.\overline{3}", "1.6e-19", "12:30"),
    *(r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\mathbb{R}", "i", "9^{9^{9}}", r"\$5", "AB"),
]
UNVERIFIABLE = [
    *("", " ", "\n", "??", "?", "...", ".", "-", "--", "$", "$$", "()", "[]", "{", "}"),
    *("*", "+", "<", "\\", "_", "___", "x +"),
    *(r"\frac{1}{", r"\frac", r"\frac{}{}", r"\sqrt{", r"\sqrt{}", r"\text{}", r"\ldots", r"\cdots", "y = ", "x^2+"),
    *("1/0", r"\frac{1}{0}", r"\frac{0}{0}", "https://x.y/z.png", r"\boxed{}", r"\boxed{??}", "\0", "\ud800"),
    *("Let n be even, so that n = 2k. " * 60, "7" * 513, "x" * 10**6, "1" * 10**6, "(" * 10**6, " " * 10**6),
]


@pytest.mark.parametrize("gold", [*PLAIN_GOLDS, *PARSED_GOLDS])
def test_verifiable(gold: str) -> None:
    assert is_verifiable(gold)


@pytest.mark.parametrize("gold", UNVERIFIABLE, ids=lambda gold: ascii(gold[:20]))
def test_not_verifiable(gold: str) -> None:
    assert not is_verifiable(gold)


def test_what_is_plain_is_verifiable_without_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_judge", None)
    start = time.monotonic()
    assert all(is_verifiable(gold) for gold in PLAIN_GOLDS)
    assert all(is_verifiable(f"{number}") for number in range(-20_000, 20_000))
    assert time.monotonic() - start < 10


TERMS = [
    "1",
    "-3",
    "2.5",
    "7/3",
    r"\frac{1}{2}",
    r"3\sqrt{5}",
    r"\pi^2",
    "2x",
    "y^{10}",
    "A",
    "e",
    "N",
    "i",
    "007",
    "2^3",
]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from(["", "x = ", "y="]),
    st.lists(st.tuples(st.sampled_from(TERMS), st.sampled_from(["+", " - ", ",", ", "])), min_size=1, max_size=4),
    st.booleans(),
)
def test_what_is_plain_is_mathematics_to_math_verify(left: str, terms: list[tuple[str, str]], bracketed: bool) -> None:
    gold = left + "".join(part for pair in terms for part in pair[::-1]).lstrip("+-, ")
    gold = f"({gold})" if bracketed else gold
    if answers._PLAIN.fullmatch(gold):
        assert answers._judge(os.getpid()).parses(gold)


@pytest.mark.parametrize("gold", ["(" * 512, "9^" * 255 + "9", r"\left(\right)" * 36])
def test_any_gold_is_looked_at_in_time(gold: str) -> None:
    start = time.monotonic()
    is_verifiable(gold)
    assert is_verifiable("(1,2)")
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\\boxed{4}", "4"),
        (r"\{\boxed{4}", "4"),
        (r"}\boxed{4}", "4"),
        (r"{\boxed{4}", "4"),
        (r"\boxed{3\boxed{4}", "4"),
        (r"\boxed{3\boxed{4}5}6", "4"),
        (r"\boxed{3}\boxed{4", "3"),
        (r"\boxed{3\}", None),
        (r"\boxed{3\\}", r"3\\"),
        ("boxed{3}", None),
        (r"\boxed {3}", None),
        (r"\boxed{" * 140_000, None),
        (r"\boxed{4}" + r"\boxed{" * 140_000, "4"),
        (r"\boxed{" * 140_000 + "4" + "}" * 140_000, "4"),
    ],
    ids=range(14),
)
def test_last_boxed_in_time(text: str, content: str | None) -> None:
    start = time.monotonic()
    assert last_boxed(text) == content
    assert time.monotonic() - start < 2


def test_long_answers_are_compared_in_time() -> None:
    start = time.monotonic()
    for text in ("1" * 10**6, "(" * 10**6, "a b " * 10**5):
        assert not is_correct(text, "4") and not is_correct("4", text) and not is_correct(text, text + "1")
        assert is_correct(f" {text}\n", text)
    assert time.monotonic() - start < 5


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
