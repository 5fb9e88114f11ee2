"""The two stages of a run, each written to the run's folder and skipped if it is there already."""

import shutil
import time
from pathlib import Path
from typing import Any

import datasets
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoints import newest_whole, set_torn_aside
from ..evaluation.share import Share
from ..guards import unmoved
from ..lost_loaders import loaders_explained
from ..models import load_tokenizer
from ..out_of_memory import memory_explained
from ..preempted_training import saved_when_preempted
from ..preemption import check_preemption
from ..provenance import (
    Revision,
    Revisions,
    base_revisions,
    data_revisions,
    local_name,
    sae_metadata,
    sae_revision,
    source_revisions,
)
from ..quantization import adapter_in_float32
from ..sae.config import SAETrainingConfig
from ..sae.metadata import ce_recovered
from ..sae.trainer import SAETrainer
from ..tuning.config import SAETuningConfig
from ..tuning.on_policy import OnPolicyTrainer, on_policy_config, on_policy_prompts
from ..tuning.trainer import SAETuningTrainer
from .arms import DATASET, STUDENT, Arm, Candidate
from .folder import RunFolder, read_json, reading_files, write_json
from .loading import load_sae_source, load_source, load_target
from .prepare import read_rows, training_questions
from .response_only import mark_responses
from .sampled_text import TEXT, TOKENS
from .settings import RunArguments, RunSettings
from .shared_disk import check_shared

ADAPTER, TUNING, STAGE1, SECONDS = "adapter", "tuning.json", "stage1.json", "seconds.json"


def train_saes(folder: RunFolder, settings: RunSettings, source: str, seed: int) -> None:
    """Stage I: trains SAEs on `"source"`, `"base"`, or what a control needs, such as `"source-prose"`."""
    target = folder.sae(source, seed)
    if (target / STAGE1).is_file():
        _forget_checkpoints(target)
        return
    run = settings.run
    args = SAETrainingConfig(
        **{"report_to": "none", "save_strategy": "no", **settings.stage1}, output_dir=str(target / "run"), seed=seed
    )
    text = "prose" if source.endswith("-prose") else "trigger" if run.trigger_dataset else "train"
    train, held_out = (read_rows(folder.data(name)) for name in (text, "held_out"))
    tokenizer = load_tokenizer(run.model_name_or_path, revision=run.model_revision)
    read = base_revisions(run) if source.startswith("base") or not run.has_source else source_revisions(run, run)
    metadata = sae_metadata(read, _text_read(folder, run, text))
    if source.endswith("-random"):
        metadata["model_name"] = None  # no such model can be loaded
    model = load_sae_source(run, source, seed, args.hookpoints)
    trainer = SAETrainer(model, args, train, held_out, processing_class=tokenizer, metadata=metadata)
    del model  # so that the trainer alone holds it, and can let it go
    seconds = train_from_last_checkpoint(trainer)
    quality = trainer.evaluate()
    trainer.save_model(str(target))
    report = {
        "seconds": seconds,
        "tokens": tokens_trained_on(trainer, train),
        "quality": quality | ce_recovered(trainer, lambda: load_sae_source(run, source, seed)),
        "revisions": read | sae_revision("initial_sae", args.initial_sae, args.initial_sae_revision),
        "log": trainer.state.log_history,
    }
    write_json(target / STAGE1, report)
    _forget_checkpoints(target)
    check_preemption()


def _forget_checkpoints(finished: Path) -> None:
    """What is finished needs none. It may have been killed before they were gone."""
    shutil.rmtree(finished / "run", ignore_errors=True)


def _text_read(folder: RunFolder, run: RunArguments, text: str) -> Revision:
    if text == "prose":
        return {"name": local_name(run.prose), "commit": None}
    path = folder.data("data.json")
    with reading_files(path):
        return data_revisions(read_json(path))["trigger_dataset" if text == "trigger" else "dataset"]


class _KeepAdapters(TrainerCallback):
    """Keeps the adapter after some of the steps, and evaluates it."""

    def __init__(self, trainer: Trainer, places: dict[int, Path]) -> None:
        self.trainer, self.places = trainer, places

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step in self.places:
            self.trainer.save_model(str(self.places[state.global_step]))
            control.should_evaluate = True


def tune(folder: RunFolder, settings: RunSettings, arm: Arm, candidate: Candidate, seed: int) -> None:
    """Stage II: trains an arm's adapter, and keeps it at the steps among which a candidate may be chosen.

    Raises:
        `ValueError`: if the training is shorter than one of those steps.
    """
    place = folder.training(arm, candidate, seed)
    if (place / TUNING).is_file():
        _forget_checkpoints(place)
        return
    run = settings.run
    args = SAETuningConfig(
        **{
            "report_to": "none",
            "save_strategy": "no",
            **settings.stage2,
            **arm.tuning,
            **_saes_of(folder, settings, arm, seed),
            "learning_rate": candidate.rate,
            "seed": seed,
        },
        output_dir=str(place / "run"),
        # The data is packed already.
        packing=False,
        eval_on_start=True,
        eval_strategy="no",
    )
    trainer = _on_policy_trainer(folder, settings, args) if arm.text == STUDENT else _trainer(folder, run, arm, args)
    steps = run.checkpoints or []
    if steps and 0 < args.max_steps < max(steps):
        raise ValueError(f"checkpoints names step {max(steps)}, but Stage II has {args.max_steps} steps.")
    read = base_revisions(run) | (source_revisions(run, run) if args.kl_reference == "source" else {})
    text = read_json(folder.text(arm.text, seed) / TEXT) if arm.text not in (DATASET, STUDENT) else None
    if text is not None:
        with reading_files(folder.text(arm.text, seed) / TEXT):
            read |= text["revisions"]
    if arm.sae_from == "pretrained":
        read |= sae_revision("sae", args.sae, args.sae_revision)
    places = {step: folder.arm(arm, Candidate(candidate.rate, step), seed) / ADAPTER for step in steps}
    trainer.add_callback(_KeepAdapters(trainer, places))
    seconds = train_from_last_checkpoint(trainer)
    trainer.evaluate()
    if steps and max(steps) > trainer.state.global_step:
        raise ValueError(f"checkpoints names step {max(steps)}, but Stage II has {trainer.state.global_step} steps.")
    trainer.save_model(str(place / ADAPTER))
    _write_tuning(trainer, place, seconds, read, text)
    _forget_checkpoints(place)
    check_preemption()


def _trainer(folder: RunFolder, run: RunArguments, arm: Arm, args: SAETuningConfig) -> SAETuningTrainer:
    rows = folder.data("train") if arm.text == DATASET else folder.text(arm.text, args.seed) / TOKENS
    train, held_out = (read_rows(path) for path in (rows, folder.data("held_out")))
    tokenizer = load_tokenizer(run.model_name_or_path, revision=run.model_revision)
    if args.completion_only_loss:
        prompts = [question["prompt"] for question in training_questions(run, tokenizer)]
        train = mark_responses(train, prompts, tokenizer)
    return SAETuningTrainer(
        load_target(run),
        args,
        train,
        held_out,
        processing_class=tokenizer,
        source_model=load_source(run) if args.kl_reference == "source" else None,
        peft_config=run.lora_config(),
    )


def _on_policy_trainer(folder: RunFolder, settings: RunSettings, args: SAETuningConfig) -> OnPolicyTrainer:
    run, sampling = settings.run, settings.sampling
    tokenizer = load_tokenizer(run.model_name_or_path, revision=run.model_revision)
    prompts = [question["prompt"] for question in training_questions(run, tokenizer)]
    return OnPolicyTrainer(
        load_target(run),
        load_source(run),
        on_policy_config(args, top_p=sampling.top_p, max_new_tokens=sampling.max_new_tokens),
        train_dataset=on_policy_prompts(prompts, tokenizer, args),
        eval_dataset=read_rows(folder.data("held_out")),
        processing_class=tokenizer,
        peft_config=run.lora_config(),
    )


def _write_tuning(
    trainer: Trainer, place: Path, seconds: float, revisions: Revisions, text: dict[str, Any] | None
) -> None:
    history = trainer.state.log_history
    report = {
        "seconds": seconds,
        "steps": trainer.state.global_step,
        "tokens": tokens_trained_on(trainer, trainer.train_dataset),
        **({} if text is None else {"text": text}),
        "revisions": revisions,
        **warned_of(trainer),
        "evaluations": [entry for entry in history if "eval_loss" in entry],
        "log": history,
    }
    write_json(place / TUNING, report)


def tokens_trained_on(trainer: Trainer, train: datasets.Dataset) -> int:
    """Tokens trained on, over all epochs and processes."""
    if isinstance(trainer, OnPolicyTrainer):
        return int(trainer.state.num_input_tokens_seen)
    return round(sum(map(len, train["input_ids"])) * (trainer.state.epoch or 0.0))


def _saes_of(folder: RunFolder, settings: RunSettings, arm: Arm, seed: int) -> dict[str, Any]:
    """The SAE of an arm, and the one that stands in for it."""
    run = settings.run
    if arm.sae_from == "none":
        return {"sae": None, "sae_id": None}
    keys = {**settings.stage2, **arm.tuning}
    if arm.sae_from == "pretrained":
        return {"sae": run.sae, "sae_id": keys.get("sae_id", run.sae_id), "sae_revision": run.sae_revision}
    sae_id = keys.get("sae_id")
    saes = {"sae": str(folder.sae(settings.sae_source(arm.sae_from), seed)), "sae_id": sae_id}
    if arm.control_source is not None:
        saes["control_sae"] = str(folder.sae(settings.sae_source(arm.control_source), seed))
        saes["control_sae_id"] = keys.get("control_sae_id", sae_id)
    return saes


class _Resumable(TrainerCallback):
    """Keeps beside each checkpoint what it took, and none of the end: resumed there, Trainer would do a step more."""

    def __init__(self, before: float) -> None:
        self._started = time.perf_counter() - before

    @property
    def seconds(self) -> float:
        """Of the training until now, its interrupted parts up to their last checkpoints."""
        return time.perf_counter() - self._started

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_json(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / SECONDS, self.seconds)


def train_from_last_checkpoint(trainer: Trainer, every: int = 1) -> float:
    """Trains, from the last whole checkpoint if there is one.

    Args:
        trainer ([`~transformers.Trainer`]): of any stage.
        every (`int`, *optional*, defaults to `1`): steps after whose multiples a checkpoint can be resumed exactly.

    Returns:
        `float`: the seconds, those before an interruption included.

    Raises:
        `Preempted`: if SIGTERM came; a checkpoint was written then.
        `TrainingError`: if it cannot end well, or memory is full.
    """
    adapter_in_float32(trainer.model)  # type: ignore[arg-type]  # a module, once the trainer is made
    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    checkpoint = _last_checkpoint(trainer)
    check_shared(trainer, checkpoint)
    if checkpoint is not None:
        trainer.args.eval_on_start = False  # the start is behind it, and was evaluated
    told = None if checkpoint is None else Path(checkpoint, SECONDS)
    clock = _Resumable(read_json(told, float) if told is not None and told.is_file() else 0.0)
    trainer.add_callback(clock)
    with saved_when_preempted(trainer, every), memory_explained(trainer), loaders_explained(trainer):
        trainer.train(resume_from_checkpoint=checkpoint)
    return clock.seconds


def _last_checkpoint(trainer: Trainer) -> str | None:
    """The newest whole checkpoint, as the first process sees it: all must take the same."""
    output = Path(str(trainer.args.output_dir))
    newest = None
    if trainer.is_world_process_zero():
        set_torn_aside(output)
        newest = newest_whole(output)
    return Share.of_training(trainer.args).of_first(None if newest is None else str(newest))


def warned_of(trainer: Trainer) -> dict[str, list[str]]:
    """What a report says of a training that ended, but not well: `warnings`, or nothing."""
    warning = unmoved(trainer.model)  # type: ignore[arg-type]  # a module, once the trainer is made
    if warning is None:
        return {}
    print(f"Warning: {warning}", flush=True)
    return {"warnings": [warning]}
