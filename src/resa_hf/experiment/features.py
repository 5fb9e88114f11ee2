"""From a model and its SAEs to what their latents are and do: the work of `resa-hf features`, part by part."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import hold_out
from ..errors import DataError, HookpointError, IncompatibleSAEError
from ..evaluation.tables import finite
from ..features.arguments import FeatureArguments
from ..features.cue_controls import prose_control, prose_passages, same_frequency_counts
from ..features.examples import nearest_tokens, top_examples
from ..features.mixture import fit_mixture, suggested_layers
from ..features.reasoning import CuedPrompt, cued_prompt, reasoning_latents
from ..hookpoints import resolve_hookpoint
from ..models import load_causal_lm, load_tokenizer
from ..precision import runnable_device
from ..prose import load_prose
from ..sae.autoencoder import SAELensSAE, TopKSAE
from ..sae.checkpoint import list_saes, load_sae
from ..sae.quality import sae_quality
from ..text import R1_PROMPT, evaluation_prompt
from .folder import claim, read_json, write_json
from .prepare import MEASURED_DOCUMENTS, load_rows, tokenize

SAE = TopKSAE | SAELensSAE
Part = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Args:
        args ([`FeatureArguments`]): the settings.
        model (`PreTrainedModel`), tokenizer (`PreTrainedTokenizerBase`): the model, on its device.
        saes (`dict[str, Callable]`): canonical hookpoint to what loads its SAE onto that device.
        prompt ([`CuedPrompt`]): the text in which reasoning latents are looked for.
    """

    args: FeatureArguments
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    saes: Mapping[str, Callable[[], SAE]]
    prompt: CuedPrompt

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.args.output_dir)

    @cached_property
    def questions(self) -> list[dict[str, str]]:
        """The held-out problems, with `prompt`, as many as are answered."""
        rows = self._held_out.select(range(self.args.problems))
        template = self.args.template
        return [
            {**row, "prompt": evaluation_prompt(row["problem"], template=template, tokenizer=self.tokenizer)}
            for row in rows
        ]

    @cached_property
    def rows(self) -> Any:
        """Tokens of held-out CoT-free text."""
        measured = self._held_out.select(range(min(len(self._held_out), MEASURED_DOCUMENTS)))
        return tokenize(measured, self.args, self.tokenizer, self.args.max_length)[0]

    @cached_property
    def _held_out(self) -> Any:
        rows, _ = load_rows(self.args)
        return hold_out(rows, self.args.held_out, self.args.split_seed)[1]


def load_subject(args: FeatureArguments) -> Subject:
    """Loads the model, finds the SAEs and the cues.

    Raises:
        `DataError`: if the prompt does not hold the cues.
        `HookpointError`: if there is no SAE at a hookpoint that the settings name.
        `IncompatibleSAEError`: if there is no SAE at all.
    """
    tokenizer = load_tokenizer(args.model_name_or_path, revision=args.model_revision)
    prompt = cued_prompt(tokenizer, R1_PROMPT if args.prompt is None else args.prompt, args.cues)
    model = load_causal_lm(
        args.model_name_or_path, args.model_adapter, revision=args.model_revision, dtype=args.dtype
    ).eval()
    torch.nn.Module.to(model, runnable_device())
    saes = find_saes(model, args.saes)
    wanted = [resolve_hookpoint(model, name) for name in args.hookpoints or saes]
    if missing := [name for name in wanted if name not in saes]:
        raise HookpointError(f"{args.saes} has no SAE at {', '.join(missing)}. It has: {', '.join(saes)}.")
    return Subject(args, model, tokenizer, {name: saes[name] for name in wanted}, prompt)


def find_saes(model: PreTrainedModel, name: str) -> dict[str, Callable[[], SAE]]:
    """The SAEs at a place by their hookpoints, in the order of the layers; none is held in memory."""
    # Checkpoints of a training run hold the same hookpoints.
    ids = [sae_id for sae_id in list_saes(name) if not re.match(r"checkpoint-\d+/", sae_id)]
    if not ids:
        raise IncompatibleSAEError(f"{name} holds no SAE.")
    saes: dict[str, Callable[[], SAE]] = {}
    for sae_id in ids:
        load = partial(load_sae, name, sae_id, device=model.device)
        try:
            hookpoint = resolve_hookpoint(model, sae_id)
        except HookpointError:  # its folder has another name
            hookpoint = resolve_hookpoint(model, str(load().hookpoint))
        if hookpoint in saes:
            raise DataError(f"{name} has several SAEs at {hookpoint}: name the folder of one of them.")
        saes[hookpoint] = load
    return dict(sorted(saes.items(), key=lambda item: [int(w) if w.isdigit() else 0 for w in item[0].split(".")]))


def excluded(sae: SAE) -> list[int]:
    """Tokens on which the SAE was not trained."""
    ids = sae.metadata.get("exclude_special_tokens")
    return list(ids) if isinstance(ids, list) else []


def layers_part(subject: Subject) -> list[Part]:
    """Reasoning latents by hookpoint, with both controls of their count."""
    args, prompt = subject.args, subject.prompt
    found = reasoning_latents(subject.model, subject.saes, prompt, every=args.every_occurrence)
    frequency = same_frequency_counts(found, prompt, every=args.every_occurrence, seed=args.seed)
    texts = load_prose(args.prose)["text"]
    passages = prose_passages(prompt, subject.tokenizer, texts, count=args.passages, seed=args.seed)
    prose = prose_control(subject.model, subject.saes, found, prompt, passages, every=args.every_occurrence)
    totals = {"same_frequency": asdict(frequency.total), "prose": asdict(prose.total)}
    return [
        {
            "hookpoint": one.hookpoint,
            "layer": one.layer,
            "num_latents": one.num_latents,
            "latents": list(one.latents),
            "values": _values(one.active, one.latents),
            "same_frequency": asdict(frequency.layers[i]),
            "frequency_gap": frequency.frequency_gap,
            "prose": asdict(prose.layers[i]),
            "prose_shares": list(prose.shares[i]),
            "cue_token_latents": list(prose.cue_token_latents[i]),
            "context_latents": list(prose.context_latents[i]),
            "totals": totals,
        }
        for i, one in enumerate(found)
    ]


def _values(active: Any, latents: tuple[int, ...]) -> list[list[float]]:
    """`[latents, tokens]`: what each is at each token of the prompt."""
    return [active.values.masked_fill(active.indices != latent, 0).sum(dim=1).tolist() for latent in latents]


def mixture_part(layers: list[Part], args: FeatureArguments) -> Part | None:
    """The mixture of the counts, and the hookpoints that it suggests; `None` where nothing was counted."""
    counts = [len(layer["latents"]) for layer in layers]
    if not any(counts):
        return None
    numbers = [layer["layer"] for layer in layers]
    # With fewer layers than components the paper's 3 cannot be fitted.
    most = sum(count > 0 for count in counts)
    components = None if args.components is None else min(args.components, most)
    mixture = fit_mixture(numbers, counts, components, seed=args.seed)
    suggested = suggested_layers(mixture, numbers)
    return {
        **asdict(mixture),
        "suggested": [layers[numbers.index(layer)]["hookpoint"] for layer in suggested],
    }


def quality_part(subject: Subject) -> dict[str, Part]:
    """FVU, L0, dead share and cross-entropy recovered by hookpoint, on held-out text."""
    found = {}
    for hookpoint, load in subject.saes.items():
        sae = load()
        found[hookpoint] = sae_quality(subject.model, sae, subject.rows, hookpoint, excluded_token_ids=excluded(sae))
    return found


def examples_part(subject: Subject, hookpoint: str, latents: list[int]) -> list[Part]:
    """Where in held-out text latents are largest, and the tokens that their decoder rows speak for."""
    sae, tokenizer = subject.saes[hookpoint](), subject.tokenizer
    found = top_examples(
        subject.model,
        hookpoint,
        sae,
        subject.rows,
        latents,
        excluded_token_ids=excluded(sae),
        count=max(1, subject.args.examples),
    )
    return [
        {
            "latent": latent,
            "nearest_tokens": nearest_tokens(subject.model, sae, latent, tokenizer),
            "examples": [
                {**asdict(example), "text": [tokenizer.decode([token]) for token in example.tokens]}
                for example in examples
            ],
        }
        for latent, examples in found.items()
    ]


class Parts:
    """Parts of the work, each in a file once it is finished: a rerun reads it.

    Args:
        root (`Path`): the output folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root / "parts"

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, as JSON holds it."""
        path = self._root / f"{name}.json"
        if not path.is_file():
            print(f"[{name}]", flush=True)
            write_json(path, finite(json.loads(json.dumps(work(), default=_as_list))))
        return read_json(path)


def _as_list(array: np.ndarray) -> Any:
    return array.tolist()


def claim_folder(args: FeatureArguments) -> Path:
    """The output folder, refused if it holds something that was made with other settings."""
    root = Path(args.output_dir)
    claim(root, {"settings": asdict(args)})
    return root
