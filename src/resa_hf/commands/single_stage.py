"""What `train-sae` and `tune` share: the text, told before training starts, and the run of one trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer

from ..arguments import DataArguments
from ..evaluation.cost import Cost, current_device
from ..evaluation.movement import movement
from ..evaluation.share import Share
from ..evaluation.tables import finite
from ..experiment.folder import claim, read_json, write_json
from ..experiment.inputs import check_inputs
from ..experiment.manifest import note_start
from ..experiment.prepare import MEASURED_DOCUMENTS, load_rows, split_rows, tokenize, told_of
from ..experiment.report import versions
from ..experiment.response_only import mark_responses
from ..experiment.stages import tokens_trained_on, train_from_last_checkpoint, warned_of
from ..provenance import Revisions, data_revisions
from ..sae.metadata import ce_recovered
from ..sae.trainer import SAETrainer
from ..text import evaluation_prompt
from ..tuning.trainer import SAETuningTrainer


def stage_text(
    data: DataArguments, tokenizer: PreTrainedTokenizerBase, max_length: int, completion_only: bool = False
) -> tuple[datasets.Dataset, datasets.Dataset | None, dict[str, str]]:
    """Returns training and held-out rows of tokens (`None` if nothing is held out) and what was read, in sentences.

    With `completion_only`, of rows with one document each, their prompts are marked, to be left out of the loss.

    Raises:
        `DataError`: if the data cannot be used.
    """
    rows, qa = load_rows(data)
    told = told_of(data, qa)
    train, held_out, _ = split_rows(rows, data)
    parts = {"train": train} | ({} if held_out is None else {"held_out": held_out})
    tokens = {}
    for name, part in parts.items():
        tokens[name], counted = tokenize(part, data, tokenizer, max_length)
        told[name] = counted.describe()
        if completion_only:
            asked = part["problem"]
            prompts = (evaluation_prompt(problem, template=data.template, tokenizer=tokenizer) for problem in asked)
            tokens[name] = mark_responses(tokens[name], prompts, tokenizer)
    for name, sentence in told.items():
        print(f"{name}: {sentence}", flush=True)
    return tokens["train"], tokens.get("held_out"), told


def run_stage(
    trainer: Trainer,
    settings: dict[str, Any],
    told: dict[str, str],
    revisions: Revisions,
    load_whole: Callable[[], nn.Module] | None = None,
) -> Path:
    """Trains from the last checkpoint, evaluates if anything is held out, saves; returns the path of report.json. What
    was finished before is left as it is.

    Args:
        trainer (`Trainer`): of either stage.
        settings (`dict`): as given.
        told (`dict`): of the data, by `stage_text`.
        revisions (`dict`): of all else that was read.
        load_whole (callable, *optional*): of Stage I, as in `ce_recovered`.

    Raises:
        `DataError`: if the stage was started in this folder with other settings, data, models or SAEs.
    """
    output = Path(str(trainer.args.output_dir))
    # Only now, when everything fits: a mistake that was found before is to be mended without another folder.
    claim(output, {"settings": settings, "data": told["fingerprint"]})
    check_inputs(output, revisions)
    path = output / "report.json"
    if Share.of_training(trainer.args).of_first(path.is_file()):
        if path.is_file():
            read_json(path)  # not one that was cut
        return path  # finished before
    note_start(output, settings, told)
    seconds = train_from_last_checkpoint(trainer)
    held_out = trainer.evaluate() if trainer.eval_dataset is not None else {}
    trainer.save_model()
    if isinstance(trainer, SAETrainer):
        held_out |= ce_recovered(trainer, load_whole)
    tokens = tokens_trained_on(trainer, trainer.train_dataset)
    report = {
        "settings": settings,
        "data": told,
        "revisions": revisions | data_revisions(told),
        "seconds": seconds,
        "tokens": tokens,
        "costs": {"Stage I" if isinstance(trainer, SAETrainer) else "Stage II": Cost(seconds, tokens).as_plain()},
        "held_out": held_out,
        "moved": _moved(trainer),
        **warned_of(trainer),
        "log": trainer.state.log_history,
        "device": current_device(),
        "versions": versions(),
    }
    if trainer.is_world_process_zero():
        write_json(path, finite(report))
    return path


def _moved(trainer: Trainer) -> dict[str, Any]:
    """KL(base || tuned) on held-out rows without the SAE, and ||dW||, where one process holds all weights."""
    rows, sharded = trainer.eval_dataset, trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if not isinstance(trainer, SAETuningTrainer) or not isinstance(rows, datasets.Dataset) or sharded:
        return {}
    model: PeftModel = trainer.accelerator.unwrap_model(trainer.model)
    return movement(model, rows.select(range(min(len(rows), MEASURED_DOCUMENTS))))
