"""The two stages of a run and its answers, each written to the run's folder and skipped if it is there already."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, Trainer

from ..evaluation.engine import Outcomes, Sampling, answer
from ..models import load_causal_lm, load_tokenizer
from ..precision import runnable_device
from ..sae.config import SAETrainingConfig
from ..sae.trainer import SAETrainer
from ..tuning.config import SAETuningConfig
from ..tuning.trainer import SAETuningTrainer
from .folder import BASE, RunFolder, read_json, write_json, write_whole
from .known import make_known
from .settings import Arm, RunArguments, RunSettings

ADAPTER, TUNING, STAGE1 = "adapter", "tuning.json", "stage1.json"


def load_target(run: RunArguments) -> PreTrainedModel:
    """The target model, its adapter merged."""
    return load_causal_lm(run.model_name_or_path, run.model_adapter, revision=run.model_revision, dtype=run.dtype)


def load_source(run: RunArguments) -> PreTrainedModel:
    """The source model, its adapter merged; the target where no other is named."""
    if not run.has_source:
        return load_target(run)
    name = run.source_model or run.model_name_or_path
    return load_causal_lm(name, run.source_adapter, revision=run.source_revision, dtype=run.dtype)


def train_saes(folder: RunFolder, settings: RunSettings, source: str, seed: int) -> None:
    """Stage I: trains SAEs on the `"source"` or the `"base"`."""
    target = folder.sae(source, seed)
    if (target / STAGE1).is_file():
        return
    run = settings.run
    model = load_source(run) if source == "source" else load_target(run)
    args = SAETrainingConfig(
        **{"report_to": "none", "save_strategy": "no", **settings.stage1}, output_dir=str(target / "run"), seed=seed
    )
    train, held_out = (datasets.load_from_disk(folder.data(name)) for name in ("train", "held_out"))
    tokenizer = load_tokenizer(run.model_name_or_path, revision=run.model_revision)
    trainer = SAETrainer(model, args, train, held_out, processing_class=tokenizer)
    seconds = train_from_last_checkpoint(trainer)
    quality = trainer.evaluate()
    trainer.save_model(str(target))
    write_json(target / STAGE1, {"seconds": seconds, "quality": quality, "log": trainer.state.log_history})
    shutil.rmtree(target / "run", ignore_errors=True)  # checkpoints of what is finished


def run_arm(folder: RunFolder, settings: RunSettings, arm: Arm, rate: float | None, seed: int, split: str) -> None:
    """Stage II for one arm, learning rate and seed, then its answers to the questions of a split."""
    place = folder.arm(arm, rate, seed)
    wanted = {f"{split}-sampled.jsonl": settings.sampling.temperature}
    if settings.run.greedy and split == "held_out":
        wanted[f"{split}-greedy.jsonl"] = 0.0
    wanted = {name: temperature for name, temperature in wanted.items() if not (place / name).is_file()}
    if not wanted and (rate is None or (place / TUNING).is_file()):
        return
    model = _arm_model(folder, settings, arm, rate, seed)
    # Every arm answers on one device, or the same seed would not mean the same draws.
    torch.nn.Module.to(model, runnable_device(bool(settings.stage2.get("use_cpu", False))))
    tokenizer = load_tokenizer(settings.run.model_name_or_path, revision=settings.run.model_revision)
    questions = read_json(folder.data("questions.json"))[split]
    prompts, golds = ([question[key] for question in questions] for key in ("prompt", "answer"))
    for name, temperature in wanted.items():
        sampling = Sampling(
            **{**vars(settings.sampling), "temperature": temperature, "seed": settings.sampling.seed + seed}
            | ({"samples": 1} if temperature == 0 else {})
        )
        started = time.perf_counter()
        outcomes = answer(model, tokenizer, prompts, golds, sampling)
        _write_answers(place / name, questions, outcomes, time.perf_counter() - started)


def _arm_model(
    folder: RunFolder, settings: RunSettings, arm: Arm, rate: float | None, seed: int
) -> PreTrainedModel | PeftModel:
    model = load_target(settings.run)
    if arm == BASE:
        return model
    if arm.known is not None:
        source = load_source(settings.run) if arm.known == "svd_of_source" else None
        return make_known(arm.known, model, settings.run.lora_config(), source, seed)
    place = folder.arm(arm, rate, seed)
    if (place / TUNING).is_file():
        return PeftModel.from_pretrained(model, str(place / ADAPTER))
    return _tune(folder, settings, arm, model, place, {"learning_rate": rate, "seed": seed})


def _tune(
    folder: RunFolder, settings: RunSettings, arm: Arm, model: PreTrainedModel, place: Path, fixed: dict[str, Any]
) -> PreTrainedModel | PeftModel:
    run = settings.run
    args = SAETuningConfig(
        **{
            "report_to": "none",
            "save_strategy": "no",
            **settings.stage2,
            **arm.tuning,
            **fixed,
            **_sae_of(folder, settings, arm, fixed["seed"]),
        },
        output_dir=str(place / "run"),
        # The data is packed already.
        packing=False,
        eval_on_start=True,
        eval_strategy="no",
    )
    train, held_out = (datasets.load_from_disk(folder.data(name)) for name in ("train", "held_out"))
    trainer = SAETuningTrainer(
        model,
        args,
        train,
        held_out,
        processing_class=load_tokenizer(run.model_name_or_path, revision=run.model_revision),
        source_model=load_source(run) if args.kl_reference == "source" else None,
        peft_config=run.lora_config(),
    )
    seconds = train_from_last_checkpoint(trainer)
    trainer.evaluate()
    history = trainer.state.log_history
    evaluations = [entry for entry in history if "eval_loss" in entry]
    trainer.save_model(str(place / ADAPTER))
    report = {
        "seconds": seconds,
        "steps": trainer.state.global_step,
        "initial": evaluations[0],
        "final": evaluations[-1],
        "log": history,
    }
    write_json(place / TUNING, report)
    shutil.rmtree(place / "run", ignore_errors=True)  # checkpoints of what is finished
    tuned: PeftModel = trainer.model  # type: ignore[assignment]  # the trainer made it one
    return tuned


def _sae_of(folder: RunFolder, settings: RunSettings, arm: Arm, seed: int) -> dict[str, Any]:
    run = settings.run
    if arm.sae_from == "none":
        return {"sae": None, "sae_id": None}
    if arm.sae_from == "pretrained":
        return {"sae": run.sae, "sae_id": run.sae_id, "sae_revision": run.sae_revision}
    source = arm.sae_from if run.has_source else "source"
    sae_id = {**settings.stage2, **arm.tuning}.get("sae_id")
    return {"sae": str(folder.sae(source, seed)), "sae_id": sae_id}


def train_from_last_checkpoint(trainer: Trainer) -> float:
    """Trains, from the last checkpoint if there is one; returns the seconds."""
    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=_last_whole_checkpoint(Path(str(trainer.args.output_dir))))
    return time.perf_counter() - started


def _last_whole_checkpoint(output: Path) -> str | None:
    """The newest checkpoint that was written to its end: Trainer writes trainer_state.json last."""
    whole = [path.parent for path in output.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _write_answers(path: Path, questions: list[dict[str, str]], outcomes: Outcomes, seconds: float) -> None:
    rows: list[dict[str, Any]] = [{"seconds": seconds}]
    for i, question in enumerate(questions):
        row = {"problem": question["problem"], "answer": question["answer"], "completions": outcomes.completions[i]}
        arrays = {key: getattr(outcomes, key)[i].tolist() for key in ("correct", "lengths", "truncated")}
        rows.append({**row, **arrays})
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_answers(path: Path) -> dict[str, Any]:
    """`correct`, `lengths`, `truncated`: arrays `[problems, samples]`; and `seconds`, from a file of answers."""
    head, *rows = (json.loads(line) for line in path.read_text().splitlines())
    return {
        "seconds": head["seconds"],
        **{key: np.array([row[key] for row in rows]) for key in ("correct", "lengths", "truncated")},
    }
