"""Checkpoints that are whole or not there, and the newest of them that has stayed whole."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .guards import check_finite
from .writing import writing

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

PREFIX = "checkpoint-"
FILES = "files.json"  # of every other file in a checkpoint, its size and digest
DRAFTS = ".unfinished"
TORN = "torn-"


class WholeCheckpoints(_Base):
    """
    A mixin for a [`~transformers.Trainer`] whose checkpoints survive whatever ends the process, at any moment.

    One is written into `.unfinished/`, with the digests of its files in `files.json`, flushed to the disk, and only
    then renamed to `checkpoint-<step>`. Older ones go after it stands, by a rename again, so that no half of one is
    ever found under its name. [`newest_whole`] finds the one to resume from. No checkpoint is written with weights
    that are not finite.
    """

    _draft: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._draft) if self._draft is not None else super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer`] does.

        Raises:
            `OSError`: if it cannot be written; the message says why.
        """
        with writing(Path(output_dir or str(self.args.output_dir))):
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        check_finite(self)
        output = Path(self._get_output_dir(trial))
        name = f"{PREFIX}{self.state.global_step}"
        draft, final = output / DRAFTS / name, output / name
        if self.args.should_save:
            shutil.rmtree(output / DRAFTS, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._draft = draft.parent
        try:
            with writing(final):
                super()._save_checkpoint(model, trial)
        except Exception:
            # On a disk that is full it takes the room that mends it.
            shutil.rmtree(draft, ignore_errors=True)
            raise
        finally:
            self._draft = None
        if self.state.best_model_checkpoint == str(draft):
            self.state.best_model_checkpoint = str(final)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with writing(final):
                self.state.save_to_json(str(draft / "trainer_state.json"))  # where it names the best checkpoint
                _seal(draft)
                _replace(draft, final)
                self._forget_old(output, final)
        self.accelerator.wait_for_everyone()
        # Of another machine that shares no disk: its own processes' states.
        if self.args.local_process_index == 0 and draft.is_dir():
            _seal(draft)
            _replace(draft, final)
        self.accelerator.wait_for_everyone()

    def _forget_old(self, output: Path, written: Path) -> None:
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        *old, newest = checkpoints(output)
        # What was just written is not the newest where one of another run, or a torn one, lies there.
        kept = {written, newest, *([Path(best)] if (best := self.state.best_model_checkpoint) else [])}
        surplus = len(old) + 1 - max(limit, len(kept))
        for path in [path for path in old if path not in kept][: max(surplus, 0)]:
            _remove(path)


def checkpoints(output: Path) -> list[Path]:
    """A run's checkpoints by step, whole or not."""
    found = (path for path in output.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal())
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def newest_whole(output: Path) -> Path | None:
    """
    The newest checkpoint all of whose files are as they were written.

    Args:
        output (`Path`): the run's output folder.

    Returns:
        `Path` or `None`: what to resume from.
    """
    for path in reversed(checkpoints(output)):
        if damage(path) is None:
            return path
    return None


def set_torn_aside(output: Path) -> None:
    """
    Renames checkpoints that are newer than the newest whole one to `torn-checkpoint-<step>`, and says what is wrong.

    They would count among those that `save_total_limit` keeps, in place of whole ones.

    Args:
        output (`Path`): the run's output folder.
    """
    for path in reversed(checkpoints(output)):
        found = damage(path)
        if found is None:
            return
        aside = path.with_name(f"{TORN}{path.name}")
        print(f"{path} is not whole ({found}); it is now {aside.name}, and the one before it is taken.", flush=True)
        _replace(path, aside)


def damage(checkpoint: Path) -> str | None:
    """
    What is wrong with a checkpoint.

    Args:
        checkpoint (`Path`): its folder.

    Returns:
        `str` or `None`: the first file that is missing, cut short or changed, and which of these; `None` if all are as
        they were written.
    """
    try:
        listed = json.loads((checkpoint / FILES).read_text(encoding="utf-8"))
        known = {str(name): (int(size), str(digest)) for name, (size, digest) in listed.items()}
    except FileNotFoundError:
        return f"{FILES} is missing"
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return f"{FILES} cannot be read"
    for name, (size, digest) in known.items():
        path = checkpoint / name
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes, and had {size:,}"
            if _digest(path) != digest:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error.strerror}"
        except ValueError:  # no name of a file
            return f"{FILES} cannot be read"
    return None


def _seal(folder: Path) -> None:
    """Lists the files with their digests, and waits until everything is on the disk."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    listed = {name: (path.stat().st_size, _digest(path)) for name, path in files.items() if name != FILES}
    (folder / FILES).write_text(json.dumps(listed, indent=1))
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(folder: Path, target: Path) -> None:
    """Renames a folder, and waits until that is on the disk; what has the name already goes."""
    if target.is_dir():
        _remove(target)
    folder.rename(target)
    _flush(target.parent)


def _remove(folder: Path) -> None:
    """Takes a folder's name away first: a process that is killed here leaves nothing that looks like a checkpoint."""
    bin_ = folder.parent / DRAFTS / f"old-{folder.name}"
    bin_.parent.mkdir(exist_ok=True)
    shutil.rmtree(bin_, ignore_errors=True)
    folder.rename(bin_)
    shutil.rmtree(bin_, ignore_errors=True)
