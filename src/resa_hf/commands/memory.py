"""What a job will take of the device's memory, by part and in bytes. `benchmarks/memory.py` holds it to the truth."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..arguments import LoraArguments
from ..hookpoints import decoder_layers, layer_index
from ..precision import runnable_device
from ..quantization import NF4_BYTES
from ..rl.config import RLConfig
from ..sae.config import SAETrainingConfig
from ..sae.metadata import CE_TOKENS
from ..sae.sparse import encoder_rows
from ..truncation import depth_of
from ..tuning.config import SAETuningConfig
from ..tuning.loss import tile_tokens

Parts = dict[str, float]

# float32 tensors of a tile of the loss at its peak (`resa_hf.tuning.loss`), in units of [tile, vocabulary]. Of the KL
# with beta 0: four buffers, and the gradient once more in the head's dtype; else also log-probabilities and so on.
_FORWARD_KL, _REVERSE_KL, _JENSEN_SHANNON, _ENTROPY = 5, 11, 13, 3
# Bytes of an optimiser's states for each trained number; those of paged ones may leave the device.
_STATES = {"paged": 0.0, "8bit": 2.0, "sgd": 0.0, "adafactor": 0.0, "lion": 4.0, "rmsprop": 4.0, "adagrad": 4.0}


def model_size(meta: PreTrainedModel, dtype: torch.dtype, in_4bit: bool = False, depth: int | None = None) -> float:
    """Bytes of a model's weights.

    Args:
        meta ([`~transformers.PreTrainedModel`]): the model without its weights.
        dtype (`torch.dtype`): of the weights.
        in_4bit (`bool`, *optional*, defaults to `False`): whether its linear layers are in NF4.
        depth (`int`, *optional*): how many layers there are of it, without the LM head; `None`: the whole.
    """
    modules, head = dict(meta.named_modules()), meta.get_output_embeddings()
    _, layers = decoder_layers(meta)
    dropped = {id(p) for layer in list(layers)[depth:] for p in layer.parameters()} if depth is not None else set()
    size = 0.0
    for name, parameter in meta.named_parameters():
        module = modules[name.rpartition(".")[0]]
        if id(parameter) in dropped or (depth is not None and module is head):
            continue
        quantised = in_4bit and module is not head and isinstance(module, nn.Linear | Conv1D) and parameter.ndim == 2
        size += parameter.numel() * (NF4_BYTES if quantised else dtype.itemsize)
    return size


def stage1_parts(meta: PreTrainedModel, dtype: torch.dtype, args: SAETrainingConfig, in_4bit: bool = False) -> Parts:
    """Of Stage I: the source up to its deepest hookpoint, SAEs with all that training them takes, and activations."""
    text = meta.config.get_text_config()
    width, latents = text.hidden_size, latents_of(meta, args)
    count = len(args.hookpoints)
    tokens = args.per_device_train_batch_size * args.max_length
    compute = _compute_size(dtype, args)
    matrix = latents * width * 4
    # Of each SAE, until the backward: its input as the model gave it, in float32, centred, and the error.
    kept = count * tokens * (width * (dtype.itemsize + 12) + 12 * (args.k or 32))
    tile = _encoder_tile(latents, tokens, _device(args))
    # The highest of three moments: a layer of the source, when there are no gradients yet; the SAEs' backward; the
    # optimiser's step, with a matrix of its own.
    source = _layer_pass(meta, tokens, compute) - 2 * matrix * count
    passing = max(source, kept + max(tile, 12 * tokens * width), matrix)
    depth = depth_of(meta, args.hookpoints) if args.hookpoints else None
    return {
        "source": model_size(meta, dtype, in_4bit, depth),
        # Weights, gradients and two buffers of the optimiser, all float32.
        "saes": 4 * 2 * matrix * count,
        "activations": passing,
    }


def cross_entropy_parts(
    meta: PreTrainedModel, dtype: torch.dtype, args: SAETrainingConfig, in_4bit: bool = False
) -> Parts:
    """Of Stage I's last measurement, which needs the whole source and its logits."""
    rows = max(1, CE_TOKENS // args.max_length)
    # The logits, a copy without the last position, the same in float32, and their log-softmax.
    logits = rows * args.max_length * meta.config.get_text_config().vocab_size * (2 * dtype.itemsize + 8)
    return {
        "source": model_size(meta, dtype, in_4bit),
        "saes": stage1_parts(meta, dtype, args)["saes"],
        "logits": logits,
    }


def stage2_parts(
    meta: PreTrainedModel,
    dtype: torch.dtype,
    lora: LoraArguments,
    args: SAETuningConfig,
    *,
    latents: int = 0,
    hookpoint: str | int | None = None,
    teacher: bool = False,
    in_4bit: bool = False,
) -> Parts:
    """Of Stage II.

    Args:
        meta ([`~transformers.PreTrainedModel`]): the target without its weights.
        dtype (`torch.dtype`): of its weights.
        lora (`LoraArguments`), args ([`SAETuningConfig`]): the settings.
        latents (`int`, *optional*, defaults to `0`): of the SAE; 0 if not known.
        hookpoint (`str` or `int`, *optional*): the SAE's.
        teacher (`bool`, *optional*, defaults to `False`): whether the source is the teacher, as large as the target.
        in_4bit (`bool`, *optional*, defaults to `False`): whether the models' linear layers are in NF4.
    """
    text, device = meta.config.get_text_config(), _device(args)
    tokens = args.per_device_train_batch_size * (args.max_length or 2048)
    compute, size = _compute_size(dtype, args), model_size(meta, dtype, in_4bit)
    sae = 2 * latents * text.hidden_size * (2 if args.sae_dtype == "bfloat16" else 4)
    tile = min(tokens, tile_tokens(text.vocab_size, device)) * text.vocab_size * 4
    divergence = {0.0: _FORWARD_KL, 1.0: _REVERSE_KL}.get(args.kl_beta, _JENSEN_SHANNON)
    loss = tile * (divergence if args.kl_weight > 0 else _ENTROPY)
    # The backward of a layer, with its weights as the product needs them.
    backward = _layer_pass(meta, tokens, compute) + (_largest_linear(meta) * compute if in_4bit else 0)
    sae_tile = _encoder_tile(latents, tokens, device)
    states = 6 * tokens * text.hidden_size * compute
    return {
        "model": size,
        "teacher": size if teacher else 0,
        "sae": sae,
        "adapter": adapter_size(meta, lora, str(args.optim)),
        "activations": activations_size(meta, dtype, lora, args, tokens, _kept_layers(meta, args, hookpoint)),
        "loss and backward": states + max(loss, backward, sae_tile),
    }


def activations_size(
    meta: PreTrainedModel,
    dtype: torch.dtype,
    lora: LoraArguments,
    args: SAETuningConfig | RLConfig,
    tokens: int,
    layers: int | None = None,
) -> float:
    """Bytes that the layers keep for the backward; with checkpointing a state each, and one of them in full."""
    layers = meta.config.get_text_config().num_hidden_layers if layers is None else layers
    compute, full = _compute_size(dtype, args), _kept_a_token(meta, dtype, lora, args)
    if args.gradient_checkpointing:
        return tokens * (layers * meta.config.get_text_config().hidden_size * compute + full)
    return tokens * layers * full


def adapter_size(meta: PreTrainedModel, lora: LoraArguments, optim: str) -> float:
    """Bytes of a LoRA adapter's weights and gradients, in float32, and of its optimiser's states."""
    numbers = lora.lora_r * sum(sum(_shape(module)) for module in _targets(meta, lora))
    states = next((size for part, size in _STATES.items() if part in optim), 8.0)
    return numbers * (8 + states)


def _kept_a_token(
    meta: PreTrainedModel, dtype: torch.dtype, lora: LoraArguments, args: SAETuningConfig | RLConfig
) -> float:
    """Bytes a token that one layer keeps for the backward."""
    text = meta.config.get_text_config()
    width, compute = text.hidden_size, _compute_size(dtype, args)
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or width // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    # Two norms keep float32; attention keeps queries, keys, values and its output; a gated MLP three products.
    own = 8 * width + 2 * head * (heads + key_heads) * compute + 3 * _inner(meta) * compute
    # PEFT keeps each adapted layer's input, and of its dropout a mask: bytes on CUDA, numbers on the CPU.
    kept = 2 if args.bf16 or args.fp16 else 4
    mask = 0 if lora.lora_dropout == 0 else 4 if _device(args).type == "cpu" else 1
    inputs = sum(_shape(module)[1] for module in _targets(meta, lora)) / text.num_hidden_layers
    return own + inputs * (kept + mask)


def _kept_layers(meta: PreTrainedModel, args: SAETuningConfig, hookpoint: str | int | None) -> int:
    """Those above the hookpoint, where teacher and student share the prefix."""
    layers: int = meta.config.get_text_config().num_hidden_layers
    shares = args.share_prefix == "auto" and (args.sae_gradient, args.sae_in, args.kl_reference) == (
        *("stop", "student", "base"),
    )
    if hookpoint is None or not shares or not str(hookpoint).rpartition(".")[2].isdigit():
        return layers
    return layers - 1 - layer_index(meta, hookpoint)


def _encoder_tile(latents: int, tokens: int, device: torch.device) -> int:
    return encoder_rows(tokens, max(latents, 1), device) * latents * 4


def _layer_pass(meta: PreTrainedModel, tokens: int, compute: int) -> float:
    """Bytes of a layer's widest moment: the MLP's products, and some states."""
    return tokens * compute * (3 * _inner(meta) + 4 * meta.config.get_text_config().hidden_size)


def _inner(meta: PreTrainedModel) -> int:
    text = meta.config.get_text_config()
    return getattr(text, "intermediate_size", None) or 4 * text.hidden_size


def latents_of(meta: PreTrainedModel, args: SAETrainingConfig) -> int:
    """How many latents Stage I gives an SAE of the residual stream."""
    return args.num_latents or (args.expansion_factor or 32) * meta.config.get_text_config().hidden_size


def _compute_size(dtype: torch.dtype, args: SAETrainingConfig | SAETuningConfig | RLConfig) -> int:
    """Bytes of a number in the model's products: 2 under autocast."""
    return 2 if args.bf16 or args.fp16 else dtype.itemsize


def _device(args: SAETrainingConfig | SAETuningConfig | RLConfig) -> torch.device:
    return runnable_device(args.use_cpu)


def _targets(meta: PreTrainedModel, lora: LoraArguments) -> list[nn.Module]:
    """The modules that the adapter is on."""
    head, wanted = meta.get_output_embeddings(), lora.lora_target_modules
    linears = {n: m for n, m in meta.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    return [module for name, module in linears.items() if wanted is None or name.rpartition(".")[2] in wanted]


def _shape(linear: nn.Module) -> tuple[int, int]:
    """Output and input features."""
    rows, columns = linear.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


def _largest_linear(meta: PreTrainedModel) -> int:
    return max(module.weight.numel() for module in _targets(meta, LoraArguments()))  # type: ignore[operator]
