"""What is written down of an SAE that Stage I trained, so that its user need not guess."""

from typing import Any

import sae_lens
import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from .. import __version__
from ..hookpoints import causal_lm
from .autoencoder import TopKSAE
from .config import SAETrainingConfig


def training_metadata(
    sae: TopKSAE, args: SAETrainingConfig, source_model: nn.Module, train_dataset: Any, tokens_seen: int
) -> dict[str, Any]:
    """
    The metadata of a trained SAE. Keys are sae-lens' where it has one (`model_name`, `context_size`, `prepend_bos`).

    Args:
        sae ([`TopKSAE`]): the SAE; if finetuned, its metadata name the SAE that it started from.
        args ([`SAETrainingConfig`]): the settings.
        source_model (`torch.nn.Module`): the source model.
        train_dataset (`datasets.Dataset` or other): its fingerprint is kept, if it has one.
        tokens_seen (`int`): tokens trained on, by all processes.
    """
    model = causal_lm(source_model)
    return {
        "model_name": model.config.name_or_path if isinstance(model, PreTrainedModel) else None,
        "context_size": args.max_length,
        "prepend_bos": False,
        "initial_sae": sae.metadata.get("initial_sae"),
        "tokens_seen": tokens_seen,
        "max_length": args.max_length,
        "k": sae.k,
        "seed": args.seed,
        "exclude_special_tokens": args.exclude_special_tokens,
        "max_norm_ratio": args.max_norm_ratio,
        "sae_optimizer": args.sae_optimizer,
        "learning_rate": args.learning_rate_for(sae.num_latents),
        "auxk_alpha": args.auxk_alpha,
        "dataset_fingerprint": train_dataset._fingerprint if isinstance(train_dataset, Dataset) else None,
        "versions": {
            "resa_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sae_lens": sae_lens.__version__,
        },
    }
