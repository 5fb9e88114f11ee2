"""Every file parser on files that are broken at random: what it takes, what it refuses, and where it crashes.

    python tests/fuzz_parsers.py --minutes 60 --seed 0 --output FOLDER

Each parser gets the same share of the time, in forked processes, so that what ends a process ends none but its own.
A crash is whatever is no error for people: not one of ours, and no `ValueError` or `OSError` with a reason that the
command line would show; a process that dies; and a parser that takes more than 10 seconds. The files that crashed one
lie in the output folder, by the parser's name.
"""

import argparse
import contextlib
import faulthandler
import itertools
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import conftest  # noqa: F401  # no network, one thread
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from mutations import Change, apply

from resa_hf import errors

HANG = 10  # s
_BATCH = 100  # cases in a process
_MEMORY = 2**31  # bytes that a process may take beyond what it has
OURS = tuple(kind for kind in vars(errors).values() if isinstance(kind, type))
KINDS = ("accepted", "ours", "shown", "crashes")
ENDED = ("hang", "signal")


@dataclass(frozen=True)
class Parser:
    """A file and what reads it.

    Args:
        name (`str`): of the parser.
        make (`Callable`): writes into an empty folder what is whole; made once for all parsers that have it.
        file (`str`): which file there is broken.
        parse (`Callable`): reads the folder.
        changes (`Callable`): the strategy of what is done to the file.
        plain (`bool`): whether any `ValueError` is one for people, as of settings that libraries check, too. Otherwise
            one of a library must name the file.
    """

    name: str
    make: Callable[[Path], None]
    file: str
    parse: Callable[[Path], object]
    changes: Callable[[], "st.SearchStrategy[list[Change]]"]
    plain: bool = False


@dataclass
class Outcome:
    """What came of a parser's cases; `crashes` by what they are, with where a file that did it lies."""

    counts: Counter[str] = field(default_factory=Counter)
    crashes: dict[str, Path] = field(default_factory=dict)


def verdict(parser: Parser, folder: Path) -> str:
    """Parses: `"accepted"`, `"ours"`, `"shown"`, or what crashed."""
    try:
        parser.parse(folder)
    except OURS as error:
        return "ours" if str(error) else "an error without a word"
    except (ValueError, OSError) as error:
        told = str(error) and (parser.plain or Path(parser.file).name in str(error) or _raised_here(error))
        return "shown" if told else _where(error)
    except SystemExit as error:  # argparse, which has told why
        return "shown" if error.code == 2 else _where(error)
    except BaseException as error:
        return _where(error)
    return "accepted"


def _raised_here(error: Exception) -> bool:
    return "resa_hf" in traceback.extract_tb(error.__traceback__)[-1].filename


def _where(error: BaseException) -> str:
    steps = traceback.extract_tb(error.__traceback__)
    own = [step for step in steps if "resa_hf" in step.filename]
    at = ", ".join(f"{Path(step.filename).name}:{step.lineno}" for step in (own[-1:] + steps[-1:]))
    return " ".join(f"{type(error).__name__} at {at}: {error}"[:240].split())


def fuzz(parser: Parser, whole: Path, crashed: Path, *, seconds: float, cases: int, number: int) -> Outcome:
    """Breaks a file again and again until the time or the cases are used up.

    Args:
        parser ([`Parser`]): which.
        whole (`Path`): what its `make` has written.
        crashed (`Path`): folder for the files that crash it.
        seconds (`float`), cases (`int`): the end, whichever comes first.
        number (`int`): the seed.
    """
    draw(parser, lambda changes: None, 2, 0)  # hypothesis makes tables of much, which forked processes inherit
    outcome, until = Outcome(), time.monotonic() + seconds
    batch = skipped = 0
    while time.monotonic() < until and sum(outcome.counts.values()) < cases:
        size = min(_BATCH, cases - sum(outcome.counts.values()) + skipped)
        with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
            told = _batch(parser, whole, Path(place), until, range(skipped, size), hash((number, batch)))
            # What ended its process did not end the batch: the cases behind it come next.
            is_over = not told or not told[-1][0].startswith(ENDED)
            batch, skipped = (batch + 1, 0) if is_over else (batch, skipped + len(told))
            for kind, file in told:
                if kind in KINDS:
                    outcome.counts[kind] += 1
                    continue
                outcome.counts["crashes"] += 1
                # Numbers and texts of a message differ from file to file.
                sort = re.sub(r"\d{3,}|'[^']*'", "…", kind)
                if sort not in outcome.crashes:
                    keep = (
                        crashed / re.sub(r"\W+", "-", parser.name) / f"{len(outcome.crashes)}-{Path(parser.file).name}"
                    )
                    keep.parent.mkdir(parents=True, exist_ok=True)
                    keep.write_bytes(file)
                    keep.with_name(f"{keep.name}.txt").write_text(kind)
                    outcome.crashes[sort] = keep
            if (Path(place) / "failed").is_file():
                raise RuntimeError(f"{parser.name}: {(Path(place) / 'failed').read_text()}")
    return outcome


def _batch(
    parser: Parser, whole: Path, place: Path, until: float, cases: range, number: int
) -> list[tuple[str, bytes]]:
    """Cases in a process of their own: what came of each, and the file, of those that crashed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            _work(parser, whole, place, until, cases, number, os.fdopen(writing, "w", buffering=1))
            code = 0
        except BaseException:
            (place / "failed").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    os.close(writing)
    told: list[tuple[str, bytes]] = []
    pending, end, spent, since = b"", "", 0.0, time.monotonic()
    while not end:
        if not select.select([reading], [], [], 1)[0]:
            # On a busy machine it may wait for a core.
            waited = time.monotonic() - since
            if waited > 12 * HANG or (waited > HANG and _seconds(child) - spent > HANG):
                end = f"{ENDED[0]}: more than {HANG} s"
            continue
        spent, since = _seconds(child), time.monotonic()
        received = os.read(reading, 2**16)
        *lines, pending = (pending + received).split(b"\n")
        for line in map(bytes.decode, lines):
            told.append((line, b"" if line in KINDS else _last(place)))
        if not received:
            end = "ended"
    os.close(reading)
    if end != "ended":
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        how = end if end != "ended" else f"{ENDED[1]}: {signal.Signals(os.WTERMSIG(status)).name}"
        told.append((how, _last(place)))
    return told


def _seconds(process: int) -> float:
    """Of a core that it has used."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _last(place: Path) -> bytes:
    return (place / "case").read_bytes() if (place / "case").exists() else b""


def _work(parser: Parser, whole: Path, place: Path, until: float, cases: range, number: int, tell: TextIO) -> None:
    _quiet(place)
    drawn = itertools.count()

    def each(changes: list[Change]) -> None:
        if next(drawn) < cases.start or time.monotonic() > until:
            return
        folder = place / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder, symlinks=True)
        broken = apply((whole / parser.file).read_bytes(), changes)
        (folder / parser.file).write_bytes(broken)
        (place / "case").write_bytes(broken)
        tell.write(verdict(parser, folder) + "\n")

    draw(parser, each, cases.stop, number)


def draw(parser: Parser, each: Callable[[list[Change]], None], cases: int, number: int) -> None:
    """Calls `each` with changes of the parser's file, drawn by hypothesis."""
    chosen = settings(
        max_examples=cases, database=None, deadline=None, phases=[Phase.generate], derandomize=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    seed(number)(chosen(given(parser.changes())(each)))()


def _quiet(place: Path) -> None:
    """What parsers print goes nowhere, and a bomb goes off as an error."""
    warnings.simplefilter("ignore")
    faulthandler.disable()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.chdir(place)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def make_all(parsers: Sequence[Parser], root: Path) -> dict[Callable[[Path], None], Path]:
    """What is whole, by what makes it; every parser accepts it as it is."""
    made: dict[Callable[[Path], None], Path] = {}
    for parser in parsers:
        if parser.make not in made:
            made[parser.make] = root / f"{len(made)}-{parser.make.__name__}"
            made[parser.make].mkdir(parents=True)
            parser.make(made[parser.make])
        with tempfile.TemporaryDirectory(prefix="fuzz-") as copy:
            shutil.copytree(made[parser.make], Path(copy, "whole"), symlinks=True)
            with contextlib.chdir(copy):
                parser.parse(Path(copy, "whole"))
    return made


def table(outcomes: dict[str, Outcome]) -> str:
    """The counts as a table in Markdown, and below it the crashes."""
    head = ["parser", "cases", "accepted", "our errors", "other errors for people", "crashes"]
    rows = [[name, sum(one.counts.values()), *(one.counts[kind] for kind in KINDS)] for name, one in outcomes.items()]
    rows.append(["together", *(sum(row[column] for row in rows) for column in range(1, len(head)))])
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [[row[0], *(f"{count:,}" for count in row[1:])] for row in rows]
    crashes = [f"{name}: {what} ({at})" for name, one in outcomes.items() for what, at in one.crashes.items()]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *crashes])


def main() -> None:
    """Runs it."""
    from parser_table import PARSERS

    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--minutes", type=float, default=60.0, help="for all parsers together")
    asked.add_argument("--cases", type=int, default=10**9, help="of each parser at most")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--only", default="", help="parsers in whose name this regular expression is found")
    asked.add_argument("--output", type=Path, default=Path("fuzz-crashes"))
    args = asked.parse_args()
    parsers = [parser for parser in PARSERS if re.search(args.only, parser.name)]
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-whole-") as root:
        made = make_all(parsers, Path(root))
        until = time.monotonic() + 60 * args.minutes
        for number, parser in enumerate(parsers):
            seconds = (until - time.monotonic()) / (len(parsers) - number)
            outcomes[parser.name] = fuzz(
                parser, made[parser.make], args.output, seconds=seconds, cases=args.cases, number=args.seed
            )
            print(
                parser.name, dict(outcomes[parser.name].counts), *outcomes[parser.name].crashes, flush=True, sep="\n  "
            )
    print(table(outcomes))
    sys.exit(any(one.counts["crashes"] for one in outcomes.values()))


if __name__ == "__main__":
    main()
