"""The rewards of GRPO, against completions that a person has judged and formulas worked out by hand."""

import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reward_cases import ANSWERS, CASES
from trl.rewards import get_cosine_scaled_reward

from resa_hf.rl import rewards as module
from resa_hf.rl.config import RLConfig
from resa_hf.rl.rewards import Reward, make_rewards


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """`made("cosine", ..., **settings)`: these rewards, by their names."""

    def make(*names: str, **settings: Any) -> dict[str, Reward]:
        return {reward.__name__: reward for reward in make_rewards(config(tmp_path, *names, **settings))}

    return make


def config(folder: Path, *names: str, **settings: Any) -> RLConfig:
    return RLConfig(output_dir=str(folder), use_cpu=True, report_to="none", reward_funcs=list(names), **settings)


def call(reward: Reward, completions: list[Any], answer: list[Any] | None = None, **columns: Any) -> list[Any]:
    """As GRPOTrainer calls it; each completion has its own prompt and, unless told, as many tokens as characters."""
    columns = {"prompts": [f"question {index}" for index in range(len(completions))], **columns}
    columns = {"completion_ids": [list(range(len(text))) for text in completions], **columns}
    if answer is not None:
        columns["answer"] = answer
    return list(reward(completions=completions, trainer_state=None, **columns))


def conversation(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(("completion", "gold", "right", "formed", "tags", "answer"), CASES)
def test_completions_judged_by_hand(
    made: Any, completion: str, gold: str, right: int, formed: int, tags: int, answer: str | None
) -> None:
    columns: dict[str, list[Any]] = {}
    metrics: dict[str, float] = {}
    logs = {"log_extra": columns.__setitem__, "log_metric": metrics.__setitem__}
    found = made("accuracy", "format", "tag_count")
    for form in (completion, conversation(completion)):
        assert call(found["accuracy"], [form], [gold], **logs) == [right]
        assert call(found["format"], [form], [gold]) == [formed]
        assert call(found["tag_count"], [form]) == [pytest.approx(tags / 3)]
        assert columns == {"extracted_answer": [answer]}
        assert metrics == {"completions/malformed": float(answer is None), "rewards/accuracy/failed": 0.0}


@pytest.mark.parametrize(("answer", "gold", "right"), ANSWERS)
def test_answers_judged_by_hand(made: Any, answer: str, gold: str, right: int) -> None:
    found = made("accuracy", "cosine", "format", cosine_max_length=100)
    texts = [f"so</think><answer>{answer}</answer>", f"so</think>${answer}$", rf"so</think>\boxed{{{answer}}}"]
    boxed = answer.count("{") == answer.count("}")
    assert call(found["accuracy"], texts, [gold] * 3) == [right, 0, right and boxed]
    # Halfway, cosine is in the middle of its bounds.
    halfway = {"completion_ids": [[0] * 50] * 3}
    wanted = [0.75 if each else -0.75 for each in (right, 0, right and boxed)]
    assert call(found["cosine"], texts, [gold] * 3, **halfway) == pytest.approx(wanted)
    assert call(found["format"], texts) == [1, 0, 0]


@pytest.mark.parametrize(
    ("length", "right", "wanted"),
    [
        (0, True, 1.0),
        (100, True, 0.75 + 0.25 * math.sqrt(2) / 2),
        (200, True, 0.75),
        (400, True, 0.5),
        (4000, True, 0.5),  # without the clamp it would rise again
        (0, False, -1.0),
        (133, False, -0.75 - 0.25 * math.cos(math.pi * 133 / 400)),
        (200, False, -0.75),
        (400, False, -0.5),
        (800, False, -0.5),
    ],
)
def test_cosine_is_its_formula(made: Any, length: int, right: bool, wanted: float) -> None:
    text = "so</think><answer>4</answer>"
    for settings_ in ({"cosine_max_length": 400}, {"max_completion_length": 400}):
        reward = made("cosine", **settings_)["cosine"]
        assert call(reward, [text], ["4" if right else "5"], completion_ids=[[7] * length]) == [pytest.approx(wanted)]


def test_cosine_takes_its_bounds_from_the_settings(made: Any) -> None:
    reward = made("cosine", cosine_max_length=10, cosine_correct=[3.0, 1.0], cosine_wrong=[0.0, -2.0])["cosine"]
    ids = [[0] * length for length in (0, 5, 10, 0, 5, 10)]
    texts = ["</think><answer>4</answer>"] * 3 + ["</think><answer>5</answer>"] * 3
    assert call(reward, texts, ["4"] * 6, completion_ids=ids) == pytest.approx([3, 2, 1, 0, -1, -2])


def test_cosine_is_that_of_trl_where_trl_can_judge(made: Any) -> None:
    boxed = [r"\frac{1}{3}", r"\frac{2}{6}", r"\frac{1}{2}", "0.5", "x+1"] * 5
    golds = [r"$\frac{1}{3}$", r"$\frac{1}{3}$", r"$\frac{1}{3}$", r"$\frac{1}{2}$", "$1+x$"] * 5
    completions = [conversation(rf"so</think>It is $\boxed{{{answer}}}$.") for answer in boxed]
    ids = [[1] * (13 * index) for index in range(25)]
    reward = made("cosine", cosine_max_length=250)["cosine"]
    trl = get_cosine_scaled_reward(max_len=250)
    wanted = trl(completions, solution=golds, completion_ids=ids)
    assert call(reward, completions, golds, completion_ids=ids) == pytest.approx(wanted)
    # To TRL's own reward an answer in <answer> is wrong.
    tagged = [conversation("so</think><answer>4</answer>")]
    assert trl(tagged, solution=["$4$"], completion_ids=[[]]) == [-1.0]
    assert call(reward, tagged, ["$4$"], completion_ids=[[]]) == [1.0]


@pytest.mark.parametrize(
    ("groups", "wanted"),
    [
        # (length, right) of each completion: 0.5 - (length - shortest) / (longest - shortest), wrong at most 0.
        ([[(10, 1), (20, 1), (30, 1)]], [0.5, 0.0, -0.5]),
        ([[(10, 0), (20, 0), (30, 0)]], [0.0, 0.0, -0.5]),
        ([[(10, 0), (15, 1), (25, 0), (30, 1)]], [0.0, 0.25, -0.25, -0.5]),
        ([[(30, 1), (10, 1)]], [-0.5, 0.5]),
        ([[(20, 1), (20, 0), (20, 1)]], [0.0, 0.0, 0.0]),
        ([[(20, 1)]], [0.0]),
        ([[(0, 1), (4, 1)]], [0.5, -0.5]),
        ([[(10, 1), (20, 1)], [(200, 1), (100, 1)]], [0.5, -0.5, -0.5, 0.5]),
        ([[(10, 1), (20, 1)], [(20, 1), (20, 1)], [(1, 0), (9, 0), (5, 1)]], [0.5, -0.5, 0, 0, 0, -0.5, 0]),
    ],
)
def test_length_is_its_formula(made: Any, groups: list[list[tuple[int, int]]], wanted: list[float]) -> None:
    rows = [(f"question {at}", *row) for at, group in enumerate(groups) for row in group]
    texts = [f"so</think><answer>{4 if right else 5}</answer>" for _, _, right in rows]
    ids = [[0] * length for _, length, _ in rows]
    reward = made("length")["length"]
    prompts: list[Any] = [prompt for prompt, _, _ in rows]
    assert call(reward, texts, ["4"] * len(rows), prompts=prompts, completion_ids=ids) == pytest.approx(wanted)
    prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    talk = [conversation(text) for text in texts]
    assert call(reward, talk, ["4"] * len(rows), prompts=prompts, completion_ids=ids) == pytest.approx(wanted)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 4))
def test_repetition_is_counted(tmp_path_factory: pytest.TempPathFactory, ids: list[int], size: int) -> None:
    folder = tmp_path_factory.getbasetemp()
    args = config(folder, "repetition_penalty", repetition_ngram=size, repetition_max_penalty=-2.0)
    (reward,) = make_rewards(args)
    seen, repeated = [], 0
    for start in range(len(ids) - size + 1):
        repeated += ids[start : start + size] in seen
        seen.append(ids[start : start + size])
    assert call(reward, ["x"], completion_ids=[ids]) == [pytest.approx(-2.0 * repeated / max(len(seen), 1))]


ALL = ("accuracy", "format", "tag_count", "cosine", "length", "repetition_penalty")
LEAST = dict(zip(ALL, (0, 0, 0, -1, -0.5, -1), strict=True))
MOST = dict(zip(ALL, (1, 1, 1, 1, 0.5, 0), strict=True))
PIECES = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    r"\boxed{",
    "}",
    "{",
    "\\",
    "4",
    " ",
    "\n",
    "$",
    "answer is ",
]
TAGGED = re.compile(
    r"\s*(?:<think>)?((?:(?!</?(?:think|answer)>).)*)</think>\s*"
    r"<answer>((?:(?!</?(?:think|answer)>).)*)</answer>\s*",
    re.DOTALL,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=12).map("".join))
@example("\udfff\ud800<answer>\ud800\0</answer>")
@example("<answer>" + r"\frac{" * 30 + "</answer>")
def test_no_text_raises(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    metrics: dict[str, float] = {}
    for reward in make_rewards(config(folder, *ALL)):
        other = "so</think><answer>17/19</answer>"
        first, second = call(reward, [text, other], ["17/19"] * 2, prompts=["?", "?"], log_metric=metrics.__setitem__)
        assert LEAST[reward.__name__] <= min(first, second) and max(first, second) <= MOST[reward.__name__]
        assert metrics[f"rewards/{reward.__name__}/failed"] == 0.0
        if reward.__name__ == "format":
            match = TAGGED.fullmatch(text)
            assert first == float(match is not None and all(part.strip() for part in match.groups()))


LONG = {
    "letters": "x" * 10**6,
    "blanks": "</think>The answer is: 4" + " " * 10**6 + "5",
    "wide blanks": "</think>The answer is: 4" + "\u2003" * 10**6 + "5",
    "digits": f"so</think><answer>{'1' * 10**6}</answer>",
    "brackets": f"so</think><answer>{'(' * 10**6}</answer>",
    "boxes": r"\boxed{" * 140_000,
    "backslashes": "\\" * 10**6,
    "tags": "<answer>" * 120_000,
    "stated": "answer is " * 100_000,
}


@pytest.mark.parametrize("kind", LONG)
def test_a_million_characters_are_judged_in_time(made: Any, kind: str) -> None:
    start = time.monotonic()
    values = {name: call(reward, [LONG[kind]], ["17/19"]) for name, reward in made(*ALL).items()}
    assert time.monotonic() - start < 5
    tagged = kind in ("digits", "brackets")
    tags = 3 if tagged else kind == "blanks" or kind == "wide blanks"
    assert (values["accuracy"], values["format"], values["tag_count"]) == ([0.0], [tagged], [tags / 3])
    # A million tokens, of which all that can be long.
    assert values["cosine"] == [-0.5]


@pytest.mark.slow
def test_an_answer_that_takes_forever_is_wrong(made: Any) -> None:
    start = time.monotonic()
    texts = ["so</think><answer>9^{9^{9}}</answer>", "so</think><answer>y+7</answer>"]
    assert call(made("accuracy")["accuracy"], texts, ["7+y"] * 2) == [0.0, 1.0]
    assert time.monotonic() - start < 30


def test_each_completion_is_judged_once(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = made("length", "accuracy", "cosine")
    judged = []
    score = module.score
    monkeypatch.setattr(module, "score", lambda kind, text, gold: judged.append(text) or score(kind, text, gold))
    texts = [f"so</think><answer>{index}</answer>" for index in (1, 2, 3, 3)]
    for _ in range(2):
        for reward in found.values():
            call(reward, texts, ["3"] * 4)
    assert sorted(judged) == texts[:3]
    call(found["accuracy"], ["</think><answer>8</answer>"], ["3"])
    call(found["accuracy"], texts[:1], ["3"])
    assert judged.count(texts[0]) == 2  # what was known of another batch is forgotten
    call(found["accuracy"], texts[:1], ["1"])
    assert judged.count(texts[0]) == 3  # another gold is another question


@pytest.mark.parametrize(
    ("names", "reporter"),
    [
        (("format", "accuracy", "cosine"), "accuracy"),
        (("format", "length", "cosine"), "length"),
        (("tag_count", "format"), "tag_count"),
    ],
)
def test_one_reward_reports_what_has_no_answer(made: Any, names: tuple[str, ...], reporter: str) -> None:
    texts = ["so</think><answer>4</answer>", "so 4", r"so</think>\boxed{5}", "", "so"]
    for name, reward in made(*names).items():
        metrics: dict[str, float] = {}
        columns: dict[str, list[Any]] = {}
        call(reward, texts, ["4"] * 5, log_metric=metrics.__setitem__, log_extra=columns.__setitem__)
        wanted = {"completions/malformed": 0.6} if name == reporter else {}
        assert metrics == {f"rewards/{name}/failed": 0.0, **wanted}
        assert columns == ({"extracted_answer": ["4", None, "5", None, None]} if wanted else {})


def test_what_fails_scores_0_and_is_counted(made: Any, caplog: pytest.LogCaptureFixture) -> None:
    metrics: dict[str, float] = {}
    texts = ["so</think><answer>4</answer>"] * 4
    found = made("accuracy", "cosine")
    for name, right in (("accuracy", 1.0), ("cosine", 1.0)):
        values = call(found[name], texts, ["4", None, 4, "4"], completion_ids=[[]] * 4, log_metric=metrics.__setitem__)
        assert values == [right, 0.0, 0.0, right]
        assert metrics[f"rewards/{name}/failed"] == 0.5
        assert call(found[name], texts[:1], [None]) == [0.0]
    assert caplog.text.count("reward accuracy failed") == caplog.text.count("reward cosine failed") == 1


@pytest.mark.parametrize("completion", [[], [{"role": "assistant"}], [{"role": "assistant", "content": None}]])
def test_a_conversation_without_text_is_empty(made: Any, completion: Any) -> None:
    for name, reward in made("accuracy", "format", "tag_count").items():
        metrics: dict[str, float] = {}
        assert call(reward, [completion], ["4"], log_metric=metrics.__setitem__) == [0.0]
        assert metrics[f"rewards/{name}/failed"] == 0.0


def test_an_empty_batch_has_no_rewards(made: Any) -> None:
    for reward in made(*ALL).values():
        metrics: dict[str, float] = {}
        assert call(reward, [], [], log_metric=metrics.__setitem__) == []
        assert metrics == {}


def test_settings_that_cannot_be(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards.py").write_text("def accuracy(completions, **columns):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="Two of reward_funcs are called accuracy"):
        made("accuracy", "own_rewards.accuracy")
    with pytest.raises(ValueError, match="'no_such_module.brevity' cannot be used: importing 'no_such_module' raised"):
        made("accuracy", "no_such_module.brevity")
    with pytest.raises(ValueError, match="cosine_max_length"):
        made("cosine", max_completion_length=None)
    for name in ("accuracy", "cosine", "length"):
        with pytest.raises(
            ValueError, match=rf"{name} compares .* no column 'answer'; .* it has: trainer_state, prob"
        ):
            call(made(name)[name], ["x"], problem=["?"])


def test_rewards_come_in_the_order_of_the_settings(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def brevity(completions, **columns):\n    return [-float(len(text)) for text in completions]\n"
    (tmp_path / "own_rewards.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    found = made("format", "own_rewards.brevity", "accuracy")
    assert list(found) == ["format", "brevity", "accuracy"]
    assert call(found["brevity"], ["1234", "12"]) == [-4.0, -2.0]
