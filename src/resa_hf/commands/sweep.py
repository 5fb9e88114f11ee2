"""
resa-hf sweep: a run for every point of a grid of settings, and all of them in one table.

    resa-hf sweep --config recipes/tiny-reasoner/sweep/layers.yaml

A recipe of `resa-hf run` with a section `grid`: `grid: {stage1.k: [16, 32], source_adapter: [a, b]}` is four runs,
and `grid: {hookpoint: all}` one for each decoder layer, after one pass of Stage I over all of them. Points share data,
SAEs and the base's answers where nothing that these depend on differs.

Start the same command as often as there are GPUs, by `accelerate launch --num_processes 8 -m resa_hf.cli sweep ...`,
torchrun, a job scheduler that gives each process its GPU, or in terminals, each with its own CUDA_VISIBLE_DEVICES: the
processes divide the points among them, and go on with what another one left when it was stopped. On a CPU,
`--processes` does the same.
"""

import os
import time
from collections.abc import MutableMapping, Sequence

# What launchers tell a process of the others. The runs of a sweep are independent.
_LAUNCHED = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"}
_LAUNCHED |= {"ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_BY_MPI = ("OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "PMI_")
_LAUNCHED_BY = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "TORCHELASTIC_", *_BY_MPI)


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    since = time.time()
    work_alone(os.environ)
    from ..experiment.sweep import run_points
    from ..experiment.sweep_checks import check_sweep
    from ..experiment.sweep_report import report_once
    from .dry_run import describe_sweep, take_dry_run
    from .grid import parse_sweep

    rest, dry = take_dry_run(argv)
    sweep = parse_sweep(rest, "resa-hf sweep", __doc__ or "")
    check_sweep(sweep)
    if dry:
        print(describe_sweep(sweep))
        return
    failed = run_points(sweep, since)
    report_once(sweep, failed, since)


def work_alone(environment: MutableMapping[str, str]) -> None:
    """Leaves a process that was launched beside others the GPU of its local rank, and nothing of the others.

    Must be called before torch looks for GPUs.

    Args:
        environment (`MutableMapping[str, str]`): the process' environment.
    """
    if "LOCAL_RANK" in environment:
        rank = environment["LOCAL_RANK"]
        gpus = environment.get("CUDA_VISIBLE_DEVICES", rank).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = gpus[int(rank) % len(gpus)]
    for name in list(environment):
        if name in _LAUNCHED or name.startswith(_LAUNCHED_BY):
            del environment[name]
