"""Whether all processes of a run, on several machines perhaps, see the output folder of the first one."""

import secrets
import warnings
from pathlib import Path

from accelerate.utils import gather_object
from transformers import Trainer

from ..errors import TrainingError
from ..evaluation.share import Share
from ..sae.config import SAETrainingConfig


def check_shared(trainer: Trainer, checkpoint: str | None) -> None:
    """
    Compares what the processes see, before training begins; a warning if the run could not be resumed.

    Args:
        trainer ([`~transformers.Trainer`]): of any stage.
        checkpoint (`str`, *optional*): where the first process goes on from, the same in all processes.

    Raises:
        `TrainingError`: in all processes, if one of them does not see the checkpoint, or the folder through which SAEs
            that are spread over processes are collected; or if machines that share the disk are each to save there.
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
        lacking = _blind(Path(checkpoint, f"rng_state_{args.process_index}.pth").is_file())
        if lacking and trainer.is_world_process_zero():
            warnings.warn(
                f"{lacking} does not find its random state in {checkpoint}: dropout and noise are drawn otherwise "
                "from here on. Machines that share no disk have each written their own; put them together.",
                stacklevel=2,
            )
    sees = _sees_the_first(trainer, output)
    # The first process of another machine would write its checkpoints over those of the first machine.
    if any(gather_object([args.save_on_each_node and sees and args.process_index > args.local_process_index == 0])):
        raise TrainingError(f"The machines share the disk of {output}: leave save_on_each_node out.")
    blind = _blind(sees)
    told = f"{blind} does not see what the first one writes into {output}."
    if blind and spread:
        raise TrainingError(f"{told} With spread_hookpoints: true all machines must share the disk of output_dir.")
    if blind and not args.save_on_each_node and trainer.is_world_process_zero():
        warnings.warn(
            f"{told} If this run is interrupted it cannot go on. Let all machines share the disk of output_dir, or "
            "set save_on_each_node: true.",
            stacklevel=2,
        )


def _sees_the_first(trainer: Trainer, output: Path) -> bool:
    """By a new name, which no network disk can remember as absent."""
    mark = output / Share.of_training(trainer.args).of_first(f".seen-{secrets.token_hex(8)}")
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
