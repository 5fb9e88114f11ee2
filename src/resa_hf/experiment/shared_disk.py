"""Whether all processes of a run, on several machines perhaps, see the output folder of the first one."""

import secrets
import warnings
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object
from transformers import Trainer

from ..errors import TrainingError
from ..sae.config import SAETrainingConfig


def check_shared(trainer: Trainer, checkpoint: str | None) -> None:
    """
    Compares what the processes see, before training begins; a warning if the run could not be resumed.

    Args:
        trainer ([`~transformers.Trainer`]): of any stage.
        checkpoint (`str`, *optional*): where the first process goes on from, the same in all processes.

    Raises:
        `TrainingError`: in all processes, if one of them does not see the checkpoint, or the folder through which SAEs
            that are spread over processes are collected.
    """
    args = trainer.args
    if args.world_size == 1:
        return
    output = Path(str(args.output_dir))
    spread = isinstance(args, SAETrainingConfig) and args.spread_hookpoints
    if checkpoint is not None:
        # Which each machine's part of a checkpoint lacks.
        blind = _blind(Path(checkpoint, "trainer_state.json").is_file())
        if blind:
            raise TrainingError(
                f"{blind} does not see {checkpoint}, from which the first one goes on. Let all machines share the "
                "disk of output_dir, or copy that folder's files to each of them and set save_on_each_node: true."
            )
    if args.save_on_each_node and not spread:
        return
    blind = _blind(_sees_the_first(trainer, output))
    told = f"{blind} does not see what the first one writes into {output}."
    if blind and spread:
        raise TrainingError(f"{told} With spread_hookpoints: true all machines must share the disk of output_dir.")
    if blind and trainer.is_world_process_zero():
        warnings.warn(
            f"{told} If this run is interrupted it cannot go on. Let all machines share the disk of output_dir, or "
            "set save_on_each_node: true.",
            stacklevel=2,
        )


def _sees_the_first(trainer: Trainer, output: Path) -> bool:
    """By a new name, which no network disk can remember as absent."""
    name = [f".seen-{secrets.token_hex(8)}"]
    broadcast_object_list(name)
    mark = output / name[0]
    if trainer.is_world_process_zero():
        mark.touch()
    trainer.accelerator.wait_for_everyone()
    seen = mark.exists()
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        mark.unlink()
    return seen


def _blind(sees: bool) -> str:
    """The first process that does not, in words; empty if all do."""
    answers = gather_object([sees])
    return "" if all(answers) else f"Process {answers.index(False)} of {len(answers)}"
