"""What `train-sae` and `tune` share: the text, told before training starts, and the run of one trainer."""

from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase, Trainer

from ..arguments import DataArguments
from ..data import hold_out
from ..experiment.folder import claim, write_json
from ..experiment.prepare import load_rows, tokenize
from ..experiment.report import versions
from ..experiment.stages import train_from_last_checkpoint


def stage_text(
    data: DataArguments, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[datasets.Dataset, datasets.Dataset | None, dict[str, str]]:
    """Returns training and held-out rows of tokens (`None` if nothing is held out) and what was read, in sentences.

    Raises:
        `DataError`: if the data cannot be used.
    """
    rows, qa = load_rows(data)
    told = {"dataset": data.dataset, "fingerprint": qa.fingerprint, "rows": qa.describe()}
    parts = {"train": rows}
    if data.held_out:
        parts["train"], parts["held_out"] = hold_out(rows, data.held_out, data.split_seed)
    tokens = {}
    for name, part in parts.items():
        tokens[name], counted = tokenize(part, data, tokenizer, max_length)
        told[name] = counted.describe()
    for name, sentence in told.items():
        print(f"{name}: {sentence}", flush=True)
    return tokens["train"], tokens.get("held_out"), told


def run_stage(trainer: Trainer, settings: dict[str, Any], told: dict[str, str]) -> Path:
    """Trains from the last checkpoint, evaluates if anything is held out, saves; returns the path of report.json.

    Raises:
        `DataError`: if the stage was started in this folder with other settings or data.
    """
    output = Path(str(trainer.args.output_dir))
    # Only now, when everything fits: a mistake that was found before is to be mended without another folder.
    claim(output, {"settings": settings, "data": told["fingerprint"]})
    seconds = train_from_last_checkpoint(trainer)
    held_out = trainer.evaluate() if trainer.eval_dataset is not None else {}
    trainer.save_model()
    path = output / "report.json"
    report = {"settings": settings, "data": told, "seconds": seconds, "held_out": held_out}
    write_json(path, {**report, "log": trainer.state.log_history, "versions": versions()})
    return path
