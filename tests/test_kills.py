"""SIGKILL at 40 random moments: the command started again goes on from what was whole, to the bits of a whole run.

With RESA_KILLS=FILE in the environment each case adds a line of a Markdown table to FILE.
"""

import hashlib
import json
import os
import random
import re
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from kill_commands import (
    EVERY,
    STEPS,
    Command,
    code_of,
    finish,
    kill,
    log_of,
    make_inputs,
    operations_of,
    start,
    workers_of,
)  # fmt: skip
from safetensors.torch import load_file

DRAFTS, REPORT, MARKED = ".unfinished", "report.json", 1e6
# Not the same in two runs. For `train_loss` Trainer divides the losses since it was started by all steps.
_TIMES = re.compile("seconds|runtime|per_second|step_time|costs|device|versions|train_loss")


@dataclass(frozen=True)
class Moment:
    """When a command is killed.

    Args:
        kind (`str`):
            `"time"`: some share of the time from its first file to its report. `"operation"`: before one of its file
            operations, if it is forked. `"writing"`: so too, before one of those that write a checkpoint or answers;
            if it is not forked, up to 30 ms after some checkpoint was begun.
        whom (`str`): `"all"` of its processes, the `"parent"`, or `"one"` of its workers.
        earliest (`float`): the least share.
    """

    kind: str
    whom: str = "all"
    earliest: float = 0.0


PARENT, ONE = Moment("time", "parent", 0.3), Moment("time", "one", 0.3)
TIME, OPERATION, WRITING = Moment("time"), Moment("operation"), Moment("writing")
PLAN = [
    (Command("train-sae", 1), [TIME, TIME, TIME, WRITING, WRITING, OPERATION]),
    (Command("train-sae", 2, launched=True), [TIME, WRITING, PARENT, ONE]),
    (Command("tune", 1), [TIME, TIME, TIME, WRITING, WRITING, OPERATION]),
    (Command("tune", 2, launched=True), [TIME, WRITING, PARENT, ONE]),
    (Command("train-rl", 1), [TIME, TIME, WRITING, OPERATION]),
    (Command("train-rl", 2, launched=True), [TIME, WRITING, PARENT]),
    (Command("sweep", 1), [TIME, TIME, WRITING, OPERATION]),
    (Command("sweep", 2), [TIME, PARENT, ONE]),
    (Command("evaluate", 1), [TIME, TIME, WRITING, OPERATION]),
    (Command("run", 2), [TIME, PARENT]),
]  # fmt: skip
CASES = [(command, moment) for command, moments in PLAN for moment in moments]


@dataclass(frozen=True)
class Whole:
    """An undisturbed run: its inputs and results, the seconds from its first file to its report, its operations."""

    inputs: Path
    results: dict
    seconds: float
    operations: list


@pytest.fixture(scope="module")
def run_whole(tmp_path_factory):
    """Runs a command undisturbed, once."""
    inputs = tmp_path_factory.mktemp("inputs") / "inputs"
    make_inputs(inputs)
    done = {}

    def run(command):
        if command not in done:
            output = tmp_path_factory.mktemp("whole") / "whole"
            process = start(command, inputs, output)
            wait_for(process, output.exists, output)
            since = time.monotonic()
            wait_for(process, (output / REPORT).is_file, output)
            seconds = time.monotonic() - since
            assert code_of(process, 500) == 0, log_of(output)[-4000:]
            operations = operations_of(output) if command.forked else []
            done[command] = Whole(inputs, results(output), seconds, operations)
        return done[command]

    return run


def wait_for(process, found, output):
    """Waits until something is found, or the command has ended: which of these it was."""
    deadline = time.monotonic() + 300
    while not (there := found()):
        if code_of(process, 0) is not None:
            return False
        assert time.monotonic() < deadline, log_of(output)[-4000:]
        time.sleep(0.001)
    return bool(there)


def killed(command, moment, whole, output, rng):
    """Runs a command and kills it; returns the moment in words, or `None` if the command was done before."""
    share = rng.uniform(moment.earliest, 0.95)
    if command.forked and moment.kind != "time":
        return killed_at_operation(command, moment, whole, output, share)
    process = start(command, whole.inputs, output)
    wait_for(process, output.exists, output)
    if moment.kind == "time":
        seconds = share * whole.seconds
        since = time.monotonic()
        wait_for(process, lambda: time.monotonic() > since + seconds or (output / REPORT).is_file(), output)
        told = f"at {share:.0%} of the time, {seconds:.1f} s after its first file"
    else:
        step, pause = EVERY * rng.randint(1, (STEPS - 1) // EVERY), rng.uniform(0, 0.03)
        wait_for(process, lambda: any(output.glob(f"**/{DRAFTS}/checkpoint-{step}")), output)
        time.sleep(pause)
        told = f"{1000 * pause:.0f} ms after checkpoint-{step} was begun"
    worker = rng.randrange(2)
    if moment.whom == "one":
        wait_for(process, lambda: len(workers_of(process)) == 2, output)
        told += f", worker {worker}"
    if (output / REPORT).is_file() or code_of(process, 0) is not None:
        assert code_of(process, 500) == 0, log_of(output)[-4000:]
        return None
    kill(process, moment.whom, worker)
    return told


def killed_at_operation(command, moment, whole, output, share):
    numbers = [
        number
        for number, (_, path) in enumerate(whole.operations, start=1)
        if moment.kind == "operation" or f"/{DRAFTS}/" in path or path.endswith(".jsonl")
    ]
    at = numbers[int(share * len(numbers))]
    code = code_of(start(command, whole.inputs, output, at), 500)
    assert code in (0, -9), log_of(output)[-4000:]
    event, path = operations_of(output)[-1]
    told = f"before file operation {at} of {len(whole.operations)}: {event} {Path(path).relative_to(output)}"
    return told if code else None


def assert_whole(checkpoint):
    """Nothing under a checkpoint's name is anything less, whenever the process died."""
    listed = json.loads((checkpoint / "files.json").read_text())
    files = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    assert listed.keys() | {"files.json"} == files.keys() - {"seconds.json"}
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json"} < listed.keys()
    for name, (_, digest) in listed.items():
        assert hashlib.blake2b(files[name].read_bytes()).hexdigest()[:32] == digest, (checkpoint, name)
    assert checkpoint.name == f"checkpoint-{json.loads(files['trainer_state.json'].read_text())['global_step']}"


def report_of(place):
    """The report of a training whose checkpoints lie here, or `None` if it is not finished."""
    home = place.parent if place.name == "run" else place
    found = [path for name in ("stage1", "tuning", "report") if (path := home / f"{name}.json").is_file()]
    return found[0] if found else None


def newest_checkpoints(output):
    """By the folder of each unfinished training its newest checkpoint's step."""
    found = {}
    for checkpoint in output.glob("**/checkpoint-*"):
        if DRAFTS not in checkpoint.parts and report_of(checkpoint.parent) is None:
            assert_whole(checkpoint)
            step = int(checkpoint.name.partition("-")[2])
            found[checkpoint.parent] = max(step, found.get(checkpoint.parent, 0))
    return found


def stores(output):
    """The whole lines of the answers that an unfinished evaluation has kept."""
    kept = {}
    for path in [*output.glob("**/partial/*.jsonl"), *output.glob("models/*/completions/*.jsonl")]:
        if not (path.parents[1] / "answers" / path.stem).is_dir():
            content = path.read_text()
            kept[path] = [json.loads(line) for line in content[: content.rfind("\n") + 1].splitlines()]
    return kept


def finished(output, steps):
    """The files of finished work."""
    folders = [path.parent for name in ("data", "stage1") for path in output.glob(f"**/{name}.json")]
    folders += [path.parent / "adapter" for path in output.glob("**/tuning.json")]
    folders += [path for path in output.glob("**/answers/*") if not path.name.startswith(".")]
    last = steps.get(output, 0)  # of train-rl: adapters and completions of the steps until its checkpoint
    folders += [path for path in output.glob("steps/*") if int(path.name) <= last]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file() and "run" not in file.parts]
    files += [*output.glob("**/tuning.json"), *output.glob("**/arms/**/movement.json")]
    files += [path for point in output.glob("*/report.png") for path in point.parent.glob("report.*")]
    files += [path for path in output.glob("completions/*.parquet") if int(path.stem.rpartition("_")[2]) <= last]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def mark(steps, kept):
    """Times that no run takes, which are added up into its report if it goes on from what they stand beside."""
    for place, step in steps.items():
        (place / f"checkpoint-{step}" / "seconds.json").write_text(str(step * MARKED))
    for path, (head, *lines) in ((path, lines) for path, lines in kept.items() if lines):
        whole = "".join(json.dumps(line) + "\n" for line in [head, *(line | {"seconds": MARKED} for line in lines)])
        content = path.read_text()
        path.write_text(whole + content[content.rfind("\n") + 1 :])


def assert_went_on(output, steps, kept):
    """Each training from its newest checkpoint, each evaluation with all answers that were kept."""
    for place, step in steps.items():
        seconds = json.loads(report_of(place).read_text())["seconds"]
        assert seconds // MARKED == step, (place, step, seconds)
    for path, lines in kept.items():
        if path.is_file():
            _, *now = (json.loads(line) for line in path.read_text().splitlines())
            seconds = sum(line["seconds"] for line in now)
            assert max(Counter(tuple(row[:2]) for line in now for row in line["completions"]).values()) == 1
        else:
            (told,) = (path.parents[1] / "answers" / path.stem).glob("*.jsonl")
            seconds = json.loads(told.read_text().splitlines()[0])["seconds"]
        assert seconds // MARKED == max(len(lines) - 1, 0), (path, len(lines), seconds)


def results(output):
    """All that a run leaves to be used: weights, answers and figures, without times and its own place."""
    found = {}
    for path in (path for path in output.rglob("*") if path.is_file()):
        name = path.relative_to(output).as_posix()
        if re.search(r"(^|/)(checkpoint-\d+|run|partial|results|details|\..*)/", name):
            continue
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            found[name] = {key: (value.dtype, value.shape, value.numpy().tobytes()) for key, value in tensors.items()}
        elif path.suffix == ".parquet":
            found[name] = pd.read_parquet(path).to_dict("list")
        elif path.name in ("report.json", "tuning.json", "stage1.json", "movement.json", "data.json"):
            found[name] = without_times(json.loads(path.read_text().replace(str(output), "OUTPUT")))
        elif path.parent.name == "completions":  # one line a batch, which may be others after a kill
            head, *lines = (json.loads(line) for line in path.read_text().splitlines())
            found[name] = head, sorted(row for line in lines for row in line["completions"])
        elif path.parents[1].name == "answers":
            found[name] = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
    return found


def without_times(content):
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if not _TIMES.search(key)}
    return [without_times(value) for value in content] if isinstance(content, list) else content


def differing(one, other):
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def note(number, command, moment, told, there, from_where):
    """A line of the table."""
    processes = f"{command.processes} ({moment.whom})"
    row = f"| {number} | {command.name} | {processes} | {told} | {there} | {from_where} | equal |\n"
    print(row)
    if place := os.environ.get("RESA_KILLS"):
        with open(place, "a") as file:
            file.write(row)


@pytest.mark.long
@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[f"{command}-{moment.kind}-{moment.whom}-{number}"
                                      for number, (command, moment) in enumerate(CASES)],
)  # fmt: skip
def test_killed_it_goes_on_to_the_same_bits(run_whole, tmp_path, number):
    command, moment = CASES[number]
    whole, rng, output = run_whole(command), random.Random(number), tmp_path / "output"
    while (told := killed(command, moment, whole, output, rng)) is None:
        shutil.rmtree(output)  # the machine has less to do than it had
    bars = [int(step) for step in re.findall(rf"\b(\d+)/{STEPS} \[", log_of(output))]
    steps, kept = newest_checkpoints(output), stores(output)
    # Of the steps that it has told it has lost those after a checkpoint.
    assert max(bars, default=0) <= steps.get(output, 0) + EVERY or report_of(output) is not None
    drafts = [path.name for path in output.glob(f"**/{DRAFTS}/*")]
    before = finished(output, steps)
    mark(steps, kept)
    finish(command, whole.inputs, output)
    assert_went_on(output, steps, kept)
    assert before == {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before}
    found = results(output)
    assert not differing(found, whole.results)
    there = [f"{len(before)} files of finished work"] if before else []
    there += [f"step {max(bars)}"] if bars else []
    there += [f"unfinished {', '.join(drafts)}"] if drafts else []
    begun = [f"{place.relative_to(output)}/checkpoint-{step}".removeprefix("./") for place, step in steps.items()]
    begun += [
        f"{max(len(lines) - 1, 0)} batches of {re.search(r'(?:arms|models)/([^/]+)', str(path))[1]}"
        for path, lines in kept.items()
    ]
    from_where = "; ".join(begun) or ("what was finished" if before else "the beginning")
    note(number, command, moment, told, "; ".join(there) or "nothing", from_where)


def test_there_are_forty_moments():
    assert len(CASES) == 40
    assert {(command.name, command.processes) for command, _ in CASES} >= {
        (name, processes) for name in ("train-sae", "tune", "train-rl", "sweep") for processes in (1, 2)
    }
