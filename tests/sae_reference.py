"""Short runs of Stage I, and what they are measured by, written out plainly."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from resa_hf.hookpoints import capture
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.config import SAETrainingConfig
from resa_hf.sae.trainer import SAETrainer

LENGTH, LATENTS, K = 16, 48, 4
HOOKPOINTS = ["layers.0", "layers.1", "layers.2"]


def rows(count: int, seed: int = 0, length: int = LENGTH) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_dict({"input_ids": torch.randint(3, 64, (count, length), generator=generator).tolist()})


def config(folder: Path, **changes: Any) -> SAETrainingConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "hookpoints": ["layers.1"],
        "num_latents": LATENTS,
        "k": K,
        "learning_rate": 5e-3,
        "max_length": LENGTH,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }
    return SAETrainingConfig(**{**settings, **changes})


def train(model: nn.Module, args: SAETrainingConfig, dataset: Any = None, **kwargs: Any) -> SAETrainer:
    trainer = SAETrainer(model, args, rows(24) if dataset is None else dataset, **kwargs)
    trainer.train()
    return trainer


def logged(trainer: SAETrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(trainer: SAETrainer) -> dict[str, Tensor]:
    return {f"{hp}/{name}": t.clone() for hp, sae in trainer.saes.items() for name, t in sae.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def activations(model: nn.Module, dataset: Dataset, hookpoint: str) -> Tensor:
    with torch.no_grad(), capture(model, [hookpoint]) as hooked:
        model(input_ids=torch.tensor(dataset["input_ids"][:]))
    return hooked[hookpoint].flatten(0, 1).double()


def naive_fvu(sae: TopKSAE, x: Tensor) -> float:
    W_enc, b_enc, W_dec, b_dec = (t.detach().double() for t in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    pre = torch.relu((x - b_dec) @ W_enc + b_enc)
    z = torch.where(pre >= pre.topk(sae.k, dim=1).values[:, -1:], pre, 0)
    return float((x - (z @ W_dec + b_dec)).pow(2).sum() / (x - x.mean(0)).pow(2).sum())
