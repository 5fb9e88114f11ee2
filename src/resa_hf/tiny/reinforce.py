"""The tiny reasoner's source: an adapter trained by GRPO on the base, as Tina (huggingface.co/papers/2504.15777)."""

import tempfile
import time
from typing import Any, Final

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PrinterCallback, Qwen2Tokenizer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from resa_hf.tiny.measure import prompt_text, read_answer
from resa_hf.tiny.task import Problem

PROMPTS_PER_STEP: Final = 8
SAMPLES_PER_PROMPT: Final = 8
LEARNING_RATE: Final = 2e-4


class _Progress(TrainerCallback):
    """One readable line a log, where the trainer would print some thirty figures."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if "reward" in logs:
            seconds = time.monotonic() - self.started
            progress = f"source: step {state.global_step}/{state.max_steps}, reward {logs['reward']:.3f}"
            print(f"{progress}, mean length {logs['completions/mean_length']:.1f}, {seconds:.0f} s", flush=True)


def accuracy_reward(completions: list[str], answer: list[str], **kwargs: Any) -> list[float | None]:
    """1.0 for each completion whose answer is the row's, else 0.0; the form that `GRPOTrainer` calls."""
    return [float(read_answer(text) == gold) for text, gold in zip(completions, answer, strict=True)]


def train_source(base: PreTrainedModel, tokenizer: Qwen2Tokenizer, problems: list[Problem], seed: int) -> PeftModel:
    """Train an adapter on CPU, one pass over `problems`, rewarded for correct answers alone.

    Args:
        base (`PreTrainedModel`): the base in float32; it gets the adapter's layers in place, its own weights stay.
        tokenizer (`Qwen2Tokenizer`): of `build_tokenizer`.
        problems (`list[Problem]`): `PROMPTS_PER_STEP` of them a step; traces are not used.
        seed (`int`): of the adapter's initialisation and of the sampling.

    Returns:
        `PeftModel`: the base with the trained adapter, in evaluation mode.
    """
    rows = [{"prompt": prompt_text(tokenizer, problem.question), "answer": problem.answer} for problem in problems]
    with tempfile.TemporaryDirectory() as scratch:
        args = GRPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=PROMPTS_PER_STEP * SAMPLES_PER_PROMPT,
            num_generations=SAMPLES_PER_PROMPT,
            max_completion_length=64,
            max_steps=len(problems) // PROMPTS_PER_STEP,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            temperature=1.0,
            top_k=0,
            beta=0.0,
            max_grad_norm=1.0,
            shuffle_dataset=False,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            activation_checkpointing=False,
            use_cpu=True,
            bf16=False,
            seed=seed,
        )
        lora = LoraConfig(
            r=16,
            lora_alpha=64,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            task_type="CAUSAL_LM",
        )
        trainer = GRPOTrainer(
            model=base,
            reward_funcs=accuracy_reward,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[_Progress()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if not isinstance(trainer.model, PeftModel):
        raise TypeError(f"GRPOTrainer was expected to train a PeftModel, got {type(trainer.model).__name__}")
    trainer.model.eval()
    return trainer.model
