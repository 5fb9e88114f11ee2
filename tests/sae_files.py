"""Small SAEs, and the files that hold them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from resa_hf.sae.autoencoder import TopKSAE

D_IN, LATENTS, K = 8, 24, 4


def make_sae(hookpoint: str | None = "layers.1", seed: int = 0) -> TopKSAE:
    sae = TopKSAE(D_IN, LATENTS, K, hookpoint=hookpoint, seed=seed, metadata={"model_name": "tiny", "seed": seed})
    with torch.no_grad():
        sae.b_enc += torch.linspace(-0.2, 0.3, LATENTS)
        sae.b_dec += torch.linspace(-1, 1, D_IN)
    return sae


def make_x() -> Tensor:
    return torch.randn(5, 3, D_IN, generator=torch.Generator().manual_seed(1)) + 0.5


def write_sparsify(folder: Path, config: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """An SAE in sparsify's layout, written by hand."""
    generator = torch.Generator().manual_seed(2)
    folder.mkdir(parents=True)
    W_dec = torch.randn(LATENTS, D_IN, generator=generator)
    tensors = {
        "encoder.weight": torch.randn(LATENTS, D_IN, generator=generator),
        "encoder.bias": torch.randn(LATENTS, generator=generator),
        "W_dec": W_dec / W_dec.norm(dim=1, keepdim=True),
        "b_dec": torch.randn(D_IN, generator=generator),
    }
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "sae.safetensors")
    defaults = {
        "activation": "topk",
        "d_in": D_IN,
        "expansion_factor": 32,
        "k": K,
        "multi_topk": False,
        "normalize_decoder": True,
        "num_latents": LATENTS,
        "skip_connection": False,
        "transcode": False,
    }
    (folder / "cfg.json").write_text(json.dumps({**defaults, **(config or {})}))
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a cfg.json, or tensors of a weight file; `None` takes the entry out."""
    content = load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
    content = {name: value for name, value in {**content, **changes}.items() if value is not None}
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        path.write_text(json.dumps(content))
