"""Processes that do a part of a command's work, and must not go on without it.

Needs the standard library alone, so that a command watches from its first line on.
"""

import multiprocessing
import os
import threading
import time

_PAUSE = 0.5  # seconds between two looks


def end_with_parent() -> None:
    """
    Ends this process, at any moment, when the process that started it has ended.

    A command that gets SIGKILL cannot tell its workers, nor can torchrun. They would go on, and write into a folder
    where the command, started again, works already.
    """
    started_by = os.getppid()  # another one as soon as that has ended
    worked_for = multiprocessing.parent_process()

    def watch() -> None:
        if worked_for is not None:
            worked_for.join()
        while worked_for is None and os.getppid() == started_by:
            time.sleep(_PAUSE)
        # As SIGKILL does: every file of ours is written whole or not at all.
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()
