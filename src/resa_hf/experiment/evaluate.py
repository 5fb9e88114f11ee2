"""Adapters against their base on benchmarks: the work of `resa-hf evaluate`."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapters import load_reasoning_adapter
from ..data import PRESETS, TINY, load_questions
from ..evaluation.adapter_check import check_adapter, check_served_adapter
from ..evaluation.arguments import BASE, EvaluateArguments, slug
from ..evaluation.contamination import OverlapReport, find_overlap
from ..evaluation.engine import Engine
from ..evaluation.in_process import TransformersEngine
from ..evaluation.movement import movement
from ..evaluation.pipeline import TaskResult, run_tasks
from ..evaluation.server import ServerEngine
from ..evaluation.share import Share
from ..evaluation.tasks import task_rows
from ..models import load_causal_lm, load_tokenizer
from ..precision import runnable_device
from .folder import claim
from .manifest import note_start
from .plan import plan

# Problems, with the base's own answers, on which KL(base || tuned) is measured.
_MEASURED = 64


@dataclass(frozen=True)
class Evaluated:
    """What was measured of one model: answers by task, and how far its adapter has moved it (in process)."""

    name: str
    tasks: dict[str, TaskResult]
    moved: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """All that a report needs; `models` has the base first."""

    models: list[Evaluated]
    planned: dict[str, Any]
    overlap: dict[str, OverlapReport]


def evaluate(args: EvaluateArguments, share: Share = Share()) -> Evaluation:  # noqa: B008  # frozen
    """Lets the base and each adapter answer the tasks, checks before each adapter that it acts.

    Args:
        args ([`EvaluateArguments`]): what to compare.
        share ([`Share`], *optional*): this process' part of the answers. All processes return the same; what is
            written into the output folder comes from the first.

    Raises:
        `DataError`: for a task that cannot be loaded, before anything is answered; or if the folder holds another
            evaluation.
        `IncompatibleAdapterError`: for an adapter that does not fit, or does nothing; what was answered is kept.
    """
    folder = Path(args.output_dir)
    if share.is_first:
        claim(folder, {"settings": _fixed(args)})
        note_start(folder, asdict(args))
    rows = task_rows(args.tasks, args.files())
    sizes = {task: (min(len(part), args.max_problems or len(part)), args.samples) for task, part in rows.items()}
    planned = plan(sizes, seeds=1)
    print(planned["text"], flush=True)
    problems = {task: list(part["problem"]) for task, part in rows.items()}
    overlap = {}
    for source in args.check_overlap:
        # Presets know their column; question_column is that of one's own files.
        column = None if source in (*PRESETS, *TINY) else args.question_column
        overlap[source] = find_overlap(load_questions(source, column), problems)
        print(f"Overlap with {source}. {overlap[source].as_markdown()}", flush=True)
    with tempfile.TemporaryDirectory() as unread:
        # lighteval writes its results in every process.
        place = folder if share.is_first else Path(unread)
        models = _on_server(args, place) if args.server is not None else _in_process(args, place, share)
    return Evaluation(models, planned, overlap)


def _fixed(args: EvaluateArguments) -> dict[str, Any]:
    """The settings that a rerun in the same folder must share; an adapter may be added to those that answered."""
    free = (
        "adapters",
        "controls",
        "rl_adapter",
        "margin",
        "gpus",
        "price_per_gpu_hour",
        "check_overlap",
        "concurrency",
        "tasks",
    )
    return {key: value for key, value in asdict(args).items() if key not in free}


def _in_process(args: EvaluateArguments, folder: Path, share: Share) -> list[Evaluated]:
    base = load_causal_lm(
        args.model_name_or_path,
        args.model_adapter,
        revision=args.model_revision,
        dtype=args.dtype,
        load_in_4bit=args.load_in_4bit,
    )
    torch.nn.Module.to(base, runnable_device(False))
    tokenizer = load_tokenizer(args.model_name_or_path, revision=args.model_revision)
    models = [_answer(args, folder, BASE, TransformersEngine(base, tokenizer, name=BASE, share=share))]
    prompts = next(iter(models[0].tasks.values())).prompts
    text = _answered(tokenizer, models[0])
    model: PreTrainedModel | PeftModel = base
    for name, place in map(args.name_and_place, (*args.adapters, *args.controls)):
        # PEFT refuses names that are also those of a module's attributes, such as `half`.
        inside = f"adapter-{slug(name)}"
        model = load_reasoning_adapter(model, place, name=inside)
        model.set_adapter(inside, inference_mode=True)
        check_adapter(model, tokenizer, prompts[:2])
        moved = movement(model, text)
        engine = TransformersEngine(model, tokenizer, adapter=inside, name=name, share=share)
        models.append(replace(_answer(args, folder, name, engine), moved=moved))
    return models


def _answered(tokenizer: PreTrainedTokenizerBase, base: Evaluated) -> datasets.Dataset:
    """Problems with the base's own answers, as tokens: where adapter and base may differ."""
    texts = [
        f"{prompt}{completions[0]}"
        for result in base.tasks.values()
        for prompt, completions in zip(result.prompts, result.outcomes.completions, strict=True)
    ]
    return datasets.Dataset.from_dict(
        {"input_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts[:_MEASURED]]}
    )


def _on_server(args: EvaluateArguments, folder: Path) -> list[Evaluated]:
    assert args.server is not None
    tokenizer = load_tokenizer(args.model_name_or_path, revision=args.model_revision)
    base = ServerEngine(args.server, args.model_name_or_path, tokenizer, concurrency=args.concurrency)
    models = [_answer(args, folder, BASE, base)]
    prompts = next(iter(models[0].tasks.values())).prompts
    for name, served in map(args.name_and_place, (*args.adapters, *args.controls)):
        engine = ServerEngine(args.server, served, tokenizer, concurrency=args.concurrency, name=name)
        check_served_adapter(base, engine, prompts[:4])
        models.append(_answer(args, folder, name, engine))
    return models


def _answer(args: EvaluateArguments, folder: Path, name: str, engine: Engine) -> Evaluated:
    results = run_tasks(
        engine,
        args.tasks,
        args.sampling(),
        folder / "models" / slug(name),
        system_prompt=args.system_prompt,
        max_problems=args.max_problems,
        files=args.files(),
    )
    return Evaluated(name, results, {})
