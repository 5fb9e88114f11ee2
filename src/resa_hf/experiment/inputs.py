"""Whether the models and SAEs that a run reads are still those that it was started with."""

import hashlib
import os
from pathlib import Path

from ..errors import DataError
from ..provenance import Revisions
from .folder import is_first_process, read_json, write_json

INPUTS = "inputs.json"
_NAMES = ("config.json", "adapter_config.json", "cfg.json", "tokenizer.json")
_WHOLE = 64 * 2**20  # of a larger file this much is read, in pieces: another training changes nearly every number
_PIECE = 4096


def check_inputs(folder: Path, revisions: Revisions) -> None:
    """
    Writes down in a folder what a run reads, unless that is there and has changed: one half of a training with one
    model or SAE and the other half with another would be the work of neither.

    Only the first of several processes looks.

    Args:
        folder (`Path`): the output folder.
        revisions (`dict`): by role what is read, as `resa_hf.provenance` tells it.

    Raises:
        `DataError`: if files or commit are others than when the folder was started.
    """
    if not is_first_process():
        return
    path = folder / INPUTS
    before = read_json(path) if path.is_file() else {}
    found = {role: _state(str(one["name"]), one["commit"]) for role, one in revisions.items()}
    for role, state in found.items():
        if (then := before.get(role)) not in (None, state) and state is not None:
            raise DataError(
                f"{role}: {revisions[role]['name']} has changed since the run in {folder} was started: {then} then, "
                f"{state} now. Put back what was there, or choose another --output_dir, or delete the folder."
            )
    write_json(path, before | {role: state for role, state in found.items() if state is not None})


def _state(name: str, commit: str | None) -> str | None:
    """The commit of a repository, a hash of the files of a folder; `None` for what ships here, or is not known."""
    if commit is not None or not os.path.isdir(name):
        return commit
    digest = hashlib.sha256()
    for path in sorted(Path(name).rglob("*")):
        of_a_checkpoint = any(part.startswith((".", "checkpoint-")) for part in path.relative_to(name).parts)
        if (path.suffix == ".safetensors" or path.name in _NAMES) and path.is_file() and not of_a_checkpoint:
            digest.update(f"{path.relative_to(name).as_posix()} {path.stat().st_size}\n".encode(errors="replace"))
            _add(digest, path)
    return digest.hexdigest()[:32]


def _add(digest: "hashlib._Hash", path: Path) -> None:
    size = path.stat().st_size
    step = max(1, size // _WHOLE) * _PIECE
    with path.open("rb", buffering=0) as file:
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(_PIECE))
