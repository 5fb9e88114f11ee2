"""Side by side: the texts are those of an evaluation, and visitors do not meet."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_merged import LOCAL, merged
from transformers import AutoConfig, AutoModelForCausalLM

from resa_hf.adapters import load_reasoning_adapter
from resa_hf.errors import ExploreError
from resa_hf.evaluation.engine import Sampling
from resa_hf.evaluation.in_process import TransformersEngine
from resa_hf.explore.bench import Workbench
from resa_hf.explore.solving import Change, solve, split_thinking
from resa_hf.features.causal import edited
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.checkpoint import save_sae
from resa_hf.text import evaluation_prompt
from resa_hf.tiny import tiny_path

CHAIN = "7*4-2+8*3-1*9 mod 10"
LATENTS, FACTOR = (3, 5, 11, 17, 40, 41, 42), -30.0


@pytest.fixture(scope="module")
def sae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sae")
    save_sae(TopKSAE(128, 64, 16, hookpoint="layers.1", seed=1), folder)
    return folder


@pytest.fixture(scope="module")
def bench(sae_folder):
    return Workbench(LOCAL | {"sae": sae_folder}, device="cpu")


def by_engine(model, tokenizer, problem=CHAIN, seed=0, temperature=1.0, limit=64):
    prompt = evaluation_prompt(problem, template="chat", tokenizer=tokenizer)
    sampling = Sampling(seed=seed, temperature=temperature, max_new_tokens=limit)
    return TransformersEngine(model, tokenizer).generate([prompt], sampling, progress=False)[0][0]


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.tensor([[5, 17, 3, 41, 8, 50, 9]])).logits


def last(*args, **settings):
    *_, solution = solve(*args, **{"max_new_tokens": 64} | settings)
    return solution


@pytest.fixture
def with_source(tiny_base):
    return load_reasoning_adapter(tiny_base, tiny_path("source"))


@pytest.mark.parametrize(("seed", "temperature"), [(0, 1.0), (7, 1.0), (3, 1.7), (0, 0.0), (2**31 - 1, 0.6)])
def test_the_texts_are_those_of_the_engine(bench, with_source, tiny_tokenizer, seed, temperature):
    settings = {"seed": seed, "temperature": temperature}
    solution = last(bench, "tiny", {"source": 1.0}, CHAIN, **settings)
    tuned = by_engine(with_source, tiny_tokenizer, **settings)
    with with_source.disable_adapter():
        base = by_engine(with_source, tiny_tokenizer, **settings)
    for written, expected in ((solution.base, base), (solution.tuned, tuned)):
        assert written.token_ids == expected.tokens
        assert (written.tokens, written.truncated) == (expected.length, expected.truncated)
        assert written.text == f"{written.thinking}</think>{written.answer}" == expected.text
    assert temperature < 1.5 or solution.base.token_ids != solution.tuned.token_ids


def test_strength_0_gives_the_bases_text(bench):
    for seed in range(5):
        solution = last(bench, "tiny", {"source": 0}, CHAIN, seed=seed)
        assert solution.tuned == solution.base


def test_strength_one_half_is_a_merge_with_one_half(bench, tiny_base, tiny_tokenizer):
    model = merged(tiny_base, 0.5)
    settings = [{"seed": seed, "temperature": 1.7} for seed in range(4)]
    texts = [last(bench, "tiny", {"source": 0.5}, CHAIN, **each).tuned.token_ids for each in settings]
    assert texts == [by_engine(model, tiny_tokenizer, **each).tokens for each in settings]
    assert texts != [last(bench, "tiny", {"source": 1}, CHAIN, **each).tuned.token_ids for each in settings]


@pytest.mark.parametrize("adapters", [{}, {"source": 1.0}])
def test_edited_latents(bench, with_source, tiny_base, tiny_tokenizer, sae_folder, adapters):
    solution = last(bench, "tiny", adapters, CHAIN, change=Change("sae", None, LATENTS, FACTOR))
    model = with_source if adapters else AutoModelForCausalLM.from_pretrained(tiny_path("base"), dtype=torch.float32)
    _, sae = bench.sae("sae")
    with edited(model, "layers.1", sae, LATENTS, lambda z: z * FACTOR):
        expected = by_engine(model, tiny_tokenizer)
    assert solution.tuned.token_ids == expected.tokens
    assert solution.base.token_ids == by_engine(model, tiny_tokenizer).tokens
    assert solution.tuned.token_ids != solution.base.token_ids


def test_special_tokens_on_which_the_sae_was_not_trained_pass_untouched(tiny_tokenizer, tmp_path):
    sae = TopKSAE(128, 64, 16, hookpoint="layers.1", seed=1, metadata={"exclude_special_tokens": list(range(56))})
    save_sae(sae, tmp_path)
    bench = Workbench(LOCAL | {"sae": tmp_path}, device="cpu")
    solution = last(bench, "tiny", {}, CHAIN, change=Change("sae", None, LATENTS, FACTOR))
    assert solution.tuned == solution.base


VISITS = [
    {"adapters": {"source": 1.0}},
    {"adapters": {"source": 0.5}},
    {"adapters": {"source": -0.5}},
    {"adapters": {}, "change": Change("sae", None, LATENTS, FACTOR)},
    {"adapters": {"source": 1.0}, "change": Change("sae", "layers.1", LATENTS, FACTOR)},
]


def visit(bench, adapters, seed=3, **settings):
    return solve(bench, "tiny", adapters, CHAIN, max_new_tokens=12, temperature=1.7, seed=seed, **settings)


def test_interleaved_visitors_get_what_each_gets_alone(bench):
    alone = [list(visit(bench, **settings)) for settings in VISITS]
    assert len({one[-1].tuned for one in alone}) == len(VISITS)
    running, found = [visit(bench, **settings) for settings in VISITS], [[] for _ in VISITS]
    while any(steps := [next(one, None) for one in running]):
        for solutions, step in zip(found, steps, strict=True):
            solutions += [step] if step else []
    assert found == alone


def test_twenty_visitors_at_once(bench):
    visits = [settings | {"seed": seed} for settings in VISITS for seed in range(4)]
    alone = [list(visit(bench, **settings))[-1] for settings in visits]
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda settings: list(visit(bench, **settings))[-1], visits))
    assert together == alone


@pytest.mark.parametrize("change", [None, Change("sae", None, LATENTS, FACTOR)])
def test_half_way_and_after_closing_the_model_is_as_before(bench, with_source, change):
    opened = bench.open("tiny", ["source"])
    weights = {name: tensor.clone() for name, tensor in opened.tuned.state_dict().items()}
    running = solve(bench, "tiny", {"source": 0.3}, CHAIN, change=change)
    for _ in range(3):
        next(running)

    def as_before():
        assert torch.is_grad_enabled()
        assert not opened.lock.locked()
        assert torch.equal(logits(opened.tuned), logits(with_source))
        with with_source.disable_adapter():
            assert torch.equal(logits(opened.base), logits(with_source))

    as_before()
    running.close()
    as_before()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in opened.tuned.state_dict().items())


def test_an_error_in_a_step_leaves_the_model_as_before(with_source, tmp_path):
    save_sae(TopKSAE(64, 64, 16, hookpoint="layers.1"), tmp_path / "narrow")
    other = Workbench(LOCAL | {"narrow": tmp_path / "narrow"}, device="cpu")
    with pytest.raises(ValueError, match="128"):
        last(other, "tiny", {"source": 0.3}, CHAIN, change=Change("narrow", None, (1,), 0))
    opened = other.open("tiny", ["source"])
    assert not opened.lock.locked()
    assert torch.equal(logits(opened.tuned), logits(with_source))


def test_steps_make_no_graph_of_gradients(bench):
    opened, seen = bench.open("tiny"), []
    hook = opened.base.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    list(solve(bench, "tiny", {}, CHAIN, max_new_tokens=4))
    hook.remove()
    assert seen == [False] * 4


def test_solutions_grow_by_a_token_a_step(bench):
    *steps, final = solve(bench, "tiny", {"source": 1.0}, CHAIN, seed=1)
    for count, step in enumerate(steps, start=1):
        for side, end in ((step.base, final.base), (step.tuned, final.tuned)):
            assert side.token_ids == end.token_ids[:count]
            assert side.finished == (count >= end.tokens)
            # Each is judged as soon as it ends, also while the other goes on.
            assert (side.correct, side.found) == ((end.correct, end.found) if side.finished else (None, None))
            assert end.thinking.startswith(side.thinking)
    assert final.base.finished and final.tuned.finished
    assert final.prompt == f"User: {CHAIN}\nAssistant: <think>"


def test_without_adapters_and_edit_there_is_one_side(bench):
    assert last(bench, "tiny", {}, CHAIN).tuned is None


def test_judging(bench):
    solution = last(bench, "tiny", {"source": 1.0}, CHAIN)  # ((7*4-2+8)*3-1)*9 mod 10
    truth = str(((7 * 4 - 2 + 8) * 3 - 1) * 9 % 10)
    for side in (solution.base, solution.tuned):
        assert side.found == side.answer.removeprefix("<answer>").removesuffix("</answer>")
        assert side.correct == (side.found == truth)
    found = solution.tuned.found
    assert last(bench, "tiny", {"source": 1.0}, CHAIN, gold=rf"$\frac{{{2 * int(found)}}}{{2}}$").tuned.correct is True
    assert last(bench, "tiny", {"source": 1.0}, CHAIN, gold="11").tuned.correct is False
    assert last(bench, "tiny", {"source": 1.0}, "7*4 mod 11").tuned.correct is None


def test_only_the_tiny_reasoner_reads_from_left_to_right(bench, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_path("base")).save_pretrained(tmp_path)
    bench.open("tiny").tokenizer.save_pretrained(tmp_path)
    other = Workbench({"other": tmp_path}, device="cpu")
    assert last(other, "other", {}, CHAIN).base.correct is None
    assert last(other, "other", {}, CHAIN, gold="4").base.correct is not None


def test_a_cut_text_is_truncated(bench, tiny_base, tiny_tokenizer):
    written = last(bench, "tiny", {}, CHAIN, max_new_tokens=2).base
    assert (written.tokens, written.truncated, written.finished, written.answer) == (2, True, True, "")
    assert written.token_ids == by_engine(tiny_base, tiny_tokenizer).tokens[:2]


def test_the_context_is_not_overrun(bench, tiny_base, tmp_path):
    config = AutoConfig.from_pretrained(tiny_path("base"))
    assert config.max_position_embeddings == 512
    long = "1+" * 235 + "1 mod 10"
    written = last(bench, "tiny", {}, long, temperature=2.0, max_new_tokens=4096).base
    prompt = len(bench.open("tiny").tokenizer(f"User: {long}\nAssistant: <think>")["input_ids"])
    assert prompt + written.tokens <= 512
    with pytest.raises(ExploreError, match=r"The prompt has 1,0\d\d tokens; the model reads at most 512"):
        last(bench, "tiny", {}, "1+" * 500 + "1 mod 10")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"problem": " \n"}, "There is no problem"),
        ({"problem": "\x00\x07"}, "There is no problem"),
        ({"problem": "1" * 100_000}, "100,000 characters; at most 4,000"),
        ({"gold": "1" * 501}, "501 characters; at most 500"),
        ({"temperature": 2.1}, "temperature is 2.1; it must be a number from 0 to 2"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"seed": -1}, "seed is -1; it must be a number from 0 to 2,147,483,647"),
        ({"seed": 2**31}, "seed is 2147483648"),
        ({"seed": 0.5}, "seed is 0.5; it must be a whole number"),
        ({"seed": float("inf")}, "seed is inf"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be a number from 1 to 4,096"),
        ({"max_new_tokens": 4097}, "max_new_tokens is 4097"),
        ({"adapters": {"source": 2.5}}, "strength of 'source' is 2.5; it must be a number from -2 to 2"),
        ({"adapters": {"source": float("-inf")}}, "strength of 'source' is -inf"),
        ({"adapters": {"source": None}}, "strength of 'source' is None"),
        ({"adapters": {f"a/b{n}": 1 for n in range(5)}}, "At most 4 adapters"),
        ({"model": "nothing"}, "'nothing' names no model on the Hub"),
        ({"change": Change("nothing", None, (1,), 0)}, "'nothing' names no SAE on the Hub"),
        ({"change": Change("sae", "layers.3", (1,), 0)}, "It has: layers.1"),
        ({"change": Change("sae", None, (1,), float("nan"))}, "The factor is nan"),
        ({"change": Change("sae", None, (64,), 0)}, "from 0 to 63"),
        ({"change": Change("sae", None, (), 0)}, "one or more"),
    ],
)
def test_what_a_visitor_cannot_have(bench, settings, told):
    asked = {"model": "tiny", "adapters": {}, "problem": CHAIN} | settings
    with pytest.raises(ValueError, match=told):
        next(solve(bench, **asked))


@pytest.mark.parametrize(
    "problem", ["你好 mod 10", "\ud800 7*4", "<script>alert(1)</script>", "مرحبا", "🙂" * 20, "1\x00+1\x1b[31m"]
)
def test_any_text_is_answered(bench, problem):
    solution = last(bench, "tiny", {"source": 1.0}, problem, max_new_tokens=8)
    assert solution.base.tokens > 0
    assert not {"\x00", "\x1b", "\ud800"} & set(solution.prompt)


@pytest.mark.parametrize(
    ("text", "ended", "parts"),
    [
        ("so 4</think><answer>4</answer>", True, ("so 4", "<answer>4</answer>")),
        ("<think>\nso 4\n</think>\n\nIt is 4.", True, ("so 4", "It is 4.")),
        ("one</think>no, two</think>3", True, ("one</think>no, two", "3")),
        ("still thin", False, ("still thin", "")),
        ("cut <answer>4", False, ("cut", "<answer>4")),
        ("The answer is 4.", True, ("", "The answer is 4.")),
        ("", False, ("", "")),
    ],
)
def test_thinking_and_answer_are_told_apart(text, ended, parts):
    assert split_thinking(text, ended) == parts
