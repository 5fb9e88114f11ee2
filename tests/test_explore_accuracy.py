"""Many problems: the answers of an evaluation, and its verdict."""

import json
import re
import time

import pytest
from tiny_merged import LOCAL

from resa_hf.adapters import load_reasoning_adapter
from resa_hf.errors import ExploreError
from resa_hf.evaluation.comparison import Answers, compare
from resa_hf.evaluation.engine import Sampling, answer
from resa_hf.explore.accuracy import measure, problems_from_text, tiny_problems
from resa_hf.explore.bench import Workbench
from resa_hf.explore.solving import solve
from resa_hf.text import evaluation_prompt
from resa_hf.tiny import tiny_path
from resa_hf.tiny.task import answer_of, training_questions


@pytest.fixture(scope="module")
def bench():
    return Workbench(LOCAL, device="cpu")


def test_accuracies_and_verdict_are_those_of_an_evaluation(bench, tiny_base, tiny_tokenizer):
    problems = tiny_problems(24, seed=3)
    *steps, found = measure(bench, "tiny", {"source": 1.0}, problems=problems, seed=5, max_new_tokens=64)
    prompts = [evaluation_prompt(problem, template="chat", tokenizer=tiny_tokenizer) for problem, _ in problems]
    model = load_reasoning_adapter(tiny_base, tiny_path("source"))
    settings = (prompts, [gold for _, gold in problems], Sampling(seed=5, max_new_tokens=64))
    tuned = answer(model, tiny_tokenizer, *settings, progress=False).correct
    with model.disable_adapter():
        base = answer(model, tiny_tokenizer, *settings, progress=False).correct
    expected = compare(Answers("base", {"t": [base]}), [Answers("source", {"t": [tuned]})], 0.02, {"source": ()})[1]
    assert found.sentence == f"{expected.verdict.sentence}."
    assert found.verdict == expected.verdict.word
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.table.splitlines()[2:]]
    assert [row[0] for row in cells] == ["base", "source"]
    assert [float(row[1]) for row in cells] == pytest.approx([100 * base.mean(), 100 * tuned.mean()], abs=0.051)
    assert float(cells[1][3]) == pytest.approx(100 * (tuned.mean() - base.mean()), abs=0.051)
    assert (found.done, found.total) == (24, 24)
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert {step.total for step in steps} == {24}
    assert all(step.table is step.verdict is None for step in steps)


def test_without_adapters_there_is_one_accuracy(bench):
    *_, found = measure(bench, "tiny", {}, problems=tiny_problems(4, 0), max_new_tokens=64)
    assert found.verdict is None
    assert len(found.table.splitlines()) == 3
    assert found.sentence == "4 problems answered."


def test_a_visitor_in_between_changes_nothing(bench):
    problems = tiny_problems(20, 1)
    *_, alone = measure(bench, "tiny", {"source": 0.5}, problems=problems, max_new_tokens=16)
    running = measure(bench, "tiny", {"source": 0.5}, problems=problems, max_new_tokens=16)
    steps = []
    for step in running:
        steps.append(step)
        if len(steps) % 20 == 5:
            list(solve(bench, "tiny", {"source": -2.0}, "1+1*3 mod 10", max_new_tokens=16))
    assert steps[-1] == alone
    assert "0.5 x source" in alone.table


def test_it_can_be_left_in_the_middle(bench):
    running = measure(bench, "tiny", {"source": 1.0}, problems=tiny_problems(20, 1))
    for _ in range(5):
        next(running)
    assert not bench.open("tiny", ["source"]).lock.locked()
    running.close()
    assert not bench.open("tiny", ["source"]).lock.locked()


def test_tiny_problems_are_new_and_right():
    problems = tiny_problems(200, seed=10_000)  # with this seed the base's own training problems are drawn
    assert len({question for question, _ in problems}) == 200
    assert not {question for question, _ in problems} & training_questions()
    for question, gold in problems:
        value, *steps = re.findall(r"[+*-]?\d", question.removesuffix(" mod 10"))
        for step in steps:
            value = str(eval(f"({value}){step}") % 10)
        assert value == gold == answer_of(question)
    assert tiny_problems(5, 1) == tiny_problems(5, 1) != tiny_problems(5, 2)
    for count, seed in ((1, 0), (201, 0), (5, -1), (5, 2**31)):
        with pytest.raises(ExploreError, match="must be a number from"):
            tiny_problems(count, seed)


@pytest.mark.parametrize("text", ["", "7*4", "7*4 mod 11", "17*4 mod 10", "7*4 mod 10?", "7/4 mod 10", "7*4 mod 10\n"])
def test_other_texts_are_no_chains(text):
    assert answer_of(text) is None


def test_pasted_problems():
    rows = [{"problem": "What is\n2+2?", "answer": 4}, {"problem": 'A "b"', "answer": r"\frac{1}{2}", "source": "x"}]
    text = "1+1\t2\n\n  What is {1}?\t{1}\n" + "\n".join(map(json.dumps, rows))
    expected = [("1+1", "2"), ("What is {1}?", "{1}"), ("What is\n2+2?", "4"), ('A "b"', r"\frac{1}{2}")]
    assert problems_from_text(text) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "0 problems were given; 2 to 200"),
        ("1+1\t2\nno answer", "Line 2 is neither"),
        ('{"problem": "1+1"}', "Line 1 is neither"),
        ('{"problem": "1+1", "answer"', "Line 1 is neither"),
        ("{" * 5000, "Line 1 is neither"),
        ("1+1\t2", "1 problems were given"),
        ("1+1\t2\n1+1\t ", "Problem 2 has no right answer"),
        ("1+1\t2\n\t2", "Problem 2: There is no problem"),
        ("1\t1\n" + "1" * 4001 + "\t1", "Problem 2: The problem has 4,001 characters"),
        ("1\t1\n" * 201, "201 problems were pasted; at most 200"),
        ("1" * 2_000_000, "2,000,000 characters"),
    ],
)
def test_pastes_that_are_not_read(text, told):
    with pytest.raises(ExploreError, match=told):
        problems_from_text(text)


def test_nothing_is_answered_that_cannot_be(bench):
    for problems in ([], [("1+1", "2")], [("1+1", "2")] * 201):
        with pytest.raises(ExploreError, match="2 to 200"):
            next(measure(bench, "tiny", {}, problems=problems))
    with pytest.raises(ExploreError, match="temperature is 3"):
        next(measure(bench, "tiny", {}, problems=[("1+1", "2")] * 2, temperature=3))


def test_a_right_answer_that_takes_too_long_to_compare_stops_the_run(bench, monkeypatch):
    """Two hundred of them would keep the one process that judges for all visitors for more than an hour."""
    judged = []

    def score(kind, completion, gold):
        judged.append(gold)
        time.sleep(0.2 if gold == "slow" else 0)
        return False, None

    monkeypatch.setattr("resa_hf.explore.accuracy.score", score)
    monkeypatch.setattr("resa_hf.explore.accuracy._JUDGED_WITHIN", 0.1)
    problems = [("1+2 mod 10", "3"), ("2+2 mod 10", "slow"), ("3+2 mod 10", "slow")]
    with pytest.raises(ExploreError, match="Problem 2: it takes too long to tell whether an answer is 'slow'"):
        list(measure(bench, "tiny", {}, problems=problems, max_new_tokens=8))
    assert judged == ["3", "slow"]


def test_more_tokens_than_one_visitor_may_have(bench):
    with pytest.raises(ExploreError, match=r"200 answers of up to 513 tokens are too much .*: 512 tokens each"):
        next(measure(bench, "tiny", {}, problems=[("1+2 mod 10", "3")] * 200, max_new_tokens=513))
