"""Training problems in the benchmarks of a run."""

from dataclasses import replace

from ..evaluation.contamination import OverlapReport, find_overlap
from .prepare import load_rows
from .settings import RunArguments


def training_overlap(run: RunArguments) -> OverlapReport | None:
    """Looks for the problems that the run trains on in its tasks; `None` without tasks: held-out ones are kept out."""
    if not run.tasks:
        return None
    from ..evaluation.tasks import task_rows

    # The revision is the dataset's, as in `prepare`.
    runs = {run.dataset: run}
    if run.trigger_dataset is not None:
        runs.setdefault(run.trigger_dataset, replace(run, dataset=run.trigger_dataset, dataset_revision=None))
    training = (problem for source in sorted(runs) for problem in load_rows(runs[source])[0]["problem"])
    return find_overlap(
        training, {task: list(rows["problem"]) for task, rows in task_rows(run.tasks, run.files()).items()}
    )
