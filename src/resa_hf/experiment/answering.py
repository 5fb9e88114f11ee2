"""The answers of an arm: to the questions that a candidate is chosen on, and to those of the verdict."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapters import load_reasoning_adapter
from ..errors import DataError
from ..evaluation.adapter_check import check_adapter
from ..evaluation.engine import Outcomes, Sampling, answer
from ..evaluation.in_process import TransformersEngine, weights_digest
from ..evaluation.movement import movement
from ..evaluation.store import stored_seconds
from ..precision import runnable_device
from .arms import BASE, Arm, Candidate
from .folder import RunFolder, read_json, reading_files, write_json, write_whole
from .known import make_known, with_noise
from .loading import answering_revisions, load_answering, load_answering_tokenizer, load_source, load_target
from .prepare import read_rows
from .settings import RunArguments, RunSettings
from .stages import ADAPTER, tune

SELECTION, HELD_OUT, GREEDY = "selection", "held_out", "greedy"
MOVEMENT, WEIGHTS, REVISIONS = "movement.json", "weights.json", "revisions.json"


def run_arm(
    folder: RunFolder, settings: RunSettings, arm: Arm, candidate: Candidate | None, seed: int, split: str
) -> None:
    """Makes the arm's model, Stage II included, and lets it answer a split: `"held_out"`, the verdict's, or
    `"selection"`.
    """
    place = folder.arm(arm, candidate, seed)
    wanted = {split: settings.sampling.temperature}
    # A model without randomness of its own gives the same greedy answers with every seed.
    if settings.run.greedy and split == HELD_OUT and (arm.is_seeded or seed == settings.run.seeds[0]):
        wanted[GREEDY] = 0.0
    wanted = {name: temperature for name, temperature in wanted.items() if not (place / "answers" / name).is_dir()}
    unmoved = split == HELD_OUT and arm.has_adapter and not (place / MOVEMENT).is_file()
    # What was taken may have changed where it lies, so that it is always looked at.
    if not wanted and not unmoved and arm.adapter is None:
        return
    if candidate is not None and arm.is_trained:
        tune(folder, settings, arm, candidate, seed)
    # What is chosen for an adapter must not depend on the sibling that it is moved to.
    run = replace(settings.run, evaluate_on=None) if split == SELECTION else settings.run
    tokenizer = load_answering_tokenizer(run)
    questions = read_questions(folder.data("questions.json"), split)
    model = _arm_model(folder, replace(settings, run=run), arm, candidate, seed)
    if arm == BASE:
        write_json(place / REVISIONS, answering_revisions(run))
    if arm.adapter is not None:
        _check_unchanged(place / WEIGHTS, arm, weights_digest(model))
    # Every arm answers on one device, or the same seed would not mean the same draws.
    torch.nn.Module.to(model, runnable_device(bool(settings.stage2.get("use_cpu", False))))
    if isinstance(model, PeftModel):
        check_adapter(model, tokenizer, [questions[0]["prompt"]], allow_zero=arm.known == "zero_adapter")
        if unmoved:
            write_json(place / MOVEMENT, movement(model, read_rows(folder.data("held_out"))))
    for name, temperature in wanted.items():
        sampling = Sampling(
            **{**vars(settings.sampling), "temperature": temperature, "seed": settings.sampling.seed + seed}
            | ({"samples": 1} if temperature == 0 else {})
        )
        if settings.run.tasks and split == HELD_OUT:
            engine = TransformersEngine(model, tokenizer, name=arm.slug)
            _answer_tasks(place, name, settings.run, engine, sampling)
        else:
            _answer_questions(place, name, questions, model, tokenizer, sampling)


def read_questions(path: Path, split: str) -> list[dict[str, str]]:
    """The questions of a split, as `prepare` wrote them into questions.json: `problem`, `answer`, `prompt`.

    Raises:
        `DataError`: if they are damaged.
    """
    with reading_files(path):
        questions = [{key: row[key] for key in ("problem", "answer", "prompt")} for row in read_json(path)[split]]
        if not questions or not all(isinstance(text, str) for row in questions for text in row.values()):
            raise TypeError(f"what is asked in {split} is no text")
        return questions


def _arm_model(
    folder: RunFolder, settings: RunSettings, arm: Arm, candidate: Candidate | None, seed: int
) -> PreTrainedModel | PeftModel:
    run = settings.run
    if arm.known == "source":
        return load_source(run)
    model = load_answering(run)
    if arm == BASE:
        return model
    if arm.known == "weight_noise":
        return with_noise(model, seed)
    adapter = arm.taken_with(seed) or str(folder.arm(arm, candidate, seed) / ADAPTER)
    if arm.known is not None:
        like = next((other for other in settings.arms if other.name == arm.like), None)
        trained = None if like is None else folder.arm(like, candidate, seed) / ADAPTER
        source = load_source(run) if arm.known == "svd_of_source" else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of what PEFT draws for a new adapter
            made = make_known(arm.known, load_target(run), run.lora_config(), source, seed, trained)
        made.save_pretrained(adapter)
    return load_reasoning_adapter(model, adapter)


def _check_unchanged(path: Path, arm: Arm, digest: dict[str, str]) -> None:
    """Old answers must not pass for those of an adapter that was trained again under the same name."""
    if path.is_file() and read_json(path) != digest:
        raise DataError(
            f"The adapter {arm.adapter} has changed since it answered for {path.parent}. Choose another --output_dir, "
            "or delete that folder."
        )
    write_json(path, digest)


def _answer_questions(
    place: Path,
    name: str,
    questions: list[dict[str, str]],
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
) -> None:
    store = place / "partial" / f"{name}.jsonl"
    prompts, golds = ([question[key] for question in questions] for key in ("prompt", "answer"))
    outcomes = answer(model, tokenizer, prompts, golds, sampling, store=store)
    problems = [question["problem"] for question in questions]
    _write(place, name, {HELD_OUT: (problems, outcomes, stored_seconds(store))})


def _answer_tasks(place: Path, name: str, run: RunArguments, engine: TransformersEngine, sampling: Sampling) -> None:
    from ..evaluation.pipeline import run_tasks

    results = run_tasks(engine, run.tasks or [], sampling, place / "partial" / name, files=run.files())
    _write(place, name, {task: (r.problems, r.outcomes, r.seconds) for task, r in results.items()})


def _write(place: Path, name: str, results: dict[str, tuple[list[str], Outcomes, float]]) -> None:
    """One file a task, and all of them or none: `answers/<name>/<task>.jsonl`."""
    draft = place / "answers" / f".{name}"
    shutil.rmtree(draft, ignore_errors=True)
    for task, (problems, outcomes, seconds) in results.items():
        rows: list[dict[str, Any]] = [{"task": task, "seconds": seconds}]
        for i, problem in enumerate(problems):
            arrays = {key: getattr(outcomes, key)[i].tolist() for key in ("correct", "lengths", "truncated")}
            rows.append({"problem": problem, "completions": outcomes.completions[i], **arrays})
        write_whole(draft / f"{task.replace(':', '-')}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    draft.replace(place / "answers" / name)
    shutil.rmtree(place / "partial", ignore_errors=True)


def read_answers(place: Path, name: str) -> dict[str, dict[str, Any]]:
    """By task `correct`, `lengths`, `truncated`: arrays `[problems, samples]`; and `seconds`."""
    results = {}
    for path in sorted((place / "answers" / name).glob("*.jsonl")):
        with reading_files(path):
            head, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
            arrays = {key: np.array([row[key] for row in rows]) for key in ("correct", "lengths", "truncated")}
            results[head["task"]] = {"seconds": head["seconds"], **arrays}
    return results
