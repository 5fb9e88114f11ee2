"""Stage I: train SAEs on the activations of a frozen source model."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, HubStrategy

from ..checkpoints import WholeCheckpoints
from ..compiling import LayerCompiler
from ..guards import Guarded, check_token_ids
from ..late_flag import LateFlag
from ..provenance import loaded_revision, sae_revision
from ..pushing import PushToHub
from ..sharding import ShardedRows
from .autoencoder import TopKSAE
from .average import DecoderNorm
from .checkpoint import save_sae
from .config import SAETrainingConfig
from .dataset import make_collator, prepare_dataset
from .initial import initial_saes, resolved_hookpoints
from .metadata import training_metadata
from .objective import SAEBank, SAEStep
from .resume import ResumableSAEs
from .signum import ScheduleFreeSignum
from .source import ActivationSource, SourceBatch
from .spread import HookpointShare, Unreduced
from .totals import ReconstructionTotals, TrainingProgress


class SAETrainer(Guarded, WholeCheckpoints, PushToHub, ShardedRows, ResumableSAEs, Trainer):
    """
    Trains one TopK SAE at each hookpoint, all in one pass over a frozen source model.

    Stage I of the paper [Resa](https://huggingface.co/papers/2506.09967). A [`~transformers.Trainer`] whose model is
    the SAEs; the source model only makes their input, without gradients, in evaluation mode, and up to the deepest
    hookpoint. The loss is FVU, summed over hookpoints. Each SAE ends as if it had been trained alone. Runs on one
    process or under DDP; there each process has all SAEs, or its share of them (`spread_hookpoints`).

    Logs, for each hookpoint: `fvu/H`, `l0/H`, `dead_share/H` (latents that have not fired for `dead_after_tokens`),
    and `tokens_seen`. Evaluation, exact over the whole dataset: `eval_fvu/H`, `eval_l0/H`, `eval_dead_share/H`
    (latents that never fired there), and `eval_loss`, the sum of the FVUs.

    Args:
        model (`transformers.PreTrainedModel`):
            The source model, plain or PEFT-wrapped. It stays as it is, but for the device.
        args ([`SAETrainingConfig`]):
            The settings.
        train_dataset (`datasets.Dataset` or `torch.utils.data.Dataset`, *optional*):
            Rows with `input_ids` (and `attention_mask`, if padded), or with `text`, which is packed into chunks of
            exactly `max_length` tokens.
        eval_dataset (`datasets.Dataset` or `torch.utils.data.Dataset`, *optional*):
            Held-out rows of the same form.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer; needed for text and for `exclude_special_tokens`.
        callbacks (`list[transformers.TrainerCallback]`, *optional*):
            As for [`~transformers.Trainer`].
        metadata (`dict[str, Any]`, *optional*):
            What is to be saved with each SAE beside the settings, such as sae-lens' `dataset_path`.

    Raises:
        `HookpointError`: if a hookpoint is unknown, or none is given.
        `IncompatibleSAEError`: if `initial_sae` cannot be read or does not fit.
        `DataError`: if a dataset is empty or lacks its column.
        `ValueError`: if the tokenizer is needed and missing.
    """

    model: SAEBank
    args: SAETrainingConfig

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: SAETrainingConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        args = copy.copy(args)
        args.hub_strategy = HubStrategy.END  # checkpoints hold pickles
        device = args.device
        args._n_gpu = min(args.n_gpu, 1)  # DataParallel would copy the SAEs to devices where the source model is not
        if args.exclude_special_tokens and processing_class is None:
            raise ValueError("exclude_special_tokens needs the tokenizer: give processing_class.")
        if next(model.parameters()).device != device:
            nn.Module.to(model, device)
        self._tokenizer = processing_class
        self.metadata = dict(metadata or {})
        self._signum: ScheduleFreeSignum | None = None
        hookpoints = resolved_hookpoints(model, args)
        self.share = HookpointShare(hookpoints, args.spread_hookpoints, args.process_index, args.world_size)
        bank = SAEBank(initial_saes(model, args, self.share.mine))
        self.revisions = loaded_revision("base", model)
        self.revisions |= sae_revision("initial_sae", args.initial_sae, args.initial_sae_revision)
        special = processing_class.all_special_ids if processing_class is not None else []
        self.excluded_token_ids = special if args.exclude_special_tokens else []
        self.source = ActivationSource(model, hookpoints, self.excluded_token_ids, args.max_norm_ratio)
        pad = processing_class.pad_token_id if processing_class is not None else None
        super().__init__(
            model=bank,
            args=args,
            data_collator=make_collator(0 if pad is None else pad),
            train_dataset=prepare_dataset(train_dataset, processing_class, args.max_length, "train_dataset"),
            eval_dataset=prepare_dataset(eval_dataset, processing_class, args.max_length, "eval_dataset"),
            processing_class=processing_class,
            callbacks=[DecoderNorm(self), *(callbacks or [])],
        )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("SAETrainer runs on one process or under DDP, not under DeepSpeed or FSDP.")
        check_token_ids(self.train_dataset, model)
        self._compiler = LayerCompiler(self.accelerator, [model], hookpoints)
        # FVU is a mean over the tokens of a batch, so the Trainer divides it by the number of accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.progress = TrainingProgress(self.saes)
        self._tokens_at_most = 0
        self._b_dec_pending, self._b_dec_lacking = args.initial_sae is None, LateFlag()

    @property
    def saes(self) -> dict[str, TopKSAE]:
        """Hookpoint to SAE; with `spread_hookpoints` those of this process."""
        return self.model.saes

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if self.share.spread and self.is_in_train:
            return Unreduced(self.model)
        return super()._wrap_model(model, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        # The Trainer would keep the columns that the SAEs' forward names.
        self._signature_columns = ["input_ids", "attention_mask"]  # type: ignore[assignment]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group an SAE: the learning rate depends on its number of latents."""
        if self.optimizer is None:
            own = {hookpoint: self.args.learning_rate_for(sae.num_latents) for hookpoint, sae in self.saes.items()}
            groups: list[dict[str, Any]] = [
                {"params": list(self.saes[hookpoint].parameters()) if hookpoint in own else [], "lr": rate}
                for hookpoint, rate in self.share.of_all(own).items()
            ]
            if self.args.sae_optimizer == "signum":
                self.optimizer = self._signum = ScheduleFreeSignum(groups, lr=groups[0]["lr"])
            else:
                betas = (self.args.adam_beta1, self.args.adam_beta2)
                self.optimizer = torch.optim.Adam(groups, betas=betas, eps=self.args.adam_epsilon)
            self.optimizer.register_load_state_dict_pre_hook(self.share.own_optimizer)
        return self.optimizer

    def use_average(self, average: bool) -> None:
        """
        Puts the average of the iterates into the SAEs (to evaluate, to save), or the point where training goes on.

        Nothing changes with Adam, or before the first step.

        Args:
            average (`bool`): the average, or else the point.
        """
        if self._signum is None or not self._signum.state:
            return
        if average:
            self._signum.use_average()
        else:
            self._signum.use_training_point()
        for sae in self.saes.values():
            sae.unit_norm_decoder()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The average inside the block. Outside of training the SAEs hold it already."""
        if not self.is_in_train:
            yield
            return
        self.use_average(True)
        try:
            yield
        finally:
            self.use_average(False)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """FVU, and AuxK if asked for, summed over hookpoints."""
        batch = self.share.to_owners(self._run_source(inputs))
        if self._b_dec_pending:
            self._start_b_dec(batch)
        # Known without waiting for the device: as long as too few tokens were seen, no latent can be dead.
        self._tokens_at_most += batch.counted.numel() * self.args.world_size
        # Other processes may have seen more than this one, so there it is not known.
        seen_enough = self.args.world_size > 1 or self._tokens_at_most > self.args.dead_after_tokens
        may_be_dead = self.args.auxk_alpha > 0 and seen_enough
        dead_masks = self.progress.dead_masks(self.args.dead_after_tokens) if may_be_dead else None
        processes = 1 if self.share.spread else self.args.world_size
        steps: dict[str, SAEStep] = model(
            batch.activations, batch.weights, dead_masks, self.args.auxk_alpha, processes
        )
        with torch.no_grad():
            self.progress.tokens_seen += self._sum(batch.counted.sum().long())
            self.progress.update(
                {
                    hookpoint: step._replace(firings=self._add(step.firings), tokens=self._add(step.tokens))
                    for hookpoint, step in steps.items()
                }
            )
        loss = torch.stack([step.loss for step in steps.values()]).sum()
        if self.share.spread:  # the value of all SAEs, the gradient of these
            loss = loss + self._sum(loss.detach()) - loss.detach()
        return (loss, steps) if return_outputs else loss

    def _run_source(self, inputs: dict[str, Any]) -> SourceBatch:
        # A cache of keys and values is filled layer by layer, and each would need a graph of its own.
        inputs = {**inputs, "use_cache": False}
        with self._compiler.running():
            return self.source(inputs, self.accelerator.autocast())

    def _sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes."""
        total: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return total

    def _add(self, tensor: Tensor) -> Tensor:
        """Sum over processes of what each has seen with an SAE. Where SAEs are spread, their owner sees everything."""
        return tensor if self.share.spread else self._sum(tensor)

    @torch.no_grad()
    def _start_b_dec(self, batch: SourceBatch) -> None:
        """Puts b_dec at the mean activation of the first batch where that is finite, on all processes alike."""
        finite = batch.counted.new_ones((), dtype=torch.bool)
        for hookpoint, sae in self.saes.items():
            weight = batch.weights[hookpoint]
            x = batch.activations[hookpoint].float().masked_fill((weight == 0).unsqueeze(-1), 0)
            mean = self._add(x.sum(dim=0)) / self._add(weight.sum()).clamp(min=1)
            usable = mean.isfinite().all()
            sae.b_dec.copy_(torch.where(usable, mean, sae.b_dec))
            finite &= usable
        self._b_dec_pending = False
        self._b_dec_lacking.put(~finite)

    def _count(self, skipped: bool, batches: list[Any]) -> None:
        super()._count(skipped, batches)
        # Behind the step, where the device has been given all its work.
        self._b_dec_pending |= self._b_dec_lacking.take()

    def _modules(self) -> list[nn.Module]:
        return [self.source.model, *super()._modules()]

    def _norm_of_all(self, norm: Any) -> Any:
        if not self.share.spread:
            return norm
        return self._sum(torch.as_tensor(norm, device=self.args.device) ** 2) ** 0.5

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each SAE's statistics to the logs of a training step."""
        if "loss" in logs:
            window = self._sum_window().tolist()
            dead = self.progress.dead_masks(self.args.dead_after_tokens)
            told = {
                hookpoint: {
                    "fvu": squared_error / variance if variance > 0 else math.nan,
                    "l0": active / max(tokens, 1),
                    "dead_share": dead[hookpoint].float().mean().item(),
                }
                for hookpoint, (squared_error, variance, active, tokens) in zip(self.saes, window, strict=True)
            }
            for hookpoint, values in self.share.of_all(told).items():
                logs |= {f"{name}/{hookpoint}": value for name, value in values.items()}
            logs["tokens_seen"] = int(self.progress.tokens_seen)
        super().log(logs, start_time)

    def _sum_window(self) -> Tensor:
        # Firings and tokens are sums over processes already, errors and variances are not.
        window = self.progress.take_window()
        window[:, :2] = self._add(window[:, :2].contiguous())
        return window

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """
        Each process reads its own rows, or all where it holds only some of the SAEs. The Trainer's loader would repeat
        some where they do not divide evenly.

        Raises:
            `ValueError`: if there is no dataset.
        """
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]  # type: ignore[index]
        elif eval_dataset is None:
            eval_dataset = self.eval_dataset
        if eval_dataset is None:
            raise ValueError("Evaluation needs an eval_dataset: give one to SAETrainer or to evaluate().")
        dataset = prepare_dataset(eval_dataset, self._tokenizer, self.args.max_length, "eval_dataset")
        first, step = (0, 1) if self.share.spread else (self.args.process_index, self.args.world_size)
        mine = range(first, len(dataset), step)
        return DataLoader(Subset(dataset, mine), batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """FVU, L0 and dead share of each SAE over the whole dataset: ratios of sums, not means over batches."""
        totals = {hookpoint: ReconstructionTotals(sae) for hookpoint, sae in self.saes.items()}
        with self._averaged():
            for inputs in dataloader:
                batch = self._run_source(self._prepare_inputs(inputs))
                for hookpoint, total in totals.items():
                    total.update(batch.activations[hookpoint], batch.weights[hookpoint])
        for total in totals.values():
            total.sums, total.shift, total.firings = map(self._add, (total.sums, total.shift, total.firings))
        results = self.share.of_all({hookpoint: total.result() for hookpoint, total in totals.items()})
        metrics = {
            f"{metric_key_prefix}_{name}/{hookpoint}": result[name]
            for hookpoint, result in results.items()
            for name in ("fvu", "l0", "dead_share")
        }
        metrics[f"{metric_key_prefix}_loss"] = sum(result["fvu"] for result in results.values())
        samples = int(self._add(torch.tensor(len(dataloader.dataset), device=self.args.device)))  # type: ignore[arg-type]
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=samples)  # type: ignore[arg-type]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """One folder a hookpoint, in sae-lens' layout; nothing is pickled."""
        if not (self.args.should_save or self.share.spread):
            return
        folder = Path(output_dir or str(self.args.output_dir))
        with self._averaged():
            for hookpoint, sae in self.saes.items():
                sae.metadata = training_metadata(self, sae)
                save_sae(sae, folder / hookpoint)
        if self.share.spread:
            self.accelerator.wait_for_everyone()
