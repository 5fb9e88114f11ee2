"""What happens beside the steps of GRPO: adapters are kept and measured, and the log on the screen is short."""

from pathlib import Path
from typing import Any

import datasets
from peft import PeftModel
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..evaluation.movement import movement
from ..experiment.answering import MOVEMENT
from ..experiment.folder import read_json, write_json
from ..hookpoints import causal_lm
from ..tuning.loss import frozen_head
from .log import FIGURES


class KeepSteps(TrainerCallback):
    """Keeps the adapter after some of the steps, beside the checkpoints that are there to resume from.

    Args:
        trainer ([`~transformers.Trainer`]):
            Of a PEFT model.
        folder (`Path`):
            For `<step>/`, each a plain adapter with its tokenizer.
        steps (`list[int]`):
            After which.
        rows (`datasets.Dataset`, *optional*):
            Held-out rows of tokens (`input_ids`), on which KL(base || tuned) is measured there.

    Raises:
        `ValueError`: when training begins, if it ends before one of the steps.
    """

    def __init__(self, trainer: Trainer, folder: Path, steps: list[int], rows: datasets.Dataset | None) -> None:
        self.trainer, self.folder, self.steps, self.rows = trainer, folder, steps, rows

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._measured() is not None:
            # Before hours of training, not at the first step that is kept.
            frozen_head(causal_lm(self.trainer.model))  # type: ignore[arg-type]  # it is one, inside PEFT
        if self.steps and max(self.steps) > state.max_steps:
            raise ValueError(
                f"checkpoints names step {max(self.steps)}, but the training has {state.max_steps} steps."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step not in self.steps:
            return
        place = self.folder / str(state.global_step)
        self.trainer.save_model(str(place), _internal_call=True)  # which pushes nothing
        if (rows := self._measured()) is not None:
            model: PeftModel = self.trainer.accelerator.unwrap_model(self.trainer.model)
            moved = movement(model, rows)
            if state.is_world_process_zero:
                write_json(place / MOVEMENT, moved)

    def _measured(self) -> datasets.Dataset | None:
        """The rows, where a process holds all weights."""
        return None if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled else self.rows

    def moved(self) -> dict[str, dict[str, Any]]:
        """By step what was measured, also before an interruption."""
        places = [self.folder / str(step) / MOVEMENT for step in sorted(self.steps)]
        return {place.parent.name: read_json(place) for place in places if place.is_file()}


class ShortLog(ProgressCallback):
    """Trainer's progress bar, and of a log's thirty figures those that a reader follows."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        short = {name: value for name, value in (logs or {}).items() if name in FIGURES or name.endswith("/mean")}
        super().on_log(args, state, control, logs=short or logs, **kwargs)
