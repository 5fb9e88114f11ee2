import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jinja2.exceptions import TemplateError
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

from resa_hf.data import load_qa
from resa_hf.tiny import load_tiny_base, load_tiny_source, load_tiny_tokenizer, tiny_path
from resa_hf.tiny.measure import measure, read_answer, sample_replies
from resa_hf.tiny.sibling import make_sibling
from resa_hf.tiny.task import (
    MEASURE_SEED,
    Problem,
    base_problems,
    make_problem,
    make_problems,
    make_rows,
    source_problems,
    training_questions,
)
from resa_hf.tiny.tokenizer import build_tokenizer

WEIGHTS = tiny_path("base").parent
DOCUMENT = "User: 7*4-2+8 mod 10\nAssistant: <think>7*4=8;8-2=6;6+8=4</think><answer>4</answer><eos>"


def left_to_right(chain: str) -> int:
    """Python's own value of a chain, the precedence undone by brackets and reduced once at the end."""
    first, *operations = re.findall(r"^\d|[-+*]\d", chain)
    expression = first
    for operation in operations:
        expression = f"({expression}){operation}"
    return eval(expression) % 10


class TestTask:
    def test_answers_and_traces(self):
        rng = random.Random(0)
        for _ in range(500):
            problem = make_problem(rng)
            chain = problem.question.removesuffix(" mod 10")
            assert re.fullmatch(r"\d([-+*][1-9]){3,8}", chain)
            assert problem.answer == str(left_to_right(chain))
            steps = problem.trace.split(";")
            assert "".join([chain[0]] + [step[1:3] for step in steps]) == chain
            values = [chain[0]]
            for step in steps:
                left, result = step.split("=")
                assert left[0] == values[-1]
                assert int(result) == eval(left) % 10
                values.append(result)
            assert values[-1] == problem.answer

    def test_lengths(self):
        rng = random.Random(0)
        lengths = {make_problem(rng).trace.count("=") for _ in range(300)}
        assert lengths == {3, 4, 5, 6, 7, 8}
        assert {make_problem(rng, 1, 2).trace.count("=") for _ in range(50)} == {1, 2}

    @pytest.mark.parametrize(("least", "most"), [(0, 3), (4, 3)])
    def test_wrong_lengths(self, least, most):
        with pytest.raises(ValueError, match=f"min_steps={least}, max_steps={most}"):
            make_problem(random.Random(0), least, most)

    def test_rows_are_distinct_and_seeded(self):
        rows = make_rows(2000, seed=5)
        assert rows == make_rows(2000, seed=5)
        assert rows != make_rows(2000, seed=6)
        assert all(row.keys() == {"problem", "answer"} for row in rows)
        assert len({row["problem"] for row in rows}) == 2000
        assert all(row["answer"] == str(left_to_right(row["problem"].removesuffix(" mod 10"))) for row in rows)

    def test_exclude(self):
        first = make_rows(100, seed=5)
        barred = frozenset(row["problem"] for row in first)
        # The same seed draws the very questions that are barred.
        rows = make_rows(100, seed=5, exclude=barred)
        assert len(rows) == 100
        assert not barred & {row["problem"] for row in rows}

    def test_training_questions(self):
        seen = training_questions()
        assert {base_problems()[0].question, base_problems()[-1].question, source_problems()[-1].question} <= seen
        # Without exclusion a test set does meet them, which is why they can be made again.
        assert any(row["problem"] in seen for row in make_rows(2000, seed=MEASURE_SEED))


class TestTokenizer:
    def test_auto_tokenizer_reads_it_back_unchanged(self, tmp_path):
        built = build_tokenizer()
        built.save_pretrained(tmp_path)
        read = AutoTokenizer.from_pretrained(tmp_path)
        assert type(read) is Qwen2Tokenizer
        assert read.get_vocab() == built.get_vocab()
        assert read.chat_template == built.chat_template
        assert read.padding_side == "left"
        assert (read.eos_token, read.pad_token) == ("<eos>", "<pad>")
        for text in (DOCUMENT, "User: 1+2\n\n  x (a.b)?"):
            assert read(text).input_ids == built(text).input_ids
            assert read.decode(read(text).input_ids) == text

    def test_one_token_a_character_or_tag(self):
        tokenizer = load_tiny_tokenizer()
        expected = re.findall(r"</?think>|</?answer>|<eos>|[\s\S]", DOCUMENT)
        assert [tokenizer.decode([token]) for token in tokenizer(DOCUMENT).input_ids] == expected
        for tag in ("<think>", "</think>", "<answer>", "</answer>"):
            assert len(tokenizer(tag).input_ids) == 1
            assert tokenizer.decode(tokenizer(tag).input_ids, skip_special_tokens=True) == tag

    def test_shipped_is_the_built_one(self):
        assert load_tiny_tokenizer().get_vocab() == build_tokenizer().get_vocab()
        assert load_tiny_tokenizer().chat_template == build_tokenizer().chat_template

    def test_unknown_characters_are_dropped(self):
        assert load_tiny_tokenizer()("7éT{").input_ids == load_tiny_tokenizer()("7").input_ids

    def test_chat_template(self):
        tokenizer = load_tiny_tokenizer()
        user = {"role": "user", "content": "7*4-2+8 mod 10"}
        reply = {"role": "assistant", "content": "<think>7*4=8;8-2=6;6+8=4</think><answer>4</answer>"}
        assert tokenizer.apply_chat_template([user, reply], tokenize=False) == DOCUMENT
        prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        assert prompt == "User: 7*4-2+8 mod 10\nAssistant: <think>"
        with pytest.raises(TemplateError, match="'user' and 'assistant', got 'system'"):
            tokenizer.apply_chat_template([{"role": "system", "content": "think"}, user], tokenize=False)


class TestMeasure:
    @pytest.mark.parametrize(
        ("reply", "answer"),
        [
            ("4</think><answer>4</answer>", "4"),
            ("</think><answer>1</answer><answer> 2 </answer>", "2"),
            ("4</think><answer>4", None),
            ("4", None),
        ],
    )
    def test_read_answer(self, reply, answer):
        assert read_answer(reply) == answer

    def test_counts(self):
        problems = make_problems(6, seed=1)
        greedy = measure(load_tiny_base(), load_tiny_tokenizer(), problems, temperature=0.0)
        replies = sample_replies(load_tiny_base(), load_tiny_tokenizer(), [p.question for p in problems], 0.0, seed=0)
        # Every second answer is made wrong, so the share must fall by exactly those that were right.
        spoiled = [Problem(p.question, p.trace, "x" if i % 2 else p.answer) for i, p in enumerate(problems)]
        right = [f"<answer>{p.answer}</answer>" in reply for p, reply in zip(problems, replies, strict=True)]
        result = measure(load_tiny_base(), load_tiny_tokenizer(), spoiled, temperature=0.0)
        assert greedy.accuracy == sum(right) / 6
        assert result.accuracy == sum(right[::2]) / 6
        assert result.count == 6
        assert result.standard_error == pytest.approx((result.accuracy * (1 - result.accuracy) / 6) ** 0.5)

    def test_sampling_is_seeded_and_leaves_the_generator(self):
        questions = [problem.question for problem in make_problems(8, seed=1)]
        torch.manual_seed(3)
        before = torch.get_rng_state()
        first = sample_replies(load_tiny_base(), load_tiny_tokenizer(), questions, 1.0, seed=0)
        assert torch.equal(torch.get_rng_state(), before)
        assert first == sample_replies(load_tiny_base(), load_tiny_tokenizer(), questions, 1.0, seed=0)
        assert first != sample_replies(load_tiny_base(), load_tiny_tokenizer(), questions, 1.0, seed=1)


def plain_accuracy(model, tokenizer, rows):
    """Accuracy at temperature 1 by Transformers alone."""
    torch.manual_seed(0)
    correct = 0
    for start in range(0, len(rows), 250):
        chosen = rows[start : start + 250]
        prompts = [f"User: {row['problem']}\nAssistant: <think>" for row in chosen]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=64, do_sample=True, temperature=1.0, top_k=0)
        for row, tokens in zip(chosen, output[:, inputs.input_ids.shape[1] :], strict=True):
            correct += f"</think><answer>{row['answer']}</answer>" in tokenizer.decode(tokens)
    return correct / len(rows)


def shipped_base(dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(WEIGHTS / "base", dtype=dtype)


class TestWeights:
    @pytest.mark.slow
    def test_accuracy(self):
        tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "base")
        rows = make_rows(500, seed=1, exclude=training_questions())
        base = plain_accuracy(shipped_base(), tokenizer, rows)
        source = plain_accuracy(PeftModel.from_pretrained(shipped_base(), WEIGHTS / "source").eval(), tokenizer, rows)
        # The card's figures, give or take three standard errors at n=500 (0.02).
        assert 0.60 < base < 0.78
        assert source > base + 0.12

    def test_size_and_kinds_of_file(self):
        files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 6_000_000
        assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}
        assert not (WEIGHTS / "source" / "README.md").exists()

    @pytest.mark.parametrize("file", ["base/model.safetensors", "source/adapter_model.safetensors"])
    def test_stored_in_bfloat16(self, file):
        with safe_open(WEIGHTS / file, framework="pt") as tensors:
            names = tensors.keys()
            assert {tensors.get_slice(name).get_dtype() for name in names} == {"BF16"}

    def test_configs(self):
        adapter = json.loads((WEIGHTS / "source" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == "resa_hf/tiny/base"
        assert (adapter["r"], adapter["lora_alpha"]) == (16, 64)
        generation = json.loads((WEIGHTS / "base" / "generation_config.json").read_text())
        assert generation.keys() == {"eos_token_id", "pad_token_id", "transformers_version"}

    def test_loaders(self):
        ids = torch.tensor([load_tiny_tokenizer()(DOCUMENT).input_ids])
        base, source = load_tiny_base(), load_tiny_source()
        assert (base.dtype, source.dtype, load_tiny_base(torch.bfloat16).dtype) == (
            torch.float32,
            torch.float32,
            torch.bfloat16,
        )
        assert 0.9e6 < base.num_parameters() < 1.1e6
        assert not any("lora" in name for name, _ in source.named_parameters())
        unmerged = PeftModel.from_pretrained(shipped_base(), WEIGHTS / "source").eval()
        with torch.no_grad():
            torch.testing.assert_close(source(ids).logits, unmerged(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
            assert (source(ids).logits - base(ids).logits).abs().max() > 0.1

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="'base' and 'source', got 'target'"):
            tiny_path("target")  # type: ignore[arg-type]

    def test_import_is_light(self):
        program = "import sys, resa_hf.tiny, resa_hf.tiny.task; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


class TestBuild:
    def test_base_is_seeded(self):
        from resa_hf.tiny.pretrain import train_base

        def weights(seed):
            return train_base(build_tokenizer(), make_problems(64, seed=2), seed).state_dict()

        first, again, other = weights(0), weights(0), weights(1)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])

    @pytest.mark.long
    def test_source_is_seeded_and_learns(self):
        from resa_hf.tiny.reinforce import train_source

        def train():
            model = train_source(load_tiny_base(), load_tiny_tokenizer(), make_problems(16, seed=2), seed=0)
            return {name: weight.detach().clone() for name, weight in model.named_parameters()}

        first, again = train(), train()
        assert all(torch.equal(first[name], again[name]) for name in first)
        # LoRA's B starts at zero, so anything else was learned; a fresh base earns no reward and would not show it.
        assert all(weight.abs().max() > 0 for name, weight in first.items() if "lora_B" in name)
        base = load_tiny_base().state_dict()
        name = "model.layers.0.self_attn.q_proj"
        assert torch.equal(first[f"base_model.model.{name}.base_layer.weight"], base[f"{name}.weight"])

    @pytest.mark.slow
    def test_a_few_steps(self, tmp_path, capsys):
        from resa_hf.tiny.build import build

        results = build(tmp_path, seed=1, base_count=128, source_count=16, measure_count=4)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        peft_model = PeftModel.from_pretrained(model, tmp_path / "source")
        assert tokenizer.get_vocab() == load_tiny_tokenizer().get_vocab()
        assert model.num_parameters() > 0.9e6
        assert peft_model.peft_config["default"].base_model_name_or_path == "resa_hf/tiny/base"
        assert {r.count for r in results.values()} == {4}
        stored = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
        assert stored == [str(path.relative_to(WEIGHTS)) for path in sorted(WEIGHTS.rglob("*")) if path.is_file()]
        for name in stored:
            if Path(name).suffix != ".safetensors":
                assert str(tmp_path) not in (tmp_path / name).read_text()
        assert "base: step 2/2" in capsys.readouterr().out

    @pytest.mark.parametrize("counts", [{"base_count": 63}, {"source_count": 7}, {"measure_count": 0}])
    def test_too_few_problems(self, tmp_path, counts):
        from resa_hf.tiny.build import build

        (name, value), *_ = counts.items()
        with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
            build(tmp_path / "out", **counts)
        assert not (tmp_path / "out").exists()


def test_a_sibling_has_the_same_shapes_and_other_weights(tmp_path):
    make_sibling(tmp_path, count=128)
    base, sibling = (load_file(folder / "model.safetensors") for folder in (tiny_path("base"), tmp_path))
    assert {name: tensor.shape for name, tensor in base.items()} == {name: t.shape for name, t in sibling.items()}
    assert all(not torch.equal(tensor, sibling[name]) for name, tensor in base.items() if "norm" not in name)
    with pytest.raises(ValueError, match="seed 0 made the base"):
        make_sibling(tmp_path, seed=0)


def test_short_chains_have_3_to_5_steps_and_were_never_trained_on():
    rows, _ = load_qa("tiny-reasoner-short", limit=300)
    steps = {sum(question.count(symbol) for symbol in "+-*") for question in rows["problem"]}
    assert steps == {3, 4, 5} and not training_questions() & set(rows["problem"])
