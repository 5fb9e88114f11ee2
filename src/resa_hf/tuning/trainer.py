"""Stage II: SAE-Tuning as a `trl.SFTTrainer` with another loss."""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import HubStrategy
from trl import SFTTrainer

from ..checkpoints import WholeCheckpoints
from ..compiling import LayerCompiler
from ..guards import Guarded
from ..hookpoints import backbone, causal_lm, layer_index, splice
from ..models import check_same_vocabulary, load_causal_lm, load_tokenizer
from ..provenance import loaded_revision, sae_revision
from ..pushing import PushToHub
from ..quantization import adapter_in_float32
from ..sharding import ShardedRows
from ..trl_internals import ForwardRedirection
from .collator import HostCollator, with_blank
from .config import SAETuningConfig
from .controls import make_control
from .fit import (
    PlacedSAE,
    load_control_sae,
    place_sae,
    special_token_ids,
    spliced_activations,
    warn_of_mismatch,
)
from .insertion import Insertion
from .loss import LMHead, frozen_head, token_cross_entropy, token_divergence
from .metrics import StepMetrics, gradient_norms
from .prefix import passing_through, prefix_is_exact
from .resume import CountedTokens
from .sharded import check_spreading, weights_are_spread, whole_head, whole_weights
from .target import load_target, own_config
from .teacher import Teacher
from .teacher_cache import TeacherCache, teacher_fingerprint

FITTING_BATCHES = 32  # of the training data, for a control that is fitted to the activations


class SAETuningTrainer(Guarded, WholeCheckpoints, PushToHub, ShardedRows, CountedTokens, SFTTrainer):
    """
    Trains a LoRA adapter so that the model with a frozen SAE spliced in predicts what the model without it predicts.

    SAE-Tuning, huggingface.co/papers/2506.09967, section 2. The only change to [`~trl.SFTTrainer`] is the loss:
    `kl_weight` times the divergence between teacher and student plus `sft_weight` times the cross-entropy, each the
    sum over the counted positions of all processes and accumulation steps, divided by their number; position t counts
    if and only if `labels[t+1] != -100`. What is saved is a plain PEFT adapter: the SAE is not in it.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The target model. A base with an adapter that is not trainable is merged first; a trainable adapter is
            trained on.
        args ([`SAETuningConfig`], *optional*):
            The settings.
        train_dataset, eval_dataset ([`~datasets.Dataset`]):
            With a `text` column or tokenised (`input_ids`), as [`~trl.SFTTrainer`] takes them.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer.
        sae (`str` or `torch.nn.Module`, *optional*):
            Hub repo or folder, or any module that maps `[..., d_in]` to `[..., d_in]`. It is frozen, and never
            changed. If `args.sae` is set too, they must agree.
        source_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The teacher with `kl_reference="source"`. It is frozen.
        control_sae (`str` or `torch.nn.Module`, *optional*):
            The SAE that stands in for `sae` with the controls `other_layer`, `random_source_sae` and `prose_sae`, as
            [`resa_hf.load_sae`] returns it. It is frozen. If `args.control_sae` is set too, they must agree.
        peft_config ([`~peft.PeftConfig`], *optional*):
            `None` on a bare model means the released code's LoRA ([`LoraArguments`]).
        data_collator, callbacks, optimizers, formatting_func (*optional*):
            As for [`~trl.SFTTrainer`].

    Raises:
        `HookpointError`, `IncompatibleSAEError`: if the SAE does not fit the model or the hookpoint.
        `ValueError`: for settings that contradict each other, a trainable head, or tokenizers that differ.
    """

    args: SAETuningConfig
    model: nn.Module
    processing_class: PreTrainedTokenizerBase

    _tag_names = ["trl", "resa-hf", "sae-tuning"]  # noqa: RUF012  # as in TRL's trainers
    _name = "SAE-Tuning"
    _paper = {  # noqa: RUF012
        "title": "Resa: Transparent Reasoning Models via SAEs",
        "id": "2506.09967",
        "citation": "@article{wang2025resa,\n  title={Resa: Transparent Reasoning Models via SAEs},\n"
        "  author={Wang, Shangshang and others},\n  journal={arXiv preprint arXiv:2506.09967},\n  year={2025}\n}",
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SAETuningConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        sae: str | nn.Module | None = None,
        source_model: str | PreTrainedModel | None = None,
        control_sae: str | nn.Module | None = None,
        peft_config: PeftConfig | None = None,
        data_collator: DataCollator | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
    ) -> None:
        args = copy.copy(args) if args is not None else SAETuningConfig(output_dir="sae-tuning")
        args.hub_strategy = HubStrategy.END  # checkpoints hold pickles
        args._n_gpu = min(args.n_gpu, 1)  # nn.DataParallel would run its replicas with the first one's loss
        with whole_weights(model):
            target = load_target(model, args)
        if isinstance(target, PeftModel) and target.active_peft_config.is_prompt_learning:
            raise ValueError(
                "Prompt-learning adapters are not supported: SAE-Tuning runs the backbone without the prompt."
            )
        args.check_sae(sae is not None or args.sae is not None)
        args.check_control_sae(control_sae is not None or args.control_sae is not None)
        args.check_source(source_model is not None)
        with whole_weights(target):
            self._placed: PlacedSAE | None = place_sae(target, args, sae)
            other = load_control_sae(target, args, self._placed, control_sae) if self._placed is not None else None
            named = sae if isinstance(sae, str) else args.sae
            self.revisions = loaded_revision("base", target) | sae_revision("sae", named, args.sae_revision)
            if not isinstance(target, PeftModel):
                peft_config = own_config(peft_config)
            super().__init__(
                model=target,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
                formatting_func=formatting_func,
            )
            adapter_in_float32(self.model)
            self._plain_sft = self._placed is None and args.kl_weight == 0
            self._insertion: Insertion | None = None
            self._source: PreTrainedModel | None = None
            check_spreading(args, self.accelerator)
            self.data_collator = with_blank(self.data_collator)
            # Layers that hand a state through, or stop half way, would leave FSDP2 and ZeRO-3 waiting for the others.
            may_share = args.share_prefix == "auto" and not weights_are_spread(self.accelerator)
            self._shared: bool | None = None if may_share else False
            self._step_metrics = {"train": StepMetrics(), "eval": StepMetrics()}
            self._forward_redirection = ForwardRedirection()
            if not self._plain_sft:
                self._set_up_loss(source_model, other)
        hookpoints = [] if self._placed is None else [self._placed.hookpoint]
        models = [model for model in (self.model, self._source) if model is not None]
        self._compiler = LayerCompiler(self.accelerator, models, hookpoints)

    def _set_up_loss(self, source_model: str | PreTrainedModel | None, other: nn.Module | None) -> None:
        # The loss below is always divided by `num_items_in_batch`, whatever the signature of the model's forward.
        self.model_accepts_loss_kwargs = True
        # Position 0 is never predicted, also where the Trainer does not know the architecture's loss (GPT-2).
        self._loss_shifts_labels = True
        bare: PreTrainedModel = causal_lm(self.model)  # type: ignore[assignment]  # it is one, inside PEFT
        self._head: LMHead = frozen_head(bare)
        self._head_layer: nn.Module = bare.get_output_embeddings()
        self._teacher_head = self._head
        if source_model is not None:
            self._source = self._load_source(source_model).requires_grad_(False).eval()
            self._source.to(self.accelerator.device)
            self.revisions |= loaded_revision("source", self._source)
            self._teacher_head = frozen_head(self._source)
            if self._teacher_head.weight.shape[0] != self._head.weight.shape[0]:
                raise ValueError(
                    f"The source model has {self._teacher_head.weight.shape[0]} tokens and the target "
                    f"{self._head.weight.shape[0]}; teacher and student must share one vocabulary."
                )
        if self._placed is not None:
            self._insertion = self._make_insertion(self._placed, other)
        cached = self.args.teacher_cache is not None
        if cached and not (isinstance(self.train_dataset, Dataset) and "input_ids" in self.train_dataset.column_names):
            raise ValueError("teacher_cache needs a training data set of rows that can be counted, not a stream.")
        open_cache = self._open_teacher_cache if cached else None
        self._teacher = Teacher(self.args, self.model, self._source, self._insertion, self._placed, open_cache)
        if not isinstance(self.train_dataset, IterableDataset):  # accelerate cuts a stream's batches by rows
            self.data_collator = HostCollator(self.data_collator, keys=cached)

    def _make_insertion(self, placed: PlacedSAE, other: nn.Module | None) -> Insertion:
        placed.special_tokens = special_token_ids(self.args, placed.module, self.processing_class)
        placed.module.to(self.accelerator.device)
        module = make_control(
            self.args.control,
            placed.module,
            seed=self.args.seed,
            other=other,
            activations=self._activations(placed),
        )
        self._below = layer_index(self.model, placed.hookpoint)
        if placed.mismatch is not None:
            warn_of_mismatch(placed, next(self._activations(placed)))
        insertion = Insertion(module, stop_gradient=self.args.sae_gradient == "stop").to(self.accelerator.device)
        return insertion.requires_grad_(False)

    def _open_teacher_cache(self, states: list[torch.Tensor]) -> TeacherCache:
        fingerprint = teacher_fingerprint(
            self.model if self._source is None else self._source,
            hookpoint=self._placed and self._placed.hookpoint,
            precision=self.accelerator.mixed_precision,
            device=self.accelerator.device.type,
            loading=self.args.model_init_kwargs,
        )
        rows: Any = self.train_dataset["input_ids"]  # type: ignore[index]  # checked above
        cache = TeacherCache(str(self.args.teacher_cache), fingerprint, rows, states)
        told = "complete" if cache.complete else "filled in the first epoch"
        self.accelerator.print(f"teacher_cache: {cache.path}, {cache.bytes / 1e9:,.2f} GB, {told}.")
        return cache

    def _activations(self, placed: PlacedSAE) -> Iterator[torch.Tensor]:
        """What the SAE replaces in the first rows of the training data, `[positions, d_in]` batch by batch.

        Every process takes the same rows, and nothing random is drawn: all fit the same control, and train as they
        would have without.
        """
        size = self.args.train_batch_size
        rows = list(itertools.islice(self.train_dataset, FITTING_BATCHES * size))  # type: ignore[arg-type]
        collate = self._get_collator_with_removed_columns(self.data_collator)
        batches = (collate(rows[start : start + size]) for start in range(0, len(rows), size))
        spliced = self.model if self.args.sae_in == "student" or self._source is None else self._source
        for x in spliced_activations(spliced, placed, batches):
            yield x.to(self.accelerator.device)

    def _load_source(self, source_model: str | PreTrainedModel) -> PreTrainedModel:
        if not isinstance(source_model, str):
            return source_model
        check_same_vocabulary(self.processing_class, load_tokenizer(source_model))
        return load_causal_lm(source_model, dtype=self._head.weight.dtype)

    def _spliced_student(self) -> AbstractContextManager[None]:
        """The SAE stands in the model while the block runs, if it belongs there."""
        if self._insertion is None or self._placed is None or self.args.sae_in != "student":
            return nullcontext()
        return splice(self.model, self._placed.hookpoint, self._insertion)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Gradient checkpointing runs submodules again in the backward, so the SAE stays until that is over.
        with self._compiler.running(), self._spliced_student():
            loss: torch.Tensor = super().training_step(*args, **kwargs)
        due = self.state.global_step + 1
        if (
            self._insertion is not None
            and self.accelerator.sync_gradients
            and not self.is_deepspeed_enabled  # which keeps the gradients to itself
            and due % max(self.state.logging_steps, 1) == 0
        ):
            self._step_metrics["train"].gradients = gradient_norms(self.model, self._below)
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._compiler.running(), self._spliced_student():
            return super().prediction_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if self._plain_sft:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        unwrapped = self.accelerator.unwrap_model(model)
        divergence, entropy = self._forward_redirection(model, unwrapped, self._token_losses, unwrapped, inputs)
        loss = self.args.kl_weight * divergence.sum() + self.args.sft_weight * entropy.sum()
        count = max(divergence.numel(), entropy.numel()) if num_items_in_batch is None else num_items_in_batch
        loss = loss / (count.to(loss.device).clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1))
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        first_step = self.model.training and self.state.global_step == 0
        self._metrics_of_mode().add(divergence.detach(), entropy.detach(), inputs, first_step)
        return (loss, None) if return_outputs else loss

    def _token_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Divergence and cross-entropy at the counted positions, each `[counted]`, or empty for a weight of 0."""
        batch = _forward_inputs(inputs)
        labels = inputs["labels"][:, 1:]
        counts = labels != -100
        # Positions as the collator found them on the host; looked for here, the device would have to be waited for.
        counted = inputs["counted"] if "counted" in inputs else counts.flatten().nonzero().squeeze(1)
        with ExitStack() as stack:
            # accelerate's is around the forward that this method stands in for.
            stack.enter_context(self.accelerator.autocast())
            if self._insertion is not None and self._placed is not None:
                self._insertion.set_untouched(self._placed.special_positions(inputs["input_ids"]))
                every = torch.nn.functional.pad(counts, (0, 1), value=False)
                fvu_sums = self._metrics_of_mode().fvu_sums
                stack.enter_context(self._insertion.measuring(every, fvu_sums))
            taught = self._teacher.states(model, batch, inputs.get("rows")) if self.args.kl_weight > 0 else None
            if taught is not None and taught.at_hookpoint is not None and self._shares_prefix(model, batch):
                stack.enter_context(passing_through(model, self._below, taught.at_hookpoint))
            student = backbone(model)(**batch).last_hidden_state[:, :-1].flatten(0, 1)[counted]
        divergence = entropy = student.new_zeros(0)
        with whole_head(self._head, self._head_layer) as head:
            if taught is not None:
                teacher_head = head if self._source is None else self._teacher_head
                teacher = taught.last[:, :-1].flatten(0, 1)[counted]
                settings = (self.args.kl_beta, self.args.kl_temperature)
                divergence = token_divergence(student, teacher, head, teacher_head, *settings)
            if self.args.sft_weight > 0:
                entropy = token_cross_entropy(student, head, labels.flatten()[counted])
        return divergence, entropy

    def _shares_prefix(self, model: nn.Module, batch: dict[str, Any]) -> bool:
        """Whether the student may start from the teacher's state at the hookpoint; tried out in the first step."""
        if self._shared is None and self.model.training and self._insertion is not None:
            exact = prefix_is_exact(model, self._insertion, self._below, batch)
            agreeing = self.accelerator.reduce(torch.full((), float(exact), device=self.accelerator.device))
            self._shared = int(agreeing) == self.accelerator.num_processes
            if not self._shared:
                self.accelerator.print(
                    "share_prefix: not exact here (dropout, adapters not at zero, or keys shared by layers)."
                )
        return bool(self._shared)

    def _metrics_of_mode(self) -> StepMetrics:
        return self._step_metrics["train" if self.model.training else "eval"]

    def _modules(self) -> list[nn.Module]:
        others = (self._source, self._insertion)
        return [*super()._modules(), *(module for module in others if module is not None)]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if not self._plain_sft:
            counts = self._metrics_of_mode().take(self.accelerator)
            tokens = int(counts.pop("tokens", 0))
            self._trained_tokens += tokens if mode == "train" else 0
            prefix = "eval_" if mode == "eval" else ""
            logs.update({f"{prefix}{key}": value for key, value in counts.items()})
            logs[f"{prefix}num_tokens"] = self._trained_tokens
        super().log(logs, start_time)


def _forward_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    others = ("labels", "counted", "rows", "blank")
    return {key: value for key, value in inputs.items() if key not in others} | {"use_cache": False}
