"""A sweep: runs over a grid of settings, which share what their settings have in common."""

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..arguments import LoraArguments, SourceArguments
from ..errors import JobError
from ..preemption import preempting_workers
from .arms import BASE
from .folder import SHARED, RunFolder, check_writable, claim, read_json, reading_files
from .pipeline import prepare_run, run_experiment
from .report import as_plain
from .schedule import Job, naming, stage1_jobs, start_worker
from .settings import RunSettings
from .together import Task, work_through

# In the grid of a recipe: the SAE's hookpoint, and with it Stage I's list of all of them.
HOOKPOINT = "hookpoint"
# A run writes it last.
_LAST = "report.png"
# What neither the data, nor Stage I, nor the untouched base's answers depend on. Whatever is not named here counts.
_FREE = {field.name for field in fields(LoraArguments)}
_FREE |= {"sae", "sae_id", "sae_revision", "learning_rates", "checkpoints", "choose_on_test", "margin"}
_FREE |= {"rl_arm", "rl_seconds", "rl_gpus", "price_per_gpu_hour", "processes", "output_dir"}
_FREE_IN_STAGE1 = _FREE | {"tasks", "file_prompt", "greedy"}
_FREE_IN_BASE = _FREE | {field.name for field in fields(SourceArguments)}
_FREE_IN_BASE |= {"trigger_dataset", "prose", "train_rows"}


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Args:
        values (`Mapping[str, Any]`): what it sets of the grid's fields, in the grid's order.
        settings (`RunSettings`): all that it says.
        root (`Path`): its own folder.
        stage1, base (`str`): the names of the folders that it shares with other points, as [`RunFolder`] has them.
    """

    values: Mapping[str, Any]
    settings: RunSettings
    root: Path
    stage1: str
    base: str

    @property
    def name(self) -> str:
        """As shown: `k 32, dataset still`."""
        return name_of(self.values)

    @property
    def shared(self) -> Path:
        """The folder of what points share."""
        return self.root.parent / SHARED

    @property
    def folder(self) -> RunFolder:
        """Where its files lie."""
        return RunFolder.in_sweep(self.root, self.stage1, self.base)

    @property
    def is_by_hookpoint(self) -> bool:
        """Whether the SAE's hookpoint is all that the grid varies."""
        return set(self.values) == {HOOKPOINT}

    def same_run(self, other: "Point") -> bool:
        """Whether both would do the same."""
        one, two = (replace(point.settings, run=replace(point.settings.run, output_dir="")) for point in (self, other))
        return as_plain(one) == as_plain(two)


@dataclass(frozen=True)
class FeatureSettings:
    """The section `features` of a hookpoint sweep's recipe: what to count at each hookpoint, on the model that Stage I
    has read.

    Args:
        prompt (`str`, *optional*): the text in which latents are looked for. `None`: DeepSeek-R1's system prompt.
        cues (`list[str]`, *optional*): the tokens at which such a latent is active. `None`: `<think>`, `</think>`.
        components (`int`, *optional*): of the mixtures over layers. `None`: as many as the BIC chooses.
    """

    prompt: str | None = None
    cues: list[str] | None = None
    components: int | None = None

    def __post_init__(self) -> None:
        cues = self.cues or []
        if not isinstance(self.prompt or "", str):
            raise ValueError(f"features: prompt is {self.prompt!r}; it must be text.")
        if not isinstance(cues, list) or not all(isinstance(cue, str) for cue in cues):
            raise ValueError(f"features: cues is {self.cues!r}; it must be a list of words.")
        if self.components is not None and (not isinstance(self.components, int) or self.components < 1):
            raise ValueError(f"features: components is {self.components!r}; it must be a number from 1 on.")


@dataclass(frozen=True)
class Sweep:
    """What a sweep's recipe says, checked.

    Args:
        root (`Path`): the output folder.
        points (`list[Point]`): the product of the grid, in its order.
        processes (`int`): points worked on side by side by this command, on CPU.
        features (`FeatureSettings`, *optional*): what to count beside the scores.
    """

    root: Path
    points: list[Point]
    processes: int = 1
    features: FeatureSettings | None = None

    @property
    def one_base(self) -> bool:
        """Whether every point is held against the same answers of the same model."""
        return len({point.base for point in self.points}) == 1


def name_of(values: Mapping[str, Any]) -> str:
    """`{"stage1.k": 32, "dataset": "still"}` as `k 32, dataset still`."""
    return ", ".join(f"{field.rpartition('.')[2]} {shown(value)}" for field, value in values.items())


def shown(value: Any) -> str:
    """A value of the grid, as shown."""
    return " ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)


def make_point(root: Path, values: Mapping[str, Any], settings: RunSettings) -> Point:
    """Gives a run its folder in a sweep's: `stage1.k: 32, dataset: still` becomes `k-32_dataset-still`."""
    words = (f"{field.rpartition('.')[2]}-{shown(value)}" for field, value in values.items())
    slug = "_".join(re.sub(r"[^A-Za-z0-9._]+", "-", word).strip("-.") for word in words)
    if len(slug) > 120:
        slug = f"{slug[:110]}-{_digest(slug)}"
    settings = replace(settings, run=replace(settings.run, output_dir=str(root / slug), processes=1))
    stage1, base = _digest(_stage1_settings(settings)), _digest(_base_settings(settings))
    return Point(values, settings, root / slug, f"stage1-{stage1}", f"base-{base}")


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _stage1_settings(settings: RunSettings) -> dict[str, Any]:
    """What the data and Stage I depend on."""
    text = {"prose": settings.reads_prose, "source_teaches": settings.source_teaches}
    return {"run": _without(settings, _FREE_IN_STAGE1), "stage1": dict(settings.stage1), "text": text}


def _base_settings(settings: RunSettings) -> dict[str, Any]:
    """What the untouched base's answers depend on, but for the data behind their names."""
    stage2 = {"use_cpu": bool(settings.stage2.get("use_cpu", False))}
    return {"run": _without(settings, _FREE_IN_BASE), "sampling": asdict(settings.sampling), "stage2": stage2}


def _without(settings: RunSettings, free: set[str]) -> dict[str, Any]:
    return {name: value for name, value in asdict(settings.run).items() if name not in free}


def sweep_tasks(points: Sequence[Point]) -> list[Task]:
    """The work in the order of the points: what some share, once, before the first of them."""
    tasks: dict[tuple[str, frozenset[str]], Task] = {}

    def add(name: str, run: partial[None], needs: set[str]) -> str:
        # The base's answers come from the data of any of its points: what fails for one must not fail the others.
        key = name, frozenset(needs)
        tasks.setdefault(key, Task(name, partial(_told, name, run), key[1]))
        return name

    for point in points:
        data = {add(f"{point.stage1}-data", partial(_prepare, point), set())}
        shared = set(data)
        for job in stage1_jobs(point.settings):
            name = f"{point.stage1}-{job.source}-seed-{job.seed}"
            shared.add(add(name, partial(_run_job, point, job), data))
        for seed in point.settings.run.seeds:
            answers = partial(_answer_as_base, point, seed)
            shared.add(add(f"{point.base}-seed-{seed}", answers, data))
        add(point.root.name, partial(_run_point, point, len(points)), shared)
    return list(tasks.values())


def _told(name: str, run: Callable[[], None]) -> None:
    started = time.perf_counter()
    run()
    if (seconds := time.perf_counter() - started) > 1:  # else it was done already
        print(f"{name}: {seconds:,.0f} s", file=sys.__stdout__, flush=True)


def _prepare(point: Point) -> None:
    claim(point.shared / point.stage1, _stage1_settings(point.settings))
    prepare_run(point.folder, point.settings)


def _run_job(point: Point, job: Job) -> None:
    with naming(job):
        job.run(point.folder, point.settings)


def _answer_as_base(point: Point, seed: int) -> None:
    _claim_base(point)
    _run_job(point, Job(seed, arm=BASE))


def _claim_base(point: Point) -> None:
    # Data may have changed under the same name between two points.
    path = point.folder.data("data.json")
    with reading_files(path):
        data = {"fingerprint": read_json(path)["fingerprint"]}
    claim(point.shared / point.base, _base_settings(point.settings) | {"data": data})


def _run_point(point: Point, points: int) -> None:
    _claim_base(point)
    if (point.root / _LAST).is_file():
        # Other settings than what is there was made with are refused, also where nothing is left to do.
        claim(point.root, as_plain(point.settings))
        return
    folder = replace(point.folder, points=points)
    folder.note_shared()
    run_experiment(folder, point.settings)


def run_points(sweep: Sweep, since: float) -> dict[str, str]:
    """Works through the sweep, together with the other processes that were given it.

    Args:
        sweep ([`Sweep`]): what to do.
        since (`float`): `time.time()` of the command's start.

    Returns:
        `dict[str, str]`: the points that failed, by name, and why.

    Raises:
        `DataError`: if the output folder cannot be written.
        `JobError`: if a process of this command was killed, as for want of memory.
    """
    check_writable(sweep.root)
    if sweep.processes == 1:
        failed = _work(sweep, since)
    else:
        threads = max(1, (os.cpu_count() or 1) // sweep.processes)
        with ProcessPoolExecutor(sweep.processes, get_context("spawn"), start_worker, (threads,)) as pool:
            works = [pool.submit(_work_quietly, sweep, since) for _ in range(sweep.processes)]
            try:
                with preempting_workers():
                    failed = {name: why for work in works for name, why in work.result().items()}
            except BrokenProcessPool as error:
                raise JobError(f"A process of the sweep was killed: {error} Started again, it goes on.") from error
    return {point.name: failed[point.root.name] for point in sweep.points if point.root.name in failed}


def _work(sweep: Sweep, since: float) -> dict[str, str]:
    return work_through(sweep_tasks(sweep.points), sweep.root / "locks", since)


def _work_quietly(sweep: Sweep, since: float) -> dict[str, str]:
    with (
        (sweep.root / "log.txt").open("a", encoding="utf-8", errors="backslashreplace") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        return _work(sweep, since)
