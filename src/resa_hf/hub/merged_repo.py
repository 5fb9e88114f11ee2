"""Merged repositories: the base with the adapter in its weights, a plain model for whatever does not know adapters."""

from dataclasses import replace
from pathlib import Path

from ..adapters import load_reasoning_adapter
from ..models import load_causal_lm, load_tokenizer
from ..places import Place
from ..provenance import model_revisions
from .adapter_repo import checked_adapter, copy_tokenizer, named_base
from .folder_contents import Found
from .staging import write_evidence


def stage_merged(stage: Path, found: Found) -> Found:
    """
    Writes all files of a merged model's repository but its card: safetensors in the base's dtype, tokenizer, config,
    and the base's generation_config.json, or else one with the tokenizer's EOS and PAD.

    Args:
        stage (`Path`): an empty folder.
        found ([`Found`]): with an adapter. Its record names the base, and an adapter that is part of it.

    Returns:
        [`Found`]: with the commits of the base that was read.

    Raises:
        `PublishError`: if the adapter's files cannot be used, or name no base.
        `OSError`: if the base cannot be loaded, or the disk is full.
    """
    adapter, revisions = checked_adapter(found), found.record.revisions
    base, part = revisions["base"], revisions.get("base_adapter")
    first = None if part is None else str(Place(str(part["name"]), part["commit"], part.get("subfolder")))
    name = named_base(found.record)
    model = load_causal_lm(name, first, revision=base["commit"])
    merged = load_reasoning_adapter(model, adapter).merge_and_unload()
    tokenizer = load_tokenizer(name, revision=base["commit"])
    generation = merged.generation_config
    for token in ("eos_token_id", "pad_token_id"):
        if getattr(generation, token) is None:
            setattr(generation, token, getattr(tokenizer, token))
    merged.save_pretrained(stage)
    if not copy_tokenizer(adapter, stage):
        tokenizer.save_pretrained(stage)
    write_evidence(stage, found)
    read = model_revisions("base", name, base["commit"], first)
    return replace(found, record=replace(found.record, revisions={**revisions, **read}))
