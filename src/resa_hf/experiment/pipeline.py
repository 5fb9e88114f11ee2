"""The whole way: data, Stage I, Stage II, answers, verdict."""

from typing import Any

from ..on_disk import rows_forgotten
from ..provenance import base_revisions, sae_revision, source_revisions
from .folder import RunFolder, alone_in, claim, reading_files
from .inputs import check_inputs
from .manifest import note_start
from .overlap import training_overlap
from .plan import plan, test_sizes
from .prepare import describe, prepare
from .report import as_plain, write_report
from .results import ArmResult, choose_candidates, collect
from .schedule import arm_jobs, choosing_jobs, stage1_jobs, text_jobs, workers
from .settings import RunSettings


def run_experiment(folder: RunFolder, settings: RunSettings) -> list[ArmResult]:
    """Runs what is missing in the run's folder, and writes its report.

    Returns:
        `list[ArmResult]`: the base first, then the arms in the recipe's order.

    Raises:
        `DataError`: if the data cannot be used, or if the folder holds another run, cannot be written, or
        another command is at work in it.
        `JobError`: from a stage, naming the arm; what was finished is kept.
    """
    with alone_in(folder.root), rows_forgotten():
        return _run_experiment(folder, settings)


def _run_experiment(folder: RunFolder, settings: RunSettings) -> list[ArmResult]:
    claim(folder.root, as_plain(settings), free=free_sections(folder))
    run = settings.run
    read = base_revisions(run) | source_revisions(run, run) | sae_revision("sae", run.sae, run.sae_revision)
    check_inputs(folder.root, read)
    data = prepare_run(folder, settings)
    with reading_files(folder.data("data.json")):
        told = describe(data)
    note_start(folder.root, as_plain(settings), data)
    print(told, flush=True)
    planned = plan(test_sizes(settings), len(settings.run.seeds))
    print(planned["text"], flush=True)
    overlap = training_overlap(settings.run)
    if overlap is not None:
        print(f"Overlap of training and tasks: {overlap.counts()}", flush=True)
    with workers(folder, settings) as run_jobs:
        run_jobs(stage1_jobs(settings), "Stage I")
        run_jobs(text_jobs(settings), "Sampling text")
        choosing = choosing_jobs(settings)
        run_jobs(choosing, "Choosing learning rates")
        with reading_files(folder.root):
            chosen, chosen_by = choose_candidates(folder, settings, choosing)
        for jobs in arm_jobs(settings, chosen):
            run_jobs(jobs, "Stage II and answers")
    with reading_files(folder.root):
        results = collect(folder, settings, chosen)
        text = write_report(folder, settings, results, data, chosen_by, planned, overlap)
    print("\n" + text)
    return results


def free_sections(folder: RunFolder) -> tuple[str, ...]:
    """The sections that a run started again may set otherwise: a mistake in Stage II's settings that showed after
    Stage I is to be mended without training the SAEs again, or sampling text again.
    """
    if any(folder.root.glob("arms/**/*.json*")):
        return ()
    return ("stage2", "arms") if any(folder.root.glob("text/**/*.json*")) else ("stage2", "arms", "sampling")


@rows_forgotten()
def prepare_run(folder: RunFolder, settings: RunSettings) -> dict[str, Any]:
    """The data of a run, made unless they are there; see [`prepare`]."""
    max_length = int(settings.stage2.get("max_length", 2048))
    return prepare(folder, settings.run, max_length, settings.reads_prose, settings.source_teaches)
