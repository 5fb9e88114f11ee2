"""Several processes that work through one list of tasks: they know of each other by locked files alone.

The operating system releases a file's lock when the process that holds it dies, however it dies, and the others go on
with what it left. All must see one file system, which must know locks (NFS does; Lustre if mounted with `flock`).
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from .folder import write_whole


@dataclass(frozen=True)
class Task:
    """What one process at a time may do. Once it is done, doing it again must do nothing, and what a killed process
    left of it must not be in the way.

    Args:
        name (`str`): also its lock's, as a file's name. Tasks of one name are ways to the same thing: one that is
            done is enough.
        run (`Callable[[], None]`): does it; a `ValueError` or `OSError` is a failure that is written down.
        needs (`frozenset[str]`): tasks, earlier in the list, that must be done before.
    """

    name: str
    run: Callable[[], None]
    needs: frozenset[str] = frozenset()


def work_through(tasks: Sequence[Task], places: Path, since: float, pause: float = 1.0) -> dict[str, str]:
    """Does what nobody else is doing, until everything is done or has failed, by whichever process.

    Args:
        tasks (sequence of [`Task`]): the same in every process.
        places (`Path`): the folder of the locks.
        since (`float`): `time.time()` of the start: what failed after it, in another process, is not tried again.
        pause (`float`, *optional*, defaults to `1.0`): seconds between two looks at what others hold.

    Returns:
        `dict[str, str]`: what failed, and why.
    """
    places.mkdir(parents=True, exist_ok=True)
    done: set[str] = set()
    failed: dict[str, str] = {}
    waiting = list(tasks)
    while waiting:
        left = len(waiting)
        for task in list(waiting):
            hopeless = failed.keys() - done - {other.name for other in waiting}
            if task.name in done:
                failure: str | None = ""
            elif lacking := sorted(task.needs & hopeless):
                failure = failed[lacking[0]]
            elif task.needs <= done:
                failure = _attempt(task, places, since)
            else:
                continue
            if failure is None:
                continue
            if failure:
                failed[task.name] = failure
            else:
                done.add(task.name)
            waiting.remove(task)
        if len(waiting) == left:
            time.sleep(pause)
    return {name: why for name, why in failed.items() if name not in done}


def _attempt(task: Task, places: Path, since: float) -> str | None:
    """Why it failed, empty if it did not; `None` where another process is at it."""
    marker = places / f"{task.name}.failed"
    try:
        with FileLock(places / f"{task.name}.lock", timeout=0):
            if marker.is_file() and marker.stat().st_mtime >= since:
                # An empty reason would pass for success.
                return marker.read_text(encoding="utf-8", errors="replace") or f"{marker} does not say why"
            try:
                task.run()
            except (ValueError, OSError) as error:
                write_whole(marker, str(error) or type(error).__name__)
                failure = marker.read_text()
            else:
                marker.unlink(missing_ok=True)
                return ""
        gc.collect()  # the models of what failed refer to themselves, and the next task needs their room
        return failure
    except Timeout:
        return None
