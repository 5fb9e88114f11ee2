"""
resa-hf run: the whole way on your own questions and answers.

    resa-hf run --config recipes/tiny-reasoner/run/own_data.yaml --dataset mine.jsonl --question_column q
    --answer_column a

Trains an SAE on the source model (Stage I), tunes the target with it (Stage II), lets both answer held-out questions,
and says whether the tuned model is better. Started again after an interruption, it goes on where it stopped.
"""

from collections.abc import Sequence
from pathlib import Path


def main(
    argv: Sequence[str],
    config: Path | None = None,
    prog: str = "resa-hf run",
    description: str = __doc__ or "",
    needs_arms: bool = False,
) -> Path | None:
    """Runs the command, and returns the output folder; `config` is the recipe where no flag names one."""
    from ..experiment.folder import RunFolder
    from ..experiment.pipeline import run_experiment
    from .alone import refuse_several
    from .dry_run import describe_run, take_dry_run
    from .recipe import parse_run

    refuse_several(
        prog, "resa-hf train-sae and tune train in several, and resa-hf sweep gives each process runs of its own."
    )
    rest, dry = take_dry_run(argv)
    settings = parse_run(rest, prog, description, config)
    if needs_arms and len(settings.arms) < 2:
        raise ValueError("There is nothing to compare: the recipe needs a section `arms` with two or more.")
    if dry:
        print(describe_run(settings))
        return None
    folder = RunFolder(Path(settings.run.output_dir))
    run_experiment(folder, settings)
    print(f"\nReport: {folder.root / 'report.md'}, report.json, report.png. Adapters: {folder.root / 'arms'}.")
    return folder.root
