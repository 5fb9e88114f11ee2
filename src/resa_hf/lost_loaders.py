"""Processes that load data for a trainer, and were killed."""

import contextlib
from collections.abc import Iterator

from transformers import Trainer

from .errors import TrainingError


@contextlib.contextmanager
def loaders_explained(trainer: Trainer) -> Iterator[None]:
    """
    Tells that a data loader's process was killed, where the block, which trains, ends by it.

    Args:
        trainer ([`~transformers.Trainer`]): trains in the block.

    Raises:
        `TrainingError`: with the setting to change.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        workers = trainer.args.dataloader_num_workers
        # Its pipe may break before torch looks at the process.
        if not workers or (isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)):
            raise
        raise TrainingError(
            f"A process that loads data was killed at step {trainer.state.global_step + 1} ({error}). Where nobody "
            f"did that, the system has, because memory was full: set dataloader_num_workers: {workers // 2} (now "
            f"{workers}). A rerun goes on from the last checkpoint."
        ) from error
