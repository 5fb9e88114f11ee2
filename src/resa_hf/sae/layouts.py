"""The two ways an SAE lies in a folder, sae-lens' and sparsify's, each checked tensor by tensor when read.

sae-lens: `cfg.json` + `sae_weights.safetensors`. sparsify: `cfg.json` + `sae.safetensors`, in a folder named after the
hookpoint. sae-lens has a reader for the second, which transposes W_dec, takes `num_latents: 0` at its word and drops
the subtraction of b_dec; so it is read here.
"""

import re
import reprlib
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEConfig
from torch import Tensor

from ..errors import IncompatibleSAEError
from ..untrusted import all_finite, read_json_object, read_shapes, read_tensors
from .autoencoder import SAELensSAE, TopKSAE

CONFIG_FILE = "cfg.json"
SAE_LENS_WEIGHTS = "sae_weights.safetensors"
SPARSIFY_WEIGHTS = "sae.safetensors"

# Of sae-lens' SAEs those whose latents depend on one activation, by one product and a threshold. Others have loops or
# sizes of their own in the configuration, which a stranger may set.
_READ = ("standard", "gated", "jumprelu", "topk", "abstopk")
_FLAGS = ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm")
# Activations scaled or whitened before the SAE, by numbers that are not in the file.
_NOT_IN_FILE = ("expected_average_only_in", "covariance_whitening")

_Shapes = Mapping[str, tuple[int, ...]]


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


def read_sae(folder: Path, root: Path) -> TopKSAE | SAELensSAE:
    """
    Reads the SAE of a folder, on the CPU and in the dtype of its file.

    Args:
        folder (`pathlib.Path`): holds `cfg.json` and one of the two weight files.
        root (`pathlib.Path`): the artifact's folder, out of which no link may lead.

    Raises:
        `IncompatibleSAEError`: naming the file, and the tensor or the key, that is missing, corrupt or does not fit.
    """
    config = read_json_object(folder / CONFIG_FILE, root, IncompatibleSAEError)
    for name, read in ((SAE_LENS_WEIGHTS, _from_sae_lens), (SPARSIFY_WEIGHTS, _from_sparsify)):
        if (folder / name).is_file():
            return read(config, folder / name, read_shapes(folder / name, root, IncompatibleSAEError))
    raise IncompatibleSAEError(
        f"{folder} holds neither {SAE_LENS_WEIGHTS} (sae-lens) nor {SPARSIFY_WEIGHTS} (sparsify). "
        "Weights in other formats, pickles among them, are not read."
    )


def _check_shapes(path: Path, found: _Shapes, wanted: _Shapes) -> None:
    """Raises unless the file holds exactly these tensors, of these shapes."""
    for name in wanted.keys() - found.keys():
        raise IncompatibleSAEError(f"{path} lacks the tensor {name}; it holds {', '.join(sorted(found)) or 'none'}.")
    for name in found.keys() - wanted.keys():
        raise IncompatibleSAEError(f"{path} holds an unexpected tensor {name}; expected: {', '.join(sorted(wanted))}.")
    for name, shape in found.items():
        if shape != wanted[name]:
            raise IncompatibleSAEError(
                f"{path}: {name} has shape {list(shape)}; by the {CONFIG_FILE} beside it: {list(wanted[name])}."
            )


def _one_dtype(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _positive_int(path: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise IncompatibleSAEError(f"{path}: {key} must be a positive whole number, not {reprlib.repr(value)}.")
    return value


def _check_k(path: Path, k: int, num_latents: int) -> None:
    if k > num_latents:
        raise IncompatibleSAEError(f"{path}: k is {k}, more than the {num_latents} latents.")


def _from_sparsify(config: dict[str, Any], weights: Path, shapes: _Shapes) -> TopKSAE:
    path = weights.parent / CONFIG_FILE
    if config.get("transcode") or config.get("skip_connection"):
        raise IncompatibleSAEError(
            f"{path} describes a transcoder. Only SAEs, which reconstruct their input, fit here."
        )
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        kind = "signed topk" if config.get("signed") else config["activation"]
        raise IncompatibleSAEError(
            f"{path}: the activation is {reprlib.repr(kind)}; of sparsify's SAEs only 'topk' is read."
        )
    d_in = _positive_int(path, config, "d_in")
    # `num_latents: 0` is sparsify's way to say that expansion_factor counts.
    num_latents = (
        _positive_int(path, config, "num_latents")
        if config.get("num_latents")
        else d_in * _positive_int(path, config, "expansion_factor")
    )
    k = _positive_int(path, config, "k")
    _check_k(path, k, num_latents)
    wide, latents, d = (num_latents, d_in), (num_latents,), (d_in,)
    _check_shapes(weights, shapes, {"encoder.weight": wide, "encoder.bias": latents, "W_dec": wide, "b_dec": d})
    tensors = _one_dtype(read_tensors(weights, IncompatibleSAEError))
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


def _from_sae_lens(config: dict[str, Any], weights: Path, shapes: _Shapes) -> TopKSAE | SAELensSAE:
    path = weights.parent / CONFIG_FILE
    cfg = _sae_lens_config(path, config)
    # Before anything is built in the size that the configuration claims.
    decoder = {name: shape for name, shape in shapes.items() if name == "W_dec"}
    _check_shapes(weights, decoder, {"W_dec": (cfg.d_sae, cfg.d_in)})
    shell = _shell(path, cfg)
    wanted = {name: tuple(tensor.shape) for name, tensor in shell.state_dict().items()}
    # In files of sae-lens before 4; all ones.
    old = {"scaling_factor": (cfg.d_sae,)} if "scaling_factor" in shapes.keys() - wanted.keys() else {}
    _check_shapes(weights, shapes, {**wanted, **old})
    tensors = read_tensors(weights, IncompatibleSAEError)
    if any((tensors.pop(name) != 1).any() for name in old):
        raise IncompatibleSAEError(f"{weights}: scaling_factor is not all ones, and no longer a part of SAEs.")
    tensors, metadata = _one_dtype(tensors), cfg.metadata.to_dict()
    hookpoint = _checked_hookpoint(path, metadata.get("hookpoint") or metadata.get("hook_name"))
    k = cfg.to_dict()["k"] if cfg.architecture() == "topk" else None
    if k is None or cfg.normalize_activations != "none":
        shell.load_state_dict(tensors, assign=True)
        sae = shell.to(device="cpu", dtype=next(iter(tensors.values())).dtype)
        return SAELensSAE(sae, k=k, hookpoint=hookpoint, metadata=metadata)
    return _plain_topk(path, cfg, tensors, k, hookpoint, metadata)


def _checked_hookpoint(path: Path, hookpoint: Any) -> str | None:
    """It names folders, too, when the SAE is saved or published."""
    if hookpoint in (None, ""):
        return None
    if not isinstance(hookpoint, str) or not hookpoint.isprintable() or re.search(r"[/\\:]|\.\.|^\.", hookpoint):
        raise IncompatibleSAEError(f"{path}: the hookpoint {reprlib.repr(hookpoint)} is no name of a module.")
    return hookpoint


def _sae_lens_config(path: Path, config: dict[str, Any]) -> SAEConfig:
    architecture = config.get("architecture", "standard")
    if "transcoder" in str(architecture) or config.get("d_out", config.get("d_in")) != config.get("d_in"):
        raise IncompatibleSAEError(
            f"{path} describes a transcoder ({reprlib.repr(architecture)}). "
            "Only SAEs, which reconstruct their input, fit here."
        )
    if architecture not in _READ:
        raise IncompatibleSAEError(
            f"{path}: unknown architecture {reprlib.repr(architecture)}; of sae-lens' are read {', '.join(_READ)}."
        )
    for key in ("d_in", "d_sae"):
        _positive_int(path, config, key)
    try:
        cfg = SAEConfig.from_dict(handle_config_defaulting(config))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IncompatibleSAEError(f"{path} is not a configuration that sae-lens reads: {error!r}.") from error
    settings = cfg.to_dict()
    for key in _FLAGS:
        if not isinstance(settings.get(key, True), bool):
            raise IncompatibleSAEError(f"{path}: {key} must be true or false, not {reprlib.repr(settings[key])}.")
    if "k" in settings:
        _check_k(path, _positive_int(path, settings, "k"), cfg.d_sae)
    if cfg.normalize_activations in _NOT_IN_FILE:
        raise IncompatibleSAEError(
            f"{path}: the SAE expects scaled activations (normalize_activations {cfg.normalize_activations!r}), and "
            "the scale is not in the file. Fold it into the weights with sae-lens, then save the SAE again."
        )
    if cfg.reshape_activations != "none":
        raise IncompatibleSAEError(
            f"{path}: the SAE reads attention heads (reshape_activations {reprlib.repr(cfg.reshape_activations)}); "
            "only activations of shape [..., d_in] are supported."
        )
    return cfg


def _shell(path: Path, cfg: SAEConfig) -> SAE[Any]:
    """The SAE without weights: their shapes are known, no memory is taken."""
    sae_class, _ = SAE_CLASS_REGISTRY[cfg.architecture()]
    cfg.device = "meta"
    try:
        return sae_class(cfg)
    except (KeyError, TypeError, ValueError) as error:
        raise IncompatibleSAEError(f"{path} is not a configuration that sae-lens reads: {error!r}.") from error


def _plain_topk(
    path: Path, cfg: SAEConfig, tensors: dict[str, Tensor], k: int, hookpoint: str | None, metadata: dict[str, Any]
) -> TopKSAE:
    """A TopK SAE of sae-lens in our form; two of its options are folded into the weights, which changes no output."""
    encoder, b_enc, W_dec, b_dec = tensors["W_enc"].t(), tensors["b_enc"], tensors["W_dec"], tensors["b_dec"]
    if cfg.to_dict()["rescale_acts_by_decoder_norm"]:
        norm = W_dec.norm(dim=1).clamp(min=torch.finfo(W_dec.dtype).tiny)
        encoder, b_enc, W_dec = encoder * norm[:, None], b_enc * norm, W_dec / norm[:, None]
    if not cfg.apply_b_dec_to_input:
        b_enc = b_enc + encoder @ b_dec
    if not all(map(all_finite, (encoder, b_enc, W_dec))):
        raise IncompatibleSAEError(f"{path}: with rescaling or b_dec folded in, the weights are no longer finite.")
    return TopKSAE.from_weights(encoder, b_enc, W_dec, b_dec, k=k, hookpoint=hookpoint, metadata=metadata)
