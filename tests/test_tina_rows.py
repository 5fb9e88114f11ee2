"""The RL recipes against the values of Tina's released recipes and code, typed here from
github.com/shangshang-wang/Tina: recipes/DeepSeek-R1-Distill-Qwen-1.5B/grpo, tina/config.py, tina/post_train_hf."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from test_recipes import parse
from transformers import get_scheduler

RECIPES = Path(__file__).parents[1] / "recipes" / "deepseek-r1-distill-qwen-1.5b"

# Data, answers a question, steps of the schedule, steps trained, rewards with their weights.
TINA = """
still       still       4   7500  3750  length:1 accuracy:2
deepscaler  deepscaler  4  11000  5500  format:1 accuracy:2
open-rs1    open-s1     4   5000  2400  format:1 accuracy:2
open-rs2    open-rs     6   1500   850  format:1 accuracy:2
open-rs3    open-rs     6   1500   850  format:1 cosine:2
limr        limr        4    360   180  format:1 accuracy:2
"""
ROWS = {line.split()[0]: line.split()[1:] for line in TINA.strip().splitlines()}
GPUS, ACCUMULATION, WARMUP, LOWEST = 2, 4, 0.1, 0.1


def test_every_run_is_there_and_no_other():
    assert {path.stem for path in (RECIPES / "rl").glob("*.yaml")} == {f"tina-{name}" for name in ROWS}


@pytest.mark.parametrize("name", ROWS)
def test_a_run_of_tinas(name):
    dataset, answers, _, trained, *rewards = ROWS[name]
    model, lora, data, args = parse(RECIPES / "rl" / f"tina-{name}.yaml")
    assert model.model_name_or_path == "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    assert (model.dtype, data.dataset, args.max_steps) == ("bfloat16", dataset, int(trained))
    weighted = dict(zip(args.reward_funcs, args.reward_weights, strict=True))
    assert weighted == {reward: float(weight) for reward, weight in (word.split(":") for word in rewards)}
    assert args.num_generations == args.per_device_train_batch_size == int(answers)
    # Of one step, on all GPUs: 8 questions.
    assert args.generation_batch_size == GPUS * ACCUMULATION * int(answers) == 8 * args.num_generations
    assert args.gradient_accumulation_steps * args.per_device_train_batch_size == args.generation_batch_size
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout) == (32, 128, 0.05)
    seven = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert sorted(lora.lora_target_modules) == seven
    assert (args.max_prompt_length, args.max_completion_length, args.temperature) == (512, 3584, 0.7)
    assert (args.vllm_gpu_memory_utilization, args.vllm_max_model_length) == (0.4, 4608)
    assert (args.learning_rate, args.max_grad_norm, args.weight_decay, args.seed) == (1e-6, 1.0, 0.0, 42)
    assert args.optim.value.startswith("adamw") and args.gradient_checkpointing
    # TRL 0.15.2: its defaults, and what it knew no other way of.
    assert (args.beta, args.scale_rewards, args.num_iterations) == (0.04, "group", 1)
    assert (args.loss_type, args.use_bias_correction_kl, args.vllm_importance_sampling_correction) == (
        *("grpo", False),
        False,
    )


@pytest.mark.parametrize("name", ROWS)
def test_the_learning_rate_is_that_of_the_longer_schedule_which_tina_stops(name):
    scheduled, trained = map(int, ROWS[name][2:4])
    *_, args = parse(RECIPES / "rl" / f"tina-{name}.yaml")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(args.max_steps),
        num_training_steps=args.max_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    warmup = math.ceil(WARMUP * scheduled)
    for step in range(trained):
        wave = (1 + math.cos(math.pi * (step - warmup) / (scheduled - warmup))) / 2
        share = step / warmup if step < warmup else LOWEST + (1 - LOWEST) * wave
        assert schedule.get_last_lr()[0] == pytest.approx(1e-6 * share, rel=1e-6, abs=0)
        optimizer.step()
        schedule.step()


def test_the_cosine_reward_at_its_ends():
    # tina/config.py, and its formula, in which wrong answers swap smallest and largest.
    right, wrong, longest = (0.5, 1.0), (-0.5, 0.0), 1000

    def tinas(bounds, length):
        smallest, largest = bounds
        return smallest + 0.5 * (largest - smallest) * (1 + math.cos(length / longest * math.pi))

    *_, args = parse(RECIPES / "rl" / "tina-open-rs3.yaml")
    assert args.cosine_correct == [tinas(right, 0), tinas(right, longest)]
    assert args.cosine_wrong == [tinas(wrong, 0), tinas(wrong, longest)]
    assert args.cosine_max_length == args.max_completion_length


@pytest.mark.parametrize("name", ROWS)
def test_the_steps_that_are_kept_and_the_questions_that_are_not_seen(name):
    *_, data, args = parse(RECIPES / "rl" / f"tina-{name}.yaml")
    assert args.checkpoints == sorted(set(args.checkpoints)) and {1, 10, 50, 100} <= set(args.checkpoints)
    assert args.checkpoints[-1] <= args.max_steps and args.save_total_limit == 1
    kept_out = (data.held_out, args.selection, data.split_seed, data.limit)
    assert kept_out == ((200, 100) if name == "limr" else (500, 200)) + (0, None)
    for path in (path for kind in ("run", "compare", "sweep") for path in sorted(RECIPES.glob(f"{kind}/*.yaml"))):
        recipe = yaml.safe_load(path.read_text())
        grid = recipe.get("grid", {})
        if data.dataset not in (recipe.get("dataset"), *grid.get("dataset", [])):
            continue
        # Whatever has its verdict or its choice on questions of this data set keeps the same ones out.
        if "tasks" not in recipe:
            assert recipe["held_out"] == kept_out[0]
        if "selection" in recipe:
            assert (recipe["held_out"], recipe["selection"], 0, recipe.get("limit")) == kept_out


def test_the_steps_of_table_4_are_kept():
    sweep = yaml.safe_load((RECIPES / "sweep" / "source_steps.yaml").read_text())
    named = {int(name.rpartition("-")[2]) for name in sweep["grid"]["source_adapter"] if name is not None}
    *_, args = parse(RECIPES / "rl" / "tina-still.yaml")
    assert named == {1, 10, 50, 100, 500, 2000, 3000} and named <= set(args.checkpoints)
