"""From a model and its SAEs to what their latents are and do: the work of `resa-hf features`, part by part."""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, constants
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import QAReport, hold_out
from ..downloads import hub_errors
from ..errors import DataError, HookpointError, IncompatibleSAEError
from ..evaluation.tables import finite
from ..features.arguments import FeatureArguments
from ..features.cue_controls import prose_control, prose_passages, same_frequency_counts
from ..features.examples import nearest_tokens, top_examples
from ..features.mixture import fit_mixture, suggested_layers
from ..features.reasoning import CuedPrompt, cued_prompt, reasoning_latents
from ..hookpoints import layer_index, resolve_hookpoint
from ..models import check_same_vocabulary, load_causal_lm, load_tokenizer
from ..places import parse_place
from ..precision import runnable_device
from ..prose import load_prose
from ..provenance import commit_of
from ..sae.autoencoder import SAELensSAE, TopKSAE
from ..sae.checkpoint import list_saes, load_sae
from ..sae.layouts import CONFIG_FILE, SAE_LENS_WEIGHTS, SPARSIFY_WEIGHTS
from ..sae.quality import sae_quality
from ..text import R1_PROMPT, encode_prompt, evaluation_prompt
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
        held_out (`datasets.Dataset`): the rows that Stage I did not read.
        data ([`QAReport`]): what of the dataset was read.
    """

    args: FeatureArguments
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    saes: Mapping[str, Callable[[], SAE]]
    prompt: CuedPrompt
    held_out: Any
    data: QAReport

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.args.output_dir)

    @cached_property
    def questions(self) -> list[dict[str, str]]:
        """The held-out problems, with `prompt`, as many as are answered."""
        rows = self.held_out.select(range(self.args.problems))
        template = self.args.template
        return [
            {**row, "prompt": evaluation_prompt(row["problem"], template=template, tokenizer=self.tokenizer)}
            for row in rows
        ]

    @cached_property
    def rows(self) -> Any:
        """Tokens of held-out CoT-free text."""
        measured = self.held_out.select(range(min(len(self.held_out), MEASURED_DOCUMENTS)))
        return tokenize(measured, self.args, self.tokenizer, self.args.max_length)[0]


def load_subject(args: FeatureArguments) -> Subject:
    """Loads the model and the data, finds the SAEs and the cues: what can be found wrong before any work is done.

    Raises:
        `DataError`: if the prompt does not hold the cues, the data cannot be read, or problems exceed `max_length`.
        `HookpointError`: if there is no SAE at a hookpoint that the settings name, or two are in one layer.
        `IncompatibleSAEError`: if there is no SAE at all.
        `ValueError`: if the second model has another tokenizer.
    """
    tokenizer = load_tokenizer(args.model_name_or_path, revision=args.model_revision)
    prompt = cued_prompt(tokenizer, R1_PROMPT if args.prompt is None else args.prompt, args.cues)
    if args.has_other:
        other = load_tokenizer(args.other_model or args.model_name_or_path, revision=args.other_revision)
        check_same_vocabulary(tokenizer, other, added=False)
    rows, data = load_rows(args)
    held_out = hold_out(rows, args.held_out, args.split_seed)[1]
    model = load_causal_lm(
        args.model_name_or_path,
        args.model_adapter,
        revision=args.model_revision,
        dtype=args.dtype,
        load_in_4bit=args.load_in_4bit,
    ).eval()
    model.requires_grad_(False)  # so that attribution keeps no activations below the hookpoint
    torch.nn.Module.to(model, runnable_device())
    saes = find_saes(model, args.saes)
    wanted = [resolve_hookpoint(model, name) for name in args.hookpoints or saes]
    if missing := [name for name in wanted if name not in saes]:
        raise HookpointError(f"{args.saes} has no SAE at {', '.join(missing)}. It has: {', '.join(saes)}.")
    for name, after in pairwise(wanted := [name for name in saes if name in wanted]):
        if layer_index(model, name) == layer_index(model, after):
            raise HookpointError(
                f"{name} and {after} lie in one layer; counts are by layer. Name one of each layer in `hookpoints`."
            )
    if args.test_hookpoint is not None and (name := resolve_hookpoint(model, args.test_hookpoint)) not in wanted:
        raise HookpointError(f"test_hookpoint is {name}, but SAEs are read at {', '.join(wanted)} only.")
    subject = Subject(args, model, tokenizer, {name: saes[name] for name in wanted}, prompt, held_out, data)
    longest = max((len(encode_prompt(question["prompt"], tokenizer)) for question in subject.questions), default=0)
    if longest >= args.max_length:
        raise DataError(
            f"max_length is {args.max_length}, but a problem's prompt alone has {longest} tokens: raise it."
        )
    return subject


def find_saes(model: PreTrainedModel, name: str) -> dict[str, Callable[[], SAE]]:
    """The SAEs at a place by their hookpoints, in the order of the layers; none is held in memory."""
    ids = _sae_ids(name)
    if not ids:
        raise IncompatibleSAEError(f"{name} holds no SAE.")
    saes: dict[str, Callable[[], SAE]] = {}
    for sae_id in ids:
        load = partial(load_sae, name, sae_id, device=model.device)
        try:
            hookpoint = resolve_hookpoint(model, sae_id)
        except HookpointError:  # its folder has another name
            own = load().hookpoint
            if own is None:
                raise IncompatibleSAEError(
                    f"The SAE {sae_id} of {name} tells no hookpoint: name its folder after it, for example layers.12."
                ) from None
            hookpoint = resolve_hookpoint(model, own)
        if hookpoint in saes:
            raise DataError(f"{name} has several SAEs at {hookpoint}: name the folder of one of them.")
        saes[hookpoint] = partial(_load_at, model, hookpoint, load)
    return dict(sorted(saes.items(), key=lambda item: [int(w) if w.isdigit() else 0 for w in item[0].split(".")]))


def _sae_ids(name: str) -> list[str]:
    """The SAEs at a place; checkpoints of a training run hold the same hookpoints, and do not count."""
    return [sae_id for sae_id in list_saes(name) if not re.match(r"checkpoint-\d+/", sae_id)]


def _load_at(model: PreTrainedModel, hookpoint: str, load: Callable[[], SAE]) -> SAE:
    """The SAE, unless it tells another hookpoint than its folder's name."""
    sae = load()
    if sae.hookpoint is not None and resolve_hookpoint(model, sae.hookpoint) != hookpoint:
        raise IncompatibleSAEError(
            f"The SAE in the folder of {hookpoint} was trained at {sae.hookpoint}: give the folder that name."
        )
    return sae


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
        count=subject.args.examples,
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
    """Parts of the work, each in a file once it is finished: a rerun reads it, unless it is damaged.

    Args:
        root (`Path`): the output folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root / "parts"

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, as JSON holds it."""
        path = self._root / f"{name}.json"
        if path.is_file():
            with contextlib.suppress(DataError, LookupError):
                kept = read_json(path)
                if kept["sha256"] == _sha256(kept["part"]):
                    return kept["part"]
            print(f"{path} is damaged, or of another version of resa-hf: it is made anew.", flush=True)
        print(f"[{name}]", flush=True)
        part = finite(json.loads(json.dumps(work(), default=_as_list)))
        write_json(path, {"sha256": _sha256(part), "part": part})
        return part


def _sha256(part: Any) -> str:
    return hashlib.sha256(json.dumps(part).encode()).hexdigest()


def _as_list(array: np.ndarray) -> Any:
    return array.tolist()


def claim_folder(args: FeatureArguments) -> Path:
    """The output folder, refused if it holds something that was made with other settings, or with other SAEs."""
    root = Path(args.output_dir)
    places = {"saes": args.saes} | ({} if args.other_saes is None else {"other_saes": args.other_saes})
    claim(root, {"settings": asdict(args)} | {f"files of {name}": saes_digest(at) for name, at in places.items()})
    return root


def saes_digest(name: str) -> dict[str, str]:
    """What tells the SAEs at a place from others that lie there later.

    Args:
        name (`str`): a folder or Hub repository, as [`~resa_hf.sae.checkpoint.load_sae`] takes it.

    Returns:
        `dict[str, str]`: of a repository its `commit`; of a folder a hash for each SAE, of the whole of its cfg.json
        and of up to 257 pieces of its weights: another training changes nearly all of them.
    """
    place = parse_place(name)
    if place.is_folder:
        return {sae_id: _files_digest(Path(place.name, sae_id)) for sae_id in _sae_ids(name)}
    with hub_errors(place.name, place.revision, IncompatibleSAEError):
        if constants.HF_HUB_OFFLINE:
            return {"commit": str(commit_of(place.name, revision=place.revision))}
        return {"commit": str(HfApi().model_info(place.name, revision=place.revision).sha)}


def _files_digest(folder: Path) -> str:
    digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes())
    for path in (folder / SAE_LENS_WEIGHTS, folder / SPARSIFY_WEIGHTS):
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for start in range(0, size, max(1, size // 256)):
                    file.seek(start)
                    digest.update(file.read(4096))
    return digest.hexdigest()[:16]
