"""What is written down of an SAE that Stage I trained, so that its user need not guess."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sae_lens
import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..hookpoints import causal_lm, hooked_module
from .autoencoder import TopKSAE
from .quality import sae_quality

if TYPE_CHECKING:
    from .trainer import SAETrainer

# Rows that are looked at to tell how text begins, and held-out rows on which cross-entropy is measured.
_ROWS = 64
CE_TOKENS = 2048  # their logits take 1.2 GB with Qwen's vocabulary


def training_metadata(trainer: "SAETrainer", sae: TopKSAE) -> dict[str, Any]:
    """
    The metadata of a trained SAE. Where sae-lens has a key for something, it is sae-lens', so that its
    `ActivationsStore.from_sae`, `run_evals` and `load_model` find what they need. (`save_sae` adds `hook_name`.)

    Args:
        trainer ([`SAETrainer`]): where it was trained; what its `metadata` say goes before what is found here.
        sae ([`TopKSAE`]): the SAE; if finetuned, its metadata name the SAE that it started from.
    """
    args, model = trainer.args, causal_lm(trainer.source.model)
    hooked = hooked_module(model, str(sae.hookpoint))
    read = trainer.revisions.get("base", {"name": None, "commit": None})
    return {
        "model_name": read["name"],
        "model_revision": read["commit"],
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": {},
        "hook_head_index": None,
        # The module's path in the transformers model: the hook's name where sae-lens runs that model itself.
        "hf_hook_name": next(name for name, module in model.named_modules() if module is hooked),
        **_of_the_text(trainer),
        # The ids: by `True` sae-lens means BOS, EOS, PAD and SEP only.
        "exclude_special_tokens": list(trainer.excluded_token_ids) or False,
        "initial_sae": sae.metadata.get("initial_sae"),
        "tokens_seen": int(trainer.progress.tokens_seen),
        "max_length": args.max_length,
        "k": sae.k,
        "seed": args.seed,
        "max_norm_ratio": args.max_norm_ratio,
        "sae_optimizer": args.sae_optimizer,
        "learning_rate": args.learning_rate_for(sae.num_latents),
        "auxk_alpha": args.auxk_alpha,
        "versions": {
            "resa_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sae_lens": sae_lens.__version__,
        },
        **trainer.metadata,
    }


def _of_the_text(trainer: "SAETrainer") -> dict[str, Any]:
    """Tokens a row, and whether rows begin with the BOS (`None`: not known): packing puts it there for some models."""
    dataset, tokenizer = trainer.train_dataset, trainer.processing_class
    if not isinstance(dataset, Dataset):
        return {"context_size": trainer.args.max_length, "prepend_bos": None, "dataset_fingerprint": None}
    rows = dataset[:_ROWS]["input_ids"]
    bos = [tokenizer.bos_token_id] if isinstance(tokenizer, PreTrainedTokenizerBase) else None
    return {
        "context_size": max(map(len, rows)),
        "prepend_bos": None if bos is None else all(list(ids[:1]) == bos for ids in rows),
        "dataset_fingerprint": dataset._fingerprint,
    }


def ce_recovered(trainer: "SAETrainer", load_whole: Callable[[], nn.Module] | None = None) -> dict[str, float]:
    """
    Cross-entropy recovered ([`sae_quality`]) on the first 64 held-out rows, to stand beside what `evaluate` returns.

    It takes four forwards of the source model for each SAE, and is no part of `evaluate`, which takes one for all.

    Args:
        trainer ([`SAETrainer`]):
            After training.
        load_whole (callable, *optional*):
            Loads the whole source model, where the trainer has it only up to the deepest hookpoint. It takes that
            one's place.

    Returns:
        `dict[str, float]`: `eval_ce_recovered/H` for each hookpoint H.
    """
    rows = trainer.eval_dataset
    if not isinstance(rows, Dataset):
        return {}
    if load_whole is not None:
        trainer.source.model = load_whole()
        nn.Module.to(trainer.source.model, trainer.args.device)
    rows = rows.select(range(min(len(rows), _ROWS)))
    batch_size = max(1, CE_TOKENS // trainer.args.max_length)
    recovered = {
        hookpoint: sae_quality(
            *(trainer.source.model, sae, rows),
            batch_size=batch_size,
            excluded_token_ids=trainer.excluded_token_ids,
        )["ce_recovered"]
        for hookpoint, sae in trainer.saes.items()
    }
    return {f"eval_ce_recovered/{hookpoint}": value for hookpoint, value in trainer.share.of_all(recovered).items()}
