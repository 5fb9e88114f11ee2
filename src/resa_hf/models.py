"""Loading the models of a run: by name or folder, or a base plus a LoRA adapter, which is merged."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .adapters import base_of_adapter, load_reasoning_adapter
from .errors import IncompatibleAdapterError, ResaError
from .places import Place, parse_place
from .quantization import keep_layout, nf4_config
from .truncation import drop_above, truncated

# Far more than any model has. Each is many modules, which take longer to make than a message takes to read.
_MAX_LAYERS = 16_384  # the experts of a Doge by default, also where it has none


def load_causal_lm(
    name: str,
    adapter: str | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    load_in_4bit: bool = False,
    hookpoints: Sequence[int | str] | None = None,
) -> PreTrainedModel:
    """Loads a causal LM. A LoRA adapter, named beside it or found in its place, is merged into its base.

    Args:
        name (`str`):
            Hub repo, folder, or `resa_hf/tiny/base` and `resa_hf/tiny/source`; see [`~resa_hf.places.parse_place`].
            May be an adapter's: its base is then loaded by the name in its adapter_config.json (that is how Tina's
            checkpoints come, `owner/name@revision/checkpoint-2000`).
        adapter (`str`, *optional*):
            An adapter for `name`, named in the same way.
        revision (`str`, *optional*):
            Revision of `name`; folders have none.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`):
            Of the weights; `"auto"` as stored.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Hold the linear layers in NF4; embeddings, norms and the LM head stay in `dtype`.
        hookpoints (sequence of `int` or `str`, *optional*):
            Load no more than these need: no layer above the deepest and no LM head. Where an adapter is merged, and
            for architectures that do not let themselves be cut, the whole is loaded first, and the rest then dropped.

    Raises:
        `OSError`: if there is no such model; the message names it.
        `HookpointError`: if the model has no such hookpoint.
        `IncompatibleAdapterError`: for an adapter that [`~resa_hf.adapters.load_reasoning_adapter`] refuses.
        `ValueError`: if an adapter is to be merged into 4-bit weights, or bitsandbytes is missing.
    """
    try:
        *adapters, base = _chain(_place(name, revision))
        merges = bool(adapters) or adapter is not None
        if load_in_4bit and merges:
            raise _not_mergeable(str(adapter or adapters[0]))
        cut = truncated(load_skeleton(name, revision=revision), hookpoints) if hookpoints and not merges else None
        kind, config = (AutoModelForCausalLM, _config(base)) if cut is None else cut
        model = _from_pretrained(kind, base, config, dtype, load_in_4bit)
        for upper in (*map(str, reversed(adapters)), *([] if adapter is None else [adapter])):
            model = load_reasoning_adapter(model, upper).merge_and_unload()
    except (ResaError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # broken files break transformers in any way
        raise _unread(
            f"Model {name!r}{f' with adapter {adapter!r}' if adapter else ''} cannot be loaded", error
        ) from error
    if hookpoints and cut is None:
        drop_above(model, hookpoints)
    if merges:
        # What is trained on it does not fit the base alone, and its adapter_config.json must not say so.
        model.config._name_or_path = model.name_or_path = name if adapter is None else f"{name}+{adapter}"
    return model


def _not_mergeable(adapter: str) -> ValueError:
    return ValueError(
        f"load_in_4bit with the adapter {adapter!r}: merged into 4-bit weights, much of it would be rounded away. "
        "Merge it in full precision, save the merged model and name that, or set load_in_4bit: false."
    )


def _from_pretrained(
    kind: Any, base: Place, config: PreTrainedConfig, dtype: torch.dtype | str, load_in_4bit: bool
) -> PreTrainedModel:
    more: dict[str, Any] = {"quantization_config": nf4_config()} if load_in_4bit else {}
    model: PreTrainedModel = kind.from_pretrained(
        base.name,
        revision=base.revision,
        subfolder=base.subfolder or "",
        dtype=dtype,
        config=config,
        use_safetensors=True,
        trust_remote_code=False,
        **more,
    )
    if load_in_4bit:
        keep_layout(model)
    return model


def load_config(name: str, *, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a model that `load_causal_lm` takes; an adapter's is that of its base.

    Raises:
        `OSError`: if there is none.
        `ValueError`: if it cannot be read, or has more than 16,384 layers or experts.
    """
    base = _chain(_place(name, revision))[-1]
    try:
        return _config(base)
    except Exception as error:
        raise _unread(f"The configuration of model {name!r} cannot be read", error) from error


def _config(base: Place) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        base.name, revision=base.revision, subfolder=base.subfolder or "", trust_remote_code=False
    )
    if (layers := max(layer_counts(config.to_dict()), default=0)) > _MAX_LAYERS:
        raise ValueError(f"it has {layers:,} layers or experts; at most {_MAX_LAYERS:,} can be.")
    return config


def layer_counts(config: Mapping[Any, Any]) -> Iterator[int]:
    """How many layers or experts a configuration gives, and those inside it."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from layer_counts(value)
        elif isinstance(value, int) and str(key).endswith(("layer", "layers", "experts", "depth", "blocks")):
            yield value


def load_skeleton(name: str, *, revision: str | None = None) -> PreTrainedModel:
    """A model that `load_causal_lm` takes without its weights: on the meta device, from its configuration alone."""
    config = load_config(name, revision=revision)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise _unread(f"No model can be made of the configuration of {name!r}", error) from error
    return model


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model that `load_causal_lm` takes; an `OSError` names the model."""
    try:
        *adapters, base = _chain(_place(name, revision))
        with_files = (at for at in adapters if Path(at.name, at.subfolder or "", "tokenizer_config.json").is_file())
        place = next(with_files, base)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            place.name, revision=place.revision, subfolder=place.subfolder or "", trust_remote_code=False
        )
        tokenizer("a")  # some damage shows at the first text
    except (ResaError, MemoryError):
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise _unread(f"The tokenizer of {name!r} cannot be loaded", error) from error
    return tokenizer


def _unread(what: str, error: Exception) -> ValueError | OSError:
    """An error that names the model. Errors for people say what is wrong; of others the text alone may say nothing."""
    if isinstance(error, ValueError):
        return ValueError(f"{what}: {error}")
    return OSError(f"{what}: {error if isinstance(error, OSError) else f'{type(error).__name__}: {error}'}")


def _place(name: str, revision: str | None) -> Place:
    place = parse_place(name)
    return place if place.is_folder else parse_place(name, revision=revision)


def _chain(place: Place) -> list[Place]:
    """The place, and if it is an adapter's its base, which may be another adapter's, and so on."""
    chain = [place]
    while (base := base_of_adapter(chain[-1])) is not None:
        if base in chain:
            raise IncompatibleAdapterError(f"The adapter {str(place)!r} ends up on itself: {base} is its own base.")
        chain.append(base)
    return chain


def check_same_vocabulary(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, *, added: bool = True) -> None:
    """Raises a `ValueError` that names the first token on which two tokenizers differ.

    With `added=False` the tokens added behind the vocabulary, special ones and tags, may differ, as they do between
    siblings such as Qwen2.5-Math-1.5B and DeepSeek-R1-Distill-Qwen-1.5B.
    """
    left, right = (_vocabulary(tokenizer, added) for tokenizer in (one, other))
    if left == right:
        return
    token = min(
        (token for token in left.keys() | right.keys() if left.get(token) != right.get(token)),
        key=lambda token: min(left.get(token, len(left)), right.get(token, len(right))),
    )
    raise ValueError(
        f"The tokenizers differ: {token!r} is {left.get(token, 'missing')} in {one.name_or_path!r} and "
        f"{right.get(token, 'missing')} in {other.name_or_path!r}: both models must share one vocabulary."
    )


def _vocabulary(tokenizer: PreTrainedTokenizerBase, added: bool) -> dict[str, int]:
    left_out = {} if added else tokenizer.get_added_vocab()
    return {token: index for token, index in tokenizer.get_vocab().items() if token not in left_out}
