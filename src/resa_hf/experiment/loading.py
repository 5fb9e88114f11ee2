"""The models of a run: target, source, the model that answers, and a source that has learned nothing."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..models import load_causal_lm, load_tokenizer
from ..provenance import Revisions, base_revisions, model_revisions
from .settings import RunArguments


def load_target(run: RunArguments) -> PreTrainedModel:
    """The target model, its adapter merged."""
    return load_causal_lm(run.model_name_or_path, run.model_adapter, revision=run.model_revision, dtype=run.dtype)


def load_source(run: RunArguments) -> PreTrainedModel:
    """The source model, its adapter merged; the target where no other is named."""
    if not run.has_source:
        return load_target(run)
    name = run.source_model or run.model_name_or_path
    return load_causal_lm(name, run.source_adapter, revision=run.source_revision, dtype=run.dtype)


def load_answering(run: RunArguments) -> PreTrainedModel:
    """The untouched model that answers, and takes the adapters: the target, or its sibling."""
    if run.evaluate_on is None:
        return load_target(run)
    return load_causal_lm(run.evaluate_on, revision=run.evaluate_on_revision, dtype=run.dtype)


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


def load_sae_source(run: RunArguments, source: str, seed: int) -> PreTrainedModel:
    """What Stage I reads for `"source"`, `"base"`, and with `-prose` and `-random` behind them.

    A random source has the architecture's own initialisation: SAEs of such models look like those of trained ones by
    their usual metrics (huggingface.co/papers/2501.17727).
    """
    model = load_target(run) if source.startswith("base") else load_source(run)
    if not source.endswith("-random"):
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).eval()
