"""The whole way: data, Stage I, Stage II, answers, verdict."""

import time
from typing import Any

from ..errors import DataError
from .folder import RunFolder, check_writable, read_json, write_json
from .prepare import describe, prepare
from .report import as_plain, write_report
from .results import ArmResult, choose_rates, collect
from .schedule import arm_jobs, choosing_jobs, stage1_jobs, workers
from .settings import RunSettings


def run_experiment(folder: RunFolder, settings: RunSettings) -> list[ArmResult]:
    """Runs what is missing in the run's folder, and writes its report.

    Returns:
        `list[ArmResult]`: the base first, then the arms in the recipe's order.

    Raises:
        `DataError`: if the data cannot be used, or if the folder holds a run with other settings, or cannot be
        written.
        `JobError`: from a stage, naming the arm; what was finished is kept.
    """
    started = time.perf_counter()
    _claim(folder, settings)
    data = prepare(folder, settings.run, int(settings.stage2.get("max_length", 2048)))
    print(describe(data), flush=True)
    with workers(folder, settings) as run_jobs:
        run_jobs(stage1_jobs(settings), "Stage I")
        choosing = choosing_jobs(settings)
        run_jobs(choosing, "Choosing learning rates")
        rates, chosen_by = choose_rates(folder, settings, choosing)
        run_jobs(arm_jobs(settings, rates), "Stage II and answers")
    results = collect(folder, settings, rates)
    print("\n" + write_report(folder, settings, results, data, chosen_by, time.perf_counter() - started))
    return results


def _claim(folder: RunFolder, settings: RunSettings) -> None:
    check_writable(folder.root)
    plain = as_plain(settings)
    if not folder.settings.is_file():
        write_json(folder.settings, plain)
        return
    wanted, there = _flat(plain), _flat(read_json(folder.settings))
    different = {key for key in wanted.keys() | there.keys() if wanted.get(key) != there.get(key)}
    # How many processes there are, and how the folder is spelled, changes nothing in the results.
    different -= {"run.processes", "run.output_dir"}
    if different:
        raise DataError(
            f"{folder.root} holds a run with other settings ({', '.join(sorted(different))}). "
            "Choose another --output_dir, or delete the folder."
        )


def _flat(plain: dict[str, Any]) -> dict[str, Any]:
    """`{"run": {"seeds": [0]}, "arms": []}` as `{"run.seeds": [0], "arms": []}`."""
    return {
        f"{section}.{name}".rstrip("."): value
        for section, content in plain.items()
        for name, value in (content.items() if isinstance(content, dict) else [("", content)])
    }
