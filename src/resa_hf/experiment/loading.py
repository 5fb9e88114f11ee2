"""The models of a run: target, source, the model that answers, and a source that has learned nothing."""

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..models import load_causal_lm, load_tokenizer
from ..provenance import Revisions, base_revisions, model_revisions
from ..truncation import drop_above
from .settings import RunArguments


def load_target(run: RunArguments, hookpoints: Sequence[str] | None = None) -> PreTrainedModel:
    """The target model, its adapter merged; with `hookpoints` no more of it than they need."""
    return _load(run, run.model_name_or_path, run.model_adapter, run.model_revision, hookpoints)


def load_source(run: RunArguments, hookpoints: Sequence[str] | None = None) -> PreTrainedModel:
    """The source model, its adapter merged; the target where no other is named."""
    if not run.has_source:
        return load_target(run, hookpoints)
    name = run.source_model or run.model_name_or_path
    return _load(run, name, run.source_adapter, run.source_revision, hookpoints)


def load_answering(run: RunArguments) -> PreTrainedModel:
    """The untouched model that answers, and takes the adapters: the target, or its sibling."""
    if run.evaluate_on is None:
        return load_target(run)
    return _load(run, run.evaluate_on, None, run.evaluate_on_revision, None)


def _load(
    run: RunArguments, name: str, adapter: str | None, revision: str | None, hookpoints: Sequence[str] | None
) -> PreTrainedModel:
    return load_causal_lm(
        name, adapter, revision=revision, dtype=run.dtype, load_in_4bit=run.load_in_4bit, hookpoints=hookpoints
    )


def answering_revisions(run: RunArguments) -> Revisions:
    """Its name and commit, once it is loaded."""
    if run.evaluate_on is None:
        return base_revisions(run)
    return model_revisions("evaluate_on", run.evaluate_on, run.evaluate_on_revision)


def load_answering_tokenizer(run: RunArguments) -> PreTrainedTokenizerBase:
    """Its tokenizer."""
    if run.evaluate_on is None:
        return load_tokenizer(run.model_name_or_path, revision=run.model_revision)
    return load_tokenizer(run.evaluate_on, revision=run.evaluate_on_revision)


def load_sae_source(
    run: RunArguments, source: str, seed: int, hookpoints: Sequence[str] | None = None
) -> PreTrainedModel:
    """What Stage I reads for `"source"`, `"base"`, and with `-prose` and `-random` behind them.

    With `hookpoints` it is no more than they need.

    A random source has the architecture's own initialisation: SAEs of such models look like those of trained ones by
    their usual metrics (huggingface.co/papers/2501.17727).
    """
    load = load_target if source.startswith("base") else load_source
    if not source.endswith("-random"):
        return load(run, hookpoints)
    model = load(run)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random: PreTrainedModel = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).eval()
    if hookpoints:
        drop_above(random, hookpoints)
    return random
