"""What cannot be written, told with its place, the reason, and the room that is left."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

# Of files, and not of the network, whose errors are `OSError`s, too.
_OF_FILES = {"ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE"}
_OF_FILES |= {"ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "ELOOP", "ENAMETOOLONG"}
_ERRNOS = {getattr(errno, name) for name in _OF_FILES}
# torch's writer of archives has no error of its own for a file that ends too early.
_TORCH_SAYINGS = ("inline_container", "PytorchStreamWriter")
_PART = "a part of a file is missing, as on a full disk, behind a quota or a limit on file sizes"


class WritingError(OSError):
    """Something could not be written; the message says what, and why."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """
    Tells what could not be written where the block fails to: Python's own errors name no file once it is open, and
    torch and safetensors have others.

    Args:
        path (`Path`): the file or folder that the block writes.

    Raises:
        `WritingError`: with the path, the reason, and the room on its disk.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        told = WritingError(
            f"{path} cannot be written: {reason}{_room(path)}. What was finished before is kept: once that is mended, "
            "the same command goes on from there."
        )
        told.errno = error.errno if isinstance(error, OSError) else errno.EIO
        raise told from error


def _reason(error: Exception) -> str | None:
    if isinstance(error, WritingError):
        return None
    if isinstance(error, OSError):
        return error.strerror if error.errno in _ERRNOS else None
    if isinstance(error, SafetensorError):
        _, found, reason = str(error).rpartition("I/O error: ")
        return reason.partition(" (os error")[0] if found else None
    return _PART if any(saying in str(error) for saying in _TORCH_SAYINGS) else None


def _room(path: Path) -> str:
    """Free room where a path lies or would lie, if that can be told."""
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            return f" ({shutil.disk_usage(folder).free / 1e6:,.1f} MB are free there)"
    return ""
