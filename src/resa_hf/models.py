"""Loading the models of a run: by name or folder, or a base plus a LoRA adapter, which is merged."""

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from .tiny import tiny_path

TINY_PREFIX = "resa_hf/tiny/"


def local_name(name: str) -> str:
    """The folder behind `resa_hf/tiny/base` and `resa_hf/tiny/source`, which ship here; other names unchanged."""
    if name == f"{TINY_PREFIX}base":
        return str(tiny_path("base"))
    if name == f"{TINY_PREFIX}source":
        return str(tiny_path("source"))
    return name


def load_causal_lm(
    name: str,
    adapter: str | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
) -> PreTrainedModel:
    """Loads a causal LM. A LoRA adapter, named beside it or found in its place, is merged into its base.

    Args:
        name (`str`):
            Hub repo, folder, or `resa_hf/tiny/base` and `resa_hf/tiny/source`. May be an adapter's repo or folder: its
            base is then loaded by the name in its adapter_config.json (that is how Tina's checkpoints come).
        adapter (`str`, *optional*):
            Repo or folder of an adapter for `name`.
        revision (`str`, *optional*):
            Revision of `name`.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`):
            Of the weights; `"auto"` as stored.

    Raises:
        `OSError`: if there is no such model; the message names it.
    """
    try:
        merged = _load_merged(local_name(name), adapter, revision, dtype)
    except OSError as error:
        raise OSError(
            f"Model {name!r}{f' with adapter {adapter!r}' if adapter else ''} cannot be loaded: {error}"
        ) from error
    if adapter is not None or _is_adapter(local_name(name), revision):
        # What is trained on it does not fit the base alone, and its adapter_config.json must not say so.
        merged.config._name_or_path = merged.name_or_path = name if adapter is None else f"{name}+{adapter}"
    return merged


def _load_merged(folder: str, adapter: str | None, revision: str | None, dtype: torch.dtype | str) -> PreTrainedModel:
    if adapter is None and _is_adapter(folder, revision):
        config = PeftConfig.from_pretrained(folder, revision=revision)
        base = load_causal_lm(str(config.base_model_name_or_path), dtype=dtype)
        merged = PeftModel.from_pretrained(base, folder, revision=revision).merge_and_unload()
    else:
        merged = AutoModelForCausalLM.from_pretrained(folder, revision=revision, dtype=dtype, use_safetensors=True)
        if adapter is not None:
            merged = PeftModel.from_pretrained(merged, local_name(adapter)).merge_and_unload()
    return merged


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model that `load_causal_lm` takes; an `OSError` names the model."""
    folder = local_name(name)
    try:
        if _is_adapter(folder, revision) and not (Path(folder) / "tokenizer_config.json").is_file():
            return load_tokenizer(str(PeftConfig.from_pretrained(folder, revision=revision).base_model_name_or_path))
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, revision=revision)
    except OSError as error:
        raise OSError(f"The tokenizer of {name!r} cannot be loaded: {error}") from error
    return tokenizer


def _is_adapter(folder: str, revision: str | None) -> bool:
    return find_adapter_config_file(folder, revision=revision) is not None


def check_same_vocabulary(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    """Raises a `ValueError` that names the first token on which two tokenizers differ."""
    left, right = one.get_vocab(), other.get_vocab()
    if left == right:
        return
    token = min(
        (token for token in left.keys() | right.keys() if left.get(token) != right.get(token)),
        key=lambda token: min(left.get(token, len(left)), right.get(token, len(right))),
    )
    raise ValueError(
        f"The tokenizers differ: {token!r} is {left.get(token, 'missing')} in {one.name_or_path!r} and "
        f"{right.get(token, 'missing')} in {other.name_or_path!r}. Teacher and student must share one vocabulary."
    )
