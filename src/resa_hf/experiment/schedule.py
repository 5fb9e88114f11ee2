"""The jobs of a run, in their order, one after the other or side by side."""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

from tqdm.auto import tqdm

from ..errors import JobError
from .folder import BASE, RunFolder
from .settings import Arm, RunSettings


@dataclass(frozen=True)
class Job:
    """One piece of work: Stage I on `source`, or an arm's training and answers.

    Args:
        seed (`int`): everything random in it.
        source (`str`, *optional*): the model to train SAEs on.
        arm (`Arm`, *optional*): the arm.
        rate (`float`, *optional*): its learning rate; `None` where nothing is trained.
        split (`str`): the questions to answer, `held_out` or `selection`.
    """

    seed: int
    source: str | None = None
    arm: Arm | None = None
    rate: float | None = None
    split: str = "held_out"

    @property
    def title(self) -> str:
        """What is shown while it runs."""
        what = f"SAE of the {self.source}" if self.source else self.arm.name if self.arm else ""
        return f"{what}, seed {self.seed}" + (f", lr {self.rate:g} (choosing)" if self.split == "selection" else "")

    def run(self, folder: RunFolder, settings: RunSettings) -> None:
        """Does the work, unless its files are there."""
        from .stages import run_arm, train_saes

        if self.source is not None:
            train_saes(folder, settings, self.source, self.seed)
        elif self.arm is not None:
            run_arm(folder, settings, self.arm, self.rate, self.seed, self.split)


def stage1_jobs(settings: RunSettings) -> list[Job]:
    """One Stage I for each source and seed."""
    return [Job(seed, source=source) for seed in settings.run.seeds for source in settings.sae_sources]


def choosing_jobs(settings: RunSettings) -> list[Job]:
    """Every trained arm at every learning rate with the first seed, where there are several rates."""
    if len(settings.learning_rates) < 2:
        return []
    trained = [arm for arm in settings.arms if arm.known is None]
    seed = settings.run.seeds[0]
    return [Job(seed, arm=arm, rate=rate, split="selection") for arm in trained for rate in settings.learning_rates]


def arm_jobs(settings: RunSettings, rates: dict[str, float]) -> list[Job]:
    """Every arm, and the untouched base, with every seed; `rates` are the learning rates by the arms' names."""
    arms = [BASE, *settings.arms]
    return [Job(seed, arm=arm, rate=rates.get(arm.name)) for seed in settings.run.seeds for arm in arms]


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
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (threads,))
    try:
        yield lambda jobs, title: _run_in(pool, jobs, title, folder, quiet)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_here(jobs: Sequence[Job], title: str, folder: RunFolder, settings: RunSettings) -> None:
    for number, job in enumerate(jobs, start=1):
        print(f"[{title} {number}/{len(jobs)}] {job.title}", flush=True)
        with _naming(job):
            job.run(folder, settings)


def _run_in(
    pool: ProcessPoolExecutor, jobs: Sequence[Job], title: str, folder: RunFolder, settings: RunSettings
) -> None:
    futures = {pool.submit(_run_quietly, job, folder, settings): job for job in jobs}
    for future in tqdm(as_completed(futures), title, total=len(jobs), unit="job", disable=not jobs):
        with _naming(futures[future]):
            future.result()


def _quiet(section: Mapping[str, Any]) -> dict[str, Any]:
    return {**section, "disable_tqdm": True}


@contextlib.contextmanager
def _naming(job: Job) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise JobError(f"{job.title}: {error}") from error


def _start_worker(threads: int) -> None:
    import datasets
    import torch

    torch.set_num_threads(threads)
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)


def _run_quietly(job: Job, folder: RunFolder, settings: RunSettings) -> None:
    with (
        (folder.root / "log.txt").open("a") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        job.run(folder, settings)
