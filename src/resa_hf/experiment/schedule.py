"""The jobs of a run, in their order, one after the other or side by side."""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import groupby
from multiprocessing import get_context
from typing import Any

from tqdm.auto import tqdm

from ..errors import JobError
from ..on_disk import rows_forgotten
from ..orphans import end_with_parent
from ..preemption import check_preemption, handle_preemption, preempting_workers
from .arms import BASE, Arm, Candidate
from .folder import RunFolder
from .settings import RunSettings


@dataclass(frozen=True)
class Job:
    """One piece of work: Stage I on `source`, the text of a model, or an arm's training and answers.

    Args:
        seed (`int`): everything random in it.
        source (`str`, *optional*): what to train SAEs on.
        text (`str`, *optional*): the model that answers the training questions, `source` or `target`.
        arm (`Arm`, *optional*): the arm.
        candidates (`tuple[Candidate, ...]`): how it is trained, of one learning rate, that is one training; empty
            where nothing is trained.
        split (`str`): the questions to answer, `held_out` or `selection`.
        choosing (`bool`): whether the answers are there to choose a candidate by.
    """

    seed: int
    source: str | None = None
    text: str | None = None
    arm: Arm | None = None
    candidates: tuple[Candidate, ...] = ()
    split: str = "held_out"
    choosing: bool = False

    @property
    def title(self) -> str:
        """What is shown while it runs."""
        what = self.arm.name if self.arm else f"text of the {self.text}" if self.text else f"SAE of the {self.source}"
        return f"{what}, seed {self.seed}" + (f", lr {self.candidates[0].rate:g} (choosing)" if self.choosing else "")

    @rows_forgotten()
    def run(self, folder: RunFolder, settings: RunSettings) -> None:
        """Does the work, unless its files are there, or SIGTERM has come before."""
        from .answering import run_arm
        from .sampled_text import sample_text
        from .stages import train_saes

        check_preemption()
        if self.source is not None:
            train_saes(folder, settings, self.source, self.seed)
        elif self.text is not None:
            sample_text(folder, settings, self.text, self.seed)
        elif self.arm is not None:
            for candidate in self.candidates or (None,):
                run_arm(folder, settings, self.arm, candidate, self.seed, self.split)


def stage1_jobs(settings: RunSettings) -> list[Job]:
    """One Stage I for each source and seed."""
    return [Job(seed, source=source) for seed in settings.run.seeds for source in settings.sae_sources]


def text_jobs(settings: RunSettings) -> list[Job]:
    """One sampling for each text and seed, whichever arms are trained on it."""
    return [Job(seed, text=text) for seed in settings.run.seeds for text in settings.texts]


def choosing_jobs(settings: RunSettings) -> list[Job]:
    """Every trained arm in every way that it chooses among, with the first seed, where there are several."""
    if len(settings.candidates) < 2:
        return []
    seed = settings.run.seeds[0]
    by_rate = [tuple(group) for _, group in groupby(settings.candidates, key=lambda candidate: candidate.rate)]
    return [
        Job(seed, arm=arm, candidates=candidates, split=settings.chosen_on, choosing=True)
        for arm in settings.arms
        if arm.is_trained
        for candidates in by_rate
    ]


def arm_jobs(settings: RunSettings, chosen: Mapping[str, Candidate]) -> list[list[Job]]:
    """Every arm, and the untouched base, with every seed, by the arms' names; then those that need another arm's."""
    jobs = [
        Job(seed, arm=arm, candidates=(chosen[name],) if (name := arm.like or arm.name) in chosen else ())
        for seed in settings.run.seeds
        for arm in (BASE, *settings.arms)
    ]
    first = [job for job in jobs if job.arm is not None and job.arm.like is None]
    return [first, [job for job in jobs if job not in first]]


@contextlib.contextmanager
def workers(folder: RunFolder, settings: RunSettings) -> Iterator[Callable[[Sequence[Job], str], None]]:
    """Yields `run_jobs(jobs, title)`, which runs jobs with a progress bar over them: here, or in `processes` workers.

    Raises:
        `JobError`: naming the job that failed; what other jobs have finished is kept, and a rerun goes on from there.
    """
    processes = settings.run.processes
    if processes == 1:
        yield lambda jobs, title: _run_here(jobs, title, folder, settings)
        return
    quiet = replace(settings, stage1=_quiet(settings.stage1), stage2=_quiet(settings.stage2))
    threads = max(1, (os.cpu_count() or 1) // processes)
    # spawn: a forked child would inherit torch's thread pools in an undefined state.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), start_worker, (threads,))
    try:
        with preempting_workers():
            yield lambda jobs, title: _run_in(pool, jobs, title, folder, quiet)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_here(jobs: Sequence[Job], title: str, folder: RunFolder, settings: RunSettings) -> None:
    for number, job in enumerate(jobs, start=1):
        print(f"[{title} {number}/{len(jobs)}] {job.title}", flush=True)
        with naming(job):
            job.run(folder, settings)


def _run_in(
    pool: ProcessPoolExecutor, jobs: Sequence[Job], title: str, folder: RunFolder, settings: RunSettings
) -> None:
    futures = {pool.submit(_run_quietly, job, folder, settings): job for job in jobs}
    for future in tqdm(as_completed(futures), title, total=len(jobs), unit="job", disable=not jobs):
        # Nobody knows then which job did it: all that are left fail.
        if isinstance(error := future.exception(), BrokenProcessPool):
            raise JobError(_killed(settings.run.processes)) from error
        with naming(futures[future]):
            future.result()


def _killed(processes: int) -> str:
    return (
        "A worker process was killed in the middle of its job. Where nobody did that, the system has, because memory "
        f"was full: set processes: {processes // 2} (now {processes}), or what takes less of it (--dry_run tells). "
        "What was finished is kept, and a rerun goes on from there."
    )


def _quiet(section: Mapping[str, Any]) -> dict[str, Any]:
    return {**section, "disable_tqdm": True}


@contextlib.contextmanager
def naming(job: Job) -> Iterator[None]:
    """Raises what fails in the block as a `JobError` that names the job."""
    try:
        yield
    except Exception as error:
        raise JobError(f"{job.title}: {error}") from error


def start_worker(threads: int) -> None:
    """Settles a new process of a pool: its share of the cores, no life without ours, and no noise of the libraries."""
    import datasets
    import torch

    end_with_parent()
    handle_preemption()
    torch.set_num_threads(threads)
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)


def _run_quietly(job: Job, folder: RunFolder, settings: RunSettings) -> None:
    with (
        (folder.root / "log.txt").open("a", encoding="utf-8", errors="backslashreplace") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        job.run(folder, settings)
