"""What to do where the extra `eval` is missing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def eval_extra() -> Iterator[None]:
    """Around the import of what needs lighteval.

    Raises:
        `ValueError`: instead of a `ModuleNotFoundError`, with the command that installs it.
    """
    # lighteval imports GitPython, which refuses to be imported where there is no git.
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}. Benchmarks need the extra: pip install 'resa-hf[eval]'.") from error
