"""`resa-hf train-rl`: what is trained on, what is kept, that it can be resumed, and that it helps."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_text import R1, make_tokenizer

from resa_hf.cli import main as resa_hf
from resa_hf.errors import DataError
from resa_hf.models import load_causal_lm
from resa_hf.rl.config import RLConfig
from resa_hf.rl.log import log_table, windows
from resa_hf.rl.prompts import prompt_rows
from resa_hf.text import encode_prompt, evaluation_prompt

RECIPE = Path(__file__).parents[1] / "recipes/tiny-reasoner/rl/grpo.yaml"
SMALL = ["--limit", "900", "--per_device_train_batch_size", "16", "--num_generations", "4", "--max_steps", "4"]
SMALL += ["--checkpoints", "1", "3", "--save_steps", "2"]


def train(folder: Path, *flags: str) -> dict:
    assert resa_hf(["train-rl", "--config", str(RECIPE), "--output_dir", str(folder), *SMALL, *flags]) == 0
    return json.loads((folder / "report.json").read_text())


def rows(*pairs: tuple[str, str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"problem": [p for p, _ in pairs], "answer": [a for _, a in pairs]})


def test_rows_whose_gold_cannot_be_parsed_or_whose_prompt_is_long_are_counted(tiny_tokenizer):
    given = rows(("1+1 mod 10", "2"), ("2+2 mod 10", r"\frac{1}{"), ("3+3 mod 10", "6"), ("1+1+" * 200, "4"))
    made, report = prompt_rows(given, "chat", tiny_tokenizer, 100)
    assert made["problem"] == ["1+1 mod 10", "3+3 mod 10"] and made["answer"] == ["2", "6"]
    assert (report.rows, report.unverifiable, report.too_long, report.kept) == (4, 1, 1, 2)
    assert report.describe() == (
        "2 of 4 prompts; left out: 1 whose answer cannot be parsed, 1 with a longer prompt than max_prompt_length."
    )
    with pytest.raises(DataError, match="nothing to train on: 0 of 1 prompts; left out: 1 whose answer"):
        prompt_rows(rows(("1+1", "?")), "chat", tiny_tokenizer, 100)


@pytest.mark.parametrize("template", ["paper", "chat"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_trl_reads_a_prompt_as_evaluation_does(template, adds_bos):
    tokenizer = make_tokenizer(adds_bos=adds_bos, chat_template=R1)
    made, _ = prompt_rows(rows(("1+1", "2")), template, tokenizer, 10_000)
    wanted = encode_prompt(evaluation_prompt("1+1", template=template, tokenizer=tokenizer), tokenizer)
    # As GRPOTrainer tokenises prompts that are text.
    assert tokenizer(text=list(made["prompt"]))["input_ids"] == [wanted]
    assert wanted.count(tokenizer.bos_token_id) == (adds_bos or template == "chat")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_funcs": ["acuracy"]}, "reward_funcs is .'acuracy'.; give some of accuracy, format"),
        ({"reward_funcs": ["accuracy", "accuracy"]}, "each once"),
        ({"reward_funcs": []}, "give some of accuracy"),
        ({"reward_funcs": ["accuracy", "format"], "reward_weights": [1.0]}, "1 reward_weights for 2 reward_funcs"),
        ({"cosine_correct": [1.0]}, "cosine_correct is .1.0.; give two numbers"),
        ({"repetition_max_penalty": 1.0}, "repetition_max_penalty is 1.0; it must be 0 or less"),
        ({"reward_time_limit": 0.0}, "reward_time_limit is 0.0; it must be above 0"),
        ({"max_prompt_length": 0}, "max_prompt_length is 0; it must be at least 1"),
        ({"selection": -1}, "selection is -1; it must be at least 0"),
        ({"checkpoints": [0, 5]}, "checkpoints is .0, 5.; give steps, from 1 on"),
        ({"steps_per_generation": 4, "save_steps": 6}, "save_steps is 6, but completions are generated every 4 steps"),
        ({"use_vllm": True}, "use_vllm is true, but vLLM is not installed"),
        ({"num_iterations": 3, "save_steps": 10}, "make it a multiple of 3"),
        # Generations of 6 batches and steps of 4 begin together every 12 batches, that is 3 steps.
        ({"steps_per_generation": 6, "gradient_accumulation_steps": 4, "save_steps": 2}, "make it a multiple of 3"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        RLConfig(str(tmp_path), **settings)


def test_settings_run_on_this_machine(tmp_path):
    args = RLConfig(str(tmp_path))
    assert (args.use_cpu, args.bf16, args.use_vllm) == (not torch.cuda.is_available(),) + (False,) * 2


def test_the_log_in_ten_parts():
    rng = np.random.default_rng(0)
    values = rng.random((40, 2))
    log = [
        {"step": i + 1, "reward": a, "completions/mean_length": 100 * b, "rewards/accuracy/mean": a, "lr": 1.0}
        for i, (a, b) in enumerate(values)
    ]
    found = windows([*log, {"step": 40, "train_runtime": 3.0}])
    assert [part["steps"] for part in found] == [[4 * i + 1, 4 * i + 4] for i in range(10)]
    means = values.reshape(10, 4, 2).mean(1)
    np.testing.assert_allclose([part["reward"] for part in found], means[:, 0])
    np.testing.assert_allclose([part["completions/mean_length"] for part in found], 100 * means[:, 1])
    assert log_table(log).splitlines()[0].replace(" ", "") == "|steps|reward|length|accuracy|"
    assert windows([]) == [] and log_table([]) == "Nothing was logged."


@pytest.mark.slow
def test_a_small_run(tmp_path):
    report = train(tmp_path / "a", "--reward_funcs", "accuracy", "format", "--reward_weights", "2", "0.5")
    log = [entry for entry in report["log"] if "reward" in entry]
    for entry in log:
        parts = 2 * entry["rewards/accuracy/mean"] + 0.5 * entry["rewards/format/mean"]
        assert entry["reward"] == pytest.approx(parts, abs=1e-6)
        assert 0 <= entry["completions/malformed"] <= 1 and entry["completions/clipped_ratio"] == 0
    kept = [pd.read_parquet(path) for path in sorted((tmp_path / "a/completions").glob("*.parquet"))]
    assert len(kept) == len(log) == 4 and all(len(table) == 16 for table in kept)
    for table, entry in zip(kept, log, strict=True):
        assert table["accuracy"].mean() == pytest.approx(entry["rewards/accuracy/mean"])
        # The tiny reasoner's answers, read without our scoring.
        answers = table["completion"].str.extract(r"<answer>(\d)</answer>$")[0]
        assert (answers.isna() & (table["accuracy"] > 0)).sum() == 0
    base, one, three = (
        load_causal_lm(str(name)).state_dict()
        for name in ("resa_hf/tiny/base", tmp_path / "a/steps/1", tmp_path / "a/steps/3")
    )
    moved = {name for name, value in base.items() if not torch.equal(value.float(), three[name].float())}
    assert moved and all("_proj.weight" in name for name in moved)
    assert any(not torch.equal(one[name], three[name]) for name in moved)
    first, last = (report["moved"][step] for step in ("1", "3"))
    assert first["kl"] > 0 and 0 < first["update_norm"] < last["update_norm"]
    assert "| 4-4" in (tmp_path / "a/report.md").read_text() and (tmp_path / "a/report.png").stat().st_size > 10_000


@pytest.mark.long
def test_one_seed_gives_one_result_and_another_another(tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        train(tmp_path / name, "--seed", seed)
    a, b, c = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


@pytest.mark.long
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    train(tmp_path / "whole")
    flags = ["--config", str(RECIPE), "--output_dir", str(tmp_path / "parts"), *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-m", "resa_hf.cli", "train-rl", *flags], stdout=subprocess.DEVNULL, env=os.environ
    )
    deadline = time.monotonic() + 240
    while not (tmp_path / "parts/checkpoint-2/trainer_state.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "parts/report.json").exists()
    report = train(tmp_path / "parts")
    for place in ("", "steps/1/", "steps/3/"):
        whole, parts = (
            load_file(tmp_path / name / f"{place}adapter_model.safetensors") for name in ("whole", "parts")
        )
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert sorted(report["moved"]) == ["1", "3"] and [part["steps"][0] for part in report["windows"]] == [1, 2, 3, 4]


@pytest.mark.long
def test_a_finished_run_stays_as_it_is_and_one_that_died_at_the_end_is_finished(tmp_path):
    train(tmp_path / "a")
    files = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    train(tmp_path / "a")
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()} == files
    # It died after its last step, before its adapter was written.
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in ("report.json", "report.md", "adapter_model.safetensors"):
        (tmp_path / "b" / name).unlink()
    report = train(tmp_path / "b")
    assert [part["steps"] for part in report["windows"]] == [[1, 1], [2, 2], [3, 3], [4, 4]]
    assert (tmp_path / "b/adapter_model.safetensors").read_bytes() == files[tmp_path / "a/adapter_model.safetensors"]
    before = json.loads((tmp_path / "b/checkpoint-2/seconds.json").read_text())
    assert report["seconds"] > before > 0


@pytest.mark.long
def test_a_finished_run_that_kept_no_step_is_not_taken_for_one_of_other_settings(tmp_path, capsys):
    flags = ["train-rl", "--config", str(RECIPE), "--output_dir", str(tmp_path / "a"), *SMALL]
    flags += ["--checkpoints", "2", "--max_steps", "2", "--save_strategy", "no"]
    assert resa_hf(flags) == 0
    shutil.rmtree(tmp_path / "a/steps")
    before = (tmp_path / "a/settings.json").read_text()
    assert resa_hf([*flags, "--learning_rate", "0.5"]) == 2
    assert "holds a run with other settings (settings.learning_rate)" in capsys.readouterr().err
    assert (tmp_path / "a/settings.json").read_text() == before


@pytest.mark.slow
def test_a_run_resumed_in_its_second_epoch_goes_on_to_the_same_bits(tmp_path):
    # 12 questions, 4 a step: 3 steps an epoch.
    flags = ["--train_rows", "12", "--max_steps", "6", "--checkpoints", "1", "--save_steps", "4"]
    train(tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for name in ("report.json", "adapter_model.safetensors"):
        (tmp_path / "parts" / name).unlink()
    shutil.rmtree(tmp_path / "parts/completions")
    train(tmp_path / "parts", *flags)
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

    def asked(name: str) -> dict[int, frozenset[str]]:
        kept = (tmp_path / name / "completions").glob("*.parquet")
        return {int(path.stem[-5:]): frozenset(pd.read_parquet(path)["prompt"]) for path in kept}

    whole_asked = asked("whole")
    first, second = ([whole_asked[step] for step in steps] for steps in ((1, 2, 3), (4, 5, 6)))
    assert len(frozenset().union(*first)) == 12 and frozenset().union(*first) == frozenset().union(*second)
    assert first != second
    assert asked("parts") == {step: whole_asked[step] for step in (5, 6)}


@pytest.mark.slow
def test_mistakes_are_told_before_anything_is_trained(tmp_path, capsys):
    folder = tmp_path / "a"
    flags = ["train-rl", "--config", str(RECIPE), "--output_dir", str(folder), *SMALL]
    assert resa_hf([*flags, "--reward_funcs", "no_such_module_here.brevity"]) == 2
    assert "no_such_module_here" in capsys.readouterr().err
    assert resa_hf([*flags, "--checkpoints", "9"]) == 2
    assert "checkpoints names step 9, but the training has 4 steps" in capsys.readouterr().err
    for name, value, told in (
        ("solution_column", "trace", "RL takes questions and answers"),
        ("resume_from_checkpoint", "somewhere", "a rerun goes on from the last checkpoint"),
        ("model_adapter", "resa_hf/tiny/source", "name the adapter itself as model_name_or_path"),
        ("hub_token", "hf_secret", "publish it when it is done"),
    ):
        assert resa_hf([*flags, f"--{name}", value]) == 2
        error = capsys.readouterr().err
        assert told in error and "hf_secret" not in error
    assert resa_hf([*flags, "--sync_ref_model", "true", "--beta", "0.1"]) == 2
    assert "PEFT" in capsys.readouterr().err
    assert not list(folder.rglob("*.safetensors")) and "hf_secret" not in (folder / "settings.json").read_text()
    # A mistake that showed when training began is mended in the same folder.
    assert json.loads((folder / "settings.json").read_text())["settings"]["checkpoints"] == [9]
    train(folder)
    assert sorted(path.name for path in (folder / "steps").iterdir()) == ["1", "3"]


def test_dry_run_tells_and_runs_nothing(tmp_path, capsys):
    folder = tmp_path / "a"
    assert resa_hf(["train-rl", "--config", str(RECIPE), "--output_dir", str(folder), "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert "Would load: resa_hf/tiny/base, tiny-reasoner." in told and not folder.exists()
    assert "  RL: " in told


@pytest.mark.long
def test_grpo_lifts_the_tiny_reasoner(tmp_path, monkeypatch):
    """100 steps of the recipe: at least 15 points more than the base at temperature 1, on 1,000 fresh problems."""
    from resa_hf.tiny import load_tiny_base, load_tiny_tokenizer
    from resa_hf.tiny.measure import read_answer, sample_replies
    from resa_hf.tiny.task import make_problems, training_questions

    monkeypatch.chdir(tmp_path)
    assert resa_hf(["train-rl", "--config", str(RECIPE)]) == 0
    problems = make_problems(1000, 77, exclude=training_questions())
    right = []
    for model in (load_tiny_base(), load_causal_lm("runs/tiny-reasoner/grpo/seed-0/steps/100", dtype=torch.float32)):
        replies = sample_replies(model, load_tiny_tokenizer(), [p.question for p in problems], 1.0, 0)
        right.append(np.array([read_answer(r) == p.answer for r, p in zip(replies, problems, strict=True)], float))
    difference = right[1] - right[0]
    error = difference.std(ddof=1) / 1000**0.5
    assert difference.mean() >= 0.15 and difference.mean() - 1.96 * error > 0
