"""
resa-hf evaluate: adapters against their base, on benchmarks or on your own problems.

    resa-hf evaluate --model_name_or_path deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --adapters mine=runs/mine/adapter
    --controls random-sae=runs/random-sae/adapter --tasks resa:aime24 resa:amc23 --check_overlap deepscaler

The base and every adapter answer the same problems with the same seed, in process or on a server. Ends with the
verdict: is this adapter better than its base, and than each control, by how much, how sure, at what cost. Needs the
extra `eval`. Started again after an interruption, it goes on where it stopped.
"""

from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    from ..evaluation.arguments import EvaluateArguments
    from ..evaluation.extra import eval_extra
    from ..experiment.folder import alone_in
    from .alone import refuse_several
    from .dry_run import describe_evaluation, take_dry_run
    from .recipe import parse_flat

    rest, dry = take_dry_run(argv)
    (args,), _ = parse_flat((EvaluateArguments,), rest, "resa-hf evaluate", __doc__ or "")
    if dry:
        print(describe_evaluation(args))
        return
    refuse_several("resa-hf evaluate", "several GPUs answer behind a server (--server).")
    with eval_extra():
        from ..experiment.evaluate import evaluate
        from ..experiment.evaluate_report import write_evaluation
    folder = Path(args.output_dir)
    with alone_in(folder):
        print("\n" + write_evaluation(args, evaluate(args)))
    print(f"\nReport: {folder / 'report.md'}, report.json, report.png. Answers: {folder / 'models'}.")
