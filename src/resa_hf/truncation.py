"""A model up to its deepest hookpoint: the layers above it and the LM head are not loaded, or dropped again."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .hookpoints import backbone, decoder_layers, layer_index

# Architectures whose lower layers do not change when the configuration has fewer of them, each tested.
_CUT_BY_CONFIG = ("gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")


class NotLoaded(nn.Module):
    """Stands where the LM head was."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "This model was loaded up to its deepest hookpoint, without the layers above it and the LM head: it has "
            "no logits. Load the whole model for them."
        )


def depth_of(model: PreTrainedModel, hookpoints: Sequence[int | str]) -> int:
    """How many decoder layers the hookpoints need.

    Raises:
        `HookpointError`: if a hookpoint is unknown.
    """
    return 1 + max(layer_index(model, hookpoint) for hookpoint in hookpoints)


def truncated(
    skeleton: PreTrainedModel, hookpoints: Sequence[int | str]
) -> tuple[type[PreTrainedModel], PreTrainedConfig] | None:
    """The class and the configuration with which `from_pretrained` loads no more than the hookpoints need.

    Tensors that are left out on purpose are no unexpected ones; all others are still reported.

    Args:
        skeleton ([`~transformers.PreTrainedModel`]):
            The whole causal LM, without weights.
        hookpoints (sequence of `int` or `str`):
            In any spelling.

    Returns:
        The two, or `None` for an architecture that is to be loaded whole, and cut by [`drop_above`].

    Raises:
        `HookpointError`: if a hookpoint is unknown.
    """
    depth = depth_of(skeleton, hookpoints)
    if skeleton.config.model_type not in _CUT_BY_CONFIG:
        return None
    whole: Any = type(skeleton)
    path, layers = decoder_layers(skeleton)
    head = skeleton.get_output_embeddings()
    name = next(name for name, module in skeleton.named_modules() if module is head)
    left_out = [rf"^({name}|embed_out)\."]  # the second is GPT-NeoX' in its files
    if depth < len(layers):
        left_out.append(rf"(^|\.){path}\.({'|'.join(map(str, range(depth, len(layers))))})\.")

    class Truncated(whole):
        _keys_to_ignore_on_load_unexpected = [*(whole._keys_to_ignore_on_load_unexpected or ()), *left_out]  # noqa: RUF012
        _tied_weights_keys = None

        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            self.set_output_embeddings(NotLoaded())

    Truncated.__name__ = whole.__name__
    return Truncated, _with_layers(skeleton.config, depth)


def _with_layers(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """The configuration with fewer layers."""
    config = copy.deepcopy(config)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:depth]
    config.num_hidden_layers = depth
    return config


def drop_above(model: PreTrainedModel, hookpoints: Sequence[int | str]) -> None:
    """Drops, in place, what the hookpoints do not need: the layers above the deepest, and the LM head."""
    depth, inner = depth_of(model, hookpoints), backbone(model)
    path, layers = decoder_layers(model)
    inner.set_submodule(path, layers[:depth])
    inner.config.get_text_config().num_hidden_layers = depth  # type: ignore[union-attr, operator]
    model.set_output_embeddings(NotLoaded())
