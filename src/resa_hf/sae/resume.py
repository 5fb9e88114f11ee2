"""What Stage I writes beside the SAEs to go on from, and how it goes on."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer import OPTIMIZER_NAME

from ..errors import IncompatibleSAEError
from .autoencoder import TopKSAE
from .checkpoint import load_sae
from .spread import HookpointShare
from .totals import TrainingProgress

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

PROGRESS_FILE = "sae_progress.safetensors"


class ResumableSAEs(_Base):
    """A mixin of [`SAETrainer`]: its checkpoints are the same however many processes there are, SAEs spread or not."""

    share: HookpointShare
    progress: TrainingProgress
    _tokens_at_most: int
    _b_dec_pending: bool

    @property
    def saes(self) -> dict[str, TopKSAE]:
        """Hookpoint to SAE."""
        raise NotImplementedError

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        since_fired = self.share.of_all({name: since.cpu() for name, since in self.progress.since_fired.items()})
        whole = self.share.whole_optimizer(self.optimizer.state_dict()) if self.share.spread else None  # type: ignore[union-attr]
        if whole is not None:
            torch.save(whole, Path(output_dir) / OPTIMIZER_NAME)  # as one process would, instead of its own share
        if self.args.should_save:
            save_file(self.progress.tensors(since_fired), Path(output_dir) / PROGRESS_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / PROGRESS_FILE
        try:
            self.progress.load(load_file(path))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise IncompatibleSAEError(
                f"Training cannot resume: {path} is missing, corrupt or of other hookpoints ({error})."
            ) from error
        self._tokens_at_most = int(self.progress.tokens_seen)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        for hookpoint, sae in self.saes.items():
            saved = load_sae(resume_from_checkpoint, hookpoint)
            if (saved.d_in, saved.num_latents, saved.k) != (sae.d_in, sae.num_latents, sae.k):
                raise IncompatibleSAEError(
                    f"Training cannot resume: the SAE in {Path(resume_from_checkpoint) / hookpoint} has "
                    f"{saved.num_latents} latents and k {saved.k}, that of this run {sae.num_latents} and {sae.k}."
                )
            sae.load_state_dict(saved.state_dict())
        self._b_dec_pending = False

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))
