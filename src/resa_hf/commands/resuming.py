"""Going on from the last checkpoint."""

from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint


def last_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint in a folder, or `None`."""
    return get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
