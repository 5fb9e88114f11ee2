"""What Stage II writes beside its adapter to go on from."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .metrics import StepMetrics

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

TOKENS_FILE = "tokens.json"


class CountedTokens(_Base):
    """A mixin of [`SAETuningTrainer`]: a run that was interrupted tells the tokens of all its parts."""

    _step_metrics: dict[str, StepMetrics]
    _trained_tokens = 0  # until the last log

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        tokens = self._trained_tokens + self._step_metrics["train"].tokens(self.accelerator)
        if self.args.should_save:
            Path(output_dir, TOKENS_FILE).write_text(json.dumps(tokens))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint, TOKENS_FILE)).is_file():
            self._trained_tokens = int(json.loads(path.read_text()))
