"""A record of the faults that tests try: what was told, and what was kept.

With RESA_FAULTS=FILE in the environment each test adds its lines to FILE; `python tests/fault_table.py FILE` prints
them as a table in Markdown.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def fault() -> Callable[..., None]:
    """`fault("full disk while ...", told=message, kept="what was kept, and how the run went on")`.

    `told` is the message as it was printed or raised, not as it should read.
    """

    def record(what: str, *, told: object, kept: str) -> None:
        assert str(told).strip() and kept, f"nothing was told, or nothing kept: {what}"
        place = os.environ.get("RESA_FAULTS")
        if place:
            line = json.dumps({"fault": what, "told": str(told), "kept": kept}) + "\n"
            # One write to a file opened to append: tests of several processes do not mix.
            descriptor = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(descriptor, line.encode())
            os.close(descriptor)

    return record


def table(lines: list[str]) -> str:
    """The lines of a record as a table, sorted by fault; of one tried again the last stands."""
    tried = {row["fault"]: row for row in map(json.loads, lines)}
    rows = [
        [str(number), *(_cell(tried[what][key]) for key in ("fault", "told", "kept"))]
        for number, what in enumerate(sorted(tried), 1)
    ]
    return "\n".join(
        f"| {' | '.join(row)} |" for row in [["", "fault", "told", "kept"], ["---:", *["---"] * 3], *rows]
    )


def _cell(text: str) -> str:
    # Folders of a test tell a reader nothing.
    text = re.sub(r"/\S*?pytest-of-[^/\s]+/pytest-\d+/(?:popen-gw\d+/)?[^/\s'\",;:]+", "DIR", text)
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(table(Path(sys.argv[1]).read_text().splitlines()))
