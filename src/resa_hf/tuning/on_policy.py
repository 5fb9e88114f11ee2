"""On-policy distillation, huggingface.co/papers/2306.13649: TRL's trainer, with the settings of Stage II."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import datasets
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl import DistillationConfig, DistillationTrainer

from ..checkpoints import WholeCheckpoints
from ..errors import DataError
from ..guards import Guarded
from ..hookpoints import backbone, causal_lm
from ..modes import evaluating
from ..text import trl_prompt
from .config import SAETuningConfig
from .epoch_order import EpochOrder
from .loss import frozen_head
from .mean_divergence import mean_divergence


class OnPolicyTrainer(Guarded, WholeCheckpoints, DistillationTrainer):
    """
    [`~trl.DistillationTrainer`], evaluated as [`SAETuningTrainer`] is: not on what the student writes, but by its
    divergence from the teacher on given rows of tokens. The order of the questions depends on the epoch alone
    ([`EpochOrder`]), so that a resumed run ends as if it had not been interrupted. All else is TRL's.
    """

    args: DistillationConfig
    model: nn.Module

    def _get_train_sampler(self, dataset: datasets.Dataset | None = None) -> EpochOrder:
        return EpochOrder(super()._get_train_sampler(dataset))

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: datasets.Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The mean divergence from the teacher over all tokens of the rows, as `eval_kl` and `eval_loss`.

        Args:
            eval_dataset (`datasets.Dataset`, *optional*):
                Rows with `input_ids`. `None`: the trainer's own.
            ignore_keys (`list[str]`, *optional*):
                The Trainer's; it has no use here.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                Stands before the names.
        """
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        teacher: PreTrainedModel = self.accelerator.unwrap_model(self.teacher_model)
        heads = frozen_head(causal_lm(self.model)), frozen_head(teacher)  # type: ignore[arg-type]  # it is one, inside PEFT

        def states(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            student, taught = (backbone(model)(**batch, use_cache=False) for model in (self.model, teacher))
            return student.last_hidden_state, taught.last_hidden_state

        with evaluating(self.model), evaluating(teacher), self.compute_loss_context_manager():
            divergence, _ = mean_divergence(
                rows, self.args.eval_batch_size, states, heads, self.args.beta, self.args.temperature
            )
            metrics = {f"{metric_key_prefix}_{name}": divergence for name in ("loss", "kl")}
            self.log(dict(metrics))
        return metrics


def on_policy_config(args: SAETuningConfig, *, top_p: float, max_new_tokens: int) -> DistillationConfig:
    """TRL's settings: all that the two trainers share is as Stage II has it.

    Args:
        args (`SAETuningConfig`):
            Of the arm. `kl_temperature` is that of the answers, too, since TRL has one for both.
        top_p (`float`), max_new_tokens (`int`):
            Of the answers.
    """
    shared: dict[str, Any] = {
        field.name: getattr(args, field.name) for field in fields(TrainingArguments) if field.init
    }
    config = DistillationConfig(
        **{**shared, "remove_unused_columns": False},
        beta=args.kl_beta,
        temperature=args.kl_temperature,
        top_p=top_p,
        max_completion_length=max_new_tokens,
    )
    config._n_gpu = min(config.n_gpu, 1)  # TRL refuses nn.DataParallel
    return config


def on_policy_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, args: TrainingArguments
) -> datasets.Dataset:
    """Prompts in the column `prompt`, so that TRL reads them as evaluation does.

    Args:
        prompts (sequence of `str`):
            As [`~resa_hf.text.evaluation_prompt`] makes them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's.
        args ([`~transformers.TrainingArguments`]):
            Of the training, for the size of its batches.

    Raises:
        `DataError`: if they do not fill one batch, or if the tokenizer adds what evaluation leaves out.
    """
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if len(prompts) < batch:
        raise DataError(
            f"{len(prompts):,} training questions do not fill one batch of {batch:,} (per_device_train_batch_size x "
            "gradient_accumulation_steps). Give more rows, or lower it."
        )
    return datasets.Dataset.from_dict({"prompt": [trl_prompt(prompt, tokenizer) for prompt in prompts]})
