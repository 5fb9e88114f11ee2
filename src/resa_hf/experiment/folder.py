"""Where a run's files lie, and how they are written."""

import contextlib
import json
import os
import reprlib
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import DataError, ResaError
from ..writing import writing
from .arms import BASE, Arm, Candidate

# What runs of a sweep share lies beside them in this folder, and each has a file that names its part of it.
SHARED = "shared"
_SHARED_NAMES = f"{SHARED}.json"
_ANEW = "Delete it, and start the same command again: it makes it anew."
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class RunFolder:
    """The paths in a run's output folder, and in those that it shares with other runs of a sweep.

    Args:
        root (`Path`): the output folder.
        stage1 (`Path`, *optional*): where data and SAEs lie. `None`: in `root`.
        base (`Path`, *optional*): where the untouched base's answers lie. `None`: in `root`.
        points (`int`, *optional*): how many runs the sweep has that it is one of.
    """

    root: Path
    stage1: Path | None = None
    base: Path | None = None
    points: int | None = None

    @classmethod
    def in_sweep(cls, root: Path, stage1: str, base: str, points: int | None = None) -> "RunFolder":
        """The folder of a sweep's run, which shares folders of these names."""
        # A name that somebody wrote must not lead out of the sweep.
        shared, names = root.parent / SHARED, [Path(stage1).name, Path(base).name]
        if not all(name.strip(".") for name in names):
            raise ValueError(f"{names} are no names of folders")
        return cls(root, shared / names[0], shared / names[1], points)

    @classmethod
    def open(cls, root: Path) -> "RunFolder":
        """The folder of a run that was started before, alone or in a sweep."""
        path = root / _SHARED_NAMES
        if not path.is_file():
            return cls(root)
        with reading_files(path):
            return cls.in_sweep(root, **read_json(path))

    def note_shared(self) -> None:
        """Writes down what it shares, as [`RunFolder.open`] reads it."""
        if self.stage1 is not None and self.base is not None:
            shared = {"stage1": self.stage1.name, "base": self.base.name, "points": self.points}
            write_json(self.root / _SHARED_NAMES, shared)

    @property
    def roots(self) -> list[Path]:
        """All folders with files of the run."""
        return [place for place in (self.root, self.stage1, self.base) if place is not None]

    def glob(self, pattern: str) -> Iterator[Path]:
        """The run's files, shared ones included."""
        return chain.from_iterable(place.glob(pattern) for place in self.roots)

    def data(self, name: str) -> Path:
        """A packed dataset (`train`, `held_out`), or `questions.json` and `data.json`."""
        return (self.stage1 or self.root) / "data" / name

    def sae(self, source: str, seed: int) -> Path:
        """The folder of the SAEs that were trained on a source."""
        return (self.stage1 or self.root) / "sae" / source / f"seed-{seed}"

    def text(self, text: str, seed: int) -> Path:
        """The folder of what a model, `"source"` or `"target"`, wrote to the training questions."""
        return self.root / "text" / text / f"seed-{seed}"

    def training(self, arm: Arm, candidate: Candidate, seed: int) -> Path:
        """The folder of one training: arm, learning rate and seed."""
        return self.root / "arms" / arm.slug / candidate.folder_name / f"seed-{seed}"

    def arm(self, arm: Arm, candidate: Candidate | None, seed: int) -> Path:
        """The folder of its adapter and answers; `candidate` is `None` where nothing is trained."""
        if candidate is None:
            root = self.base if self.base is not None and arm == BASE else self.root
            return root / "arms" / arm.slug / "untrained" / f"seed-{seed}"
        place = self.training(arm, candidate, seed)
        return place if candidate.step is None else place / f"step-{candidate.step}"


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes on other machines, which may have the same id, write into one folder, too.
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with writing(path), draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that is either whole or not there."""
    write_whole(path, json.dumps(content, indent=1))


def read_json(path: Path, kind: type = dict) -> Any:
    """Reads a file that `write_json` wrote.

    Args:
        path (`Path`): the file.
        kind (`type`, *optional*, defaults to `dict`): what it must hold.

    Raises:
        `DataError`: if it is damaged.
        `OSError`: if it is not there.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or brackets without an end
        raise DataError(f"{path} is damaged: {error}. {_ANEW}") from error
    if not isinstance(content, kind):
        raise DataError(f"{path} is damaged: it holds {reprlib.repr(content)}, and no {kind.__name__}. {_ANEW}")
    return content


@contextlib.contextmanager
def reading_files(place: Path) -> Iterator[None]:
    """Says that files are damaged where the block finds in them something else than was written.

    Args:
        place (`Path`): the file, or the folder of the files that the block reads.

    Raises:
        `DataError`: in the place of what a missing key, or a text where a number should be, raises.
    """
    try:
        yield
    except ResaError:
        raise
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        what = "A file in " if place.is_dir() else ""
        raise DataError(
            f"{what}{place} is damaged, or of another version of resa-hf ({type(error).__name__}: {error}). {_ANEW} "
            "With RESA_HF_TRACE=1 in the environment it shows where it was read."
        ) from error


def check_writable(folder: Path) -> None:
    """Makes a folder and writes into it, before any work is put into what is to be written there.

    Raises:
        `DataError`: if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "it is there, and no folder" if isinstance(error, FileExistsError) else error.strerror
        raise DataError(f"The output folder {folder} cannot be written: {reason}.") from error


def is_first_process() -> bool:
    """Whether this is the one of several launched together that writes into their folder."""
    return not int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No other command works in the folder while the block runs. The operating system frees it when this process dies,
    however it dies. Of several processes that were launched together, the first holds it for all.

    Args:
        folder (`Path`): the output folder, made if it is not there.

    Raises:
        `DataError`: if another command is at work there, naming it, or the folder cannot be written.
    """
    if not is_first_process():
        yield
        return
    check_writable(folder)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise DataError(
            f"Another command is at work in {folder}{_newest_start(folder)}. Wait until it ends, stop it, or choose "
            "another --output_dir."
        ) from None
    with lock:
        yield


def _newest_start(folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        start = read_json(folder / MANIFEST, list)[-1]
        return f" (process {start['process']} on {start['host']}, started {start['started']})"
    return ""


def claim(folder: Path, settings: dict[str, Any], free: tuple[str, ...] = ()) -> None:
    """Writes settings.json into a folder, unless what is there was started with other settings.

    Args:
        folder (`Path`): the output folder.
        settings (`dict`): sections of settings, or single ones.
        free (`tuple[str, ...]`): sections that may differ, because nothing was made with them yet.

    Raises:
        `DataError`: if the folder holds something that was started with other settings, or cannot be written.
    """
    check_writable(folder)
    check_settings(folder, settings, free)
    write_json(folder / "settings.json", settings)


def check_settings(folder: Path, settings: dict[str, Any], free: tuple[str, ...] = ()) -> None:
    """Raises what `claim` does where the folder holds other settings, and writes nothing."""
    path = folder / "settings.json"
    wanted = _flat(settings)
    there = _flat(read_json(path)) if path.is_file() else wanted
    different = {key for key in wanted.keys() | there.keys() if wanted.get(key) != there.get(key)}
    # How many processes there are, and how the folder is spelled, changes nothing in the results.
    different -= {"run.processes", "run.output_dir", "settings.output_dir"}
    different = {key for key in different if key.partition(".")[0] not in free}
    if different:
        raise DataError(
            f"{folder} holds a run with other settings ({', '.join(sorted(different))}). "
            "Choose another --output_dir, or delete the folder."
        )


def _flat(plain: dict[str, Any]) -> dict[str, Any]:
    """`{"run": {"seeds": [0]}, "arms": []}` as `{"run.seeds": [0], "arms": []}`."""
    return {
        f"{section}.{name}".rstrip("."): value
        for section, content in plain.items()
        for name, value in (content.items() if isinstance(content, dict) else [("", content)])
    }
