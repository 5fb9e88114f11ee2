"""The two ways an SAE lies in a folder, sae-lens' and sparsify's, each checked tensor by tensor when read.

sae-lens: `cfg.json` + `sae_weights.safetensors`. sparsify: `cfg.json` + `sae.safetensors`, in a folder named after the
hookpoint. sae-lens has a reader for the second, which transposes W_dec, takes `num_latents: 0` at its word and drops
the subtraction of b_dec; so it is read here.
"""

import json
import re
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import IncompatibleSAEError
from .autoencoder import SAELensSAE, TopKSAE

CONFIG_FILE = "cfg.json"
SAE_LENS_WEIGHTS = "sae_weights.safetensors"
SPARSIFY_WEIGHTS = "sae.safetensors"

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Activations scaled or whitened before the SAE, by numbers that are not in the file.
_NOT_IN_FILE = ("expected_average_only_in", "covariance_whitening")


def sae_lens_hook_name(hookpoint: str) -> str:
    """
    A hookpoint in sae-lens' spelling, or as it is where sae-lens has no word for it.

    Args:
        hookpoint (`str`): for example `"layers.12"`, `"layers.12.mlp"`.

    Returns:
        `str`: for example `"blocks.12.hook_resid_post"`, `"blocks.12.hook_mlp_out"`.
    """
    match = re.fullmatch(r"(?:layers|h)\.(\d+)(?:\.(mlp|self_attn|attn|attention))?", hookpoint)
    if match is None:
        return hookpoint
    kind = {None: "resid_post", "mlp": "mlp_out"}.get(match[2], "attn_out")
    return f"blocks.{match[1]}.hook_{kind}"


def read_sae(folder: Path) -> TopKSAE | SAELensSAE:
    """
    Reads the SAE of a folder, on the CPU and in the dtype of its file.

    Args:
        folder (`pathlib.Path`): holds `cfg.json` and one of the two weight files.

    Raises:
        `IncompatibleSAEError`: naming the file, and the tensor or the key, that is missing, corrupt or does not fit.
    """
    config = _read_config(folder / CONFIG_FILE)
    if (folder / SAE_LENS_WEIGHTS).is_file():
        return _from_sae_lens(config, folder / SAE_LENS_WEIGHTS)
    if (folder / SPARSIFY_WEIGHTS).is_file():
        return _from_sparsify(config, folder / SPARSIFY_WEIGHTS)
    raise IncompatibleSAEError(
        f"{folder} holds neither {SAE_LENS_WEIGHTS} (sae-lens) nor {SPARSIFY_WEIGHTS} (sparsify). "
        "Weights in other formats, pickles among them, are not read."
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise IncompatibleSAEError(f"{path} is missing: an SAE's folder holds its configuration there.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IncompatibleSAEError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise IncompatibleSAEError(f"{path} must hold a JSON object, not a {type(config).__name__}.")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    except (SafetensorError, OSError) as error:
        raise IncompatibleSAEError(f"{path} is corrupt or cut short ({error}). Save or download it again.") from error


def _check_tensors(path: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises unless the file holds exactly these tensors, of these shapes, floating and finite."""
    for name in shapes.keys() - tensors.keys():
        raise IncompatibleSAEError(f"{path} lacks the tensor {name}; it holds {', '.join(sorted(tensors)) or 'none'}.")
    for name in tensors.keys() - shapes.keys():
        raise IncompatibleSAEError(f"{path} holds an unexpected tensor {name}; expected: {', '.join(sorted(shapes))}.")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise IncompatibleSAEError(
                f"{path}: {name} has shape {list(tensor.shape)}; by the {CONFIG_FILE} beside it: {list(shapes[name])}."
            )
        if tensor.dtype not in _FLOATS:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
            raise IncompatibleSAEError(f"{path}: {name} has dtype {tensor.dtype}, not one of {wanted}.")
        if not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise IncompatibleSAEError(f"{path}: {name} has {count} entries that are NaN or infinite.")


def _one_dtype(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _positive_int(path: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise IncompatibleSAEError(f"{path}: {key} must be a positive whole number, not {value!r}.")
    return value


def _check_k(path: Path, k: int, num_latents: int) -> None:
    if k > num_latents:
        raise IncompatibleSAEError(f"{path}: k is {k}, more than the {num_latents} latents.")


def _from_sparsify(config: dict[str, Any], weights: Path) -> TopKSAE:
    path = weights.parent / CONFIG_FILE
    if config.get("transcode") or config.get("skip_connection"):
        raise IncompatibleSAEError(
            f"{path} describes a transcoder. Only SAEs, which reconstruct their input, fit here."
        )
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        kind = "signed topk" if config.get("signed") else config["activation"]
        raise IncompatibleSAEError(f"{path}: the activation is {kind!r}; of sparsify's SAEs only 'topk' is read.")
    d_in = _positive_int(path, config, "d_in")
    # `num_latents: 0` is sparsify's way to say that expansion_factor counts.
    num_latents = (
        _positive_int(path, config, "num_latents")
        if config.get("num_latents")
        else d_in * _positive_int(path, config, "expansion_factor")
    )
    k = _positive_int(path, config, "k")
    _check_k(path, k, num_latents)
    tensors = _read_tensors(weights)
    wide, latents, d = (num_latents, d_in), (num_latents,), (d_in,)
    _check_tensors(weights, tensors, {"encoder.weight": wide, "encoder.bias": latents, "W_dec": wide, "b_dec": d})
    tensors = _one_dtype(tensors)
    name = weights.parent.name
    return TopKSAE.from_weights(
        tensors["encoder.weight"],
        tensors["encoder.bias"],
        tensors["W_dec"],
        tensors["b_dec"],
        k=k,
        hookpoint=name if re.search(r"\.\d+(\.|$)", name) else None,
        metadata={"sparsify_config": config},
    )


def _from_sae_lens(config: dict[str, Any], weights: Path) -> TopKSAE | SAELensSAE:
    path = weights.parent / CONFIG_FILE
    cfg = _sae_lens_config(path, config)
    shell = _shell(cfg)
    tensors = _read_tensors(weights)
    if "scaling_factor" in tensors and bool((tensors["scaling_factor"] == 1).all()):
        del tensors["scaling_factor"]  # all ones, in files of sae-lens before 4
    _check_tensors(weights, tensors, {name: tuple(tensor.shape) for name, tensor in shell.state_dict().items()})
    tensors = _one_dtype(tensors)
    metadata = cfg.metadata.to_dict()
    hookpoint = metadata.get("hookpoint") or metadata.get("hook_name")
    k = _positive_int(path, cfg.to_dict(), "k") if cfg.architecture() == "topk" else None
    if k is not None:
        _check_k(path, k, cfg.d_sae)
    if k is None or cfg.normalize_activations != "none":
        shell.load_state_dict(tensors, assign=True)
        sae = shell.to(device="cpu", dtype=next(iter(tensors.values())).dtype)
        return SAELensSAE(sae, k=k, hookpoint=hookpoint, metadata=metadata)
    return _plain_topk(cfg, tensors, k, hookpoint, metadata)


def _sae_lens_config(path: Path, config: dict[str, Any]) -> SAEConfig:
    architecture = config.get("architecture", "standard")
    if "transcoder" in str(architecture) or config.get("d_out", config.get("d_in")) != config.get("d_in"):
        raise IncompatibleSAEError(
            f"{path} describes a transcoder ({architecture!r}). Only SAEs, which reconstruct their input, fit here."
        )
    if architecture not in SAE_CLASS_REGISTRY:
        known = ", ".join(name for name in SAE_CLASS_REGISTRY if "transcoder" not in name)
        raise IncompatibleSAEError(f"{path}: unknown architecture {architecture!r}; sae-lens reads {known}.")
    for key in ("d_in", "d_sae"):
        _positive_int(path, config, key)
    try:
        cfg = SAEConfig.from_dict(handle_config_defaulting(config))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IncompatibleSAEError(f"{path} is not a configuration that sae-lens reads: {error!r}.") from error
    if cfg.normalize_activations in _NOT_IN_FILE:
        raise IncompatibleSAEError(
            f"{path}: the SAE expects scaled activations (normalize_activations {cfg.normalize_activations!r}), and "
            "the scale is not in the file. Fold it into the weights with sae-lens, then save the SAE again."
        )
    if cfg.reshape_activations != "none":
        raise IncompatibleSAEError(
            f"{path}: the SAE reads attention heads (reshape_activations {cfg.reshape_activations!r}); "
            "only activations of shape [..., d_in] are supported."
        )
    return cfg


def _shell(cfg: SAEConfig) -> SAE[Any]:
    """The SAE without weights: their shapes are known, no memory is taken."""
    sae_class, _ = SAE_CLASS_REGISTRY[cfg.architecture()]
    cfg.device = "meta"
    return sae_class(cfg)


def _plain_topk(
    cfg: SAEConfig, tensors: dict[str, Tensor], k: int, hookpoint: str | None, metadata: dict[str, Any]
) -> TopKSAE:
    """A TopK SAE of sae-lens in our form; two of its options are folded into the weights, which changes no output."""
    encoder, b_enc, W_dec, b_dec = tensors["W_enc"].t(), tensors["b_enc"], tensors["W_dec"], tensors["b_dec"]
    if cfg.to_dict()["rescale_acts_by_decoder_norm"]:
        norm = W_dec.norm(dim=1).clamp(min=torch.finfo(W_dec.dtype).tiny)
        encoder, b_enc, W_dec = encoder * norm[:, None], b_enc * norm, W_dec / norm[:, None]
    if not cfg.apply_b_dec_to_input:
        b_enc = b_enc + encoder @ b_dec
    return TopKSAE.from_weights(encoder, b_enc, W_dec, b_dec, k=k, hookpoint=hookpoint, metadata=metadata)
