"""
resa-hf evaluate: adapters against their base, on benchmarks or on your own problems.

    resa-hf evaluate --model_name_or_path deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --adapters mine=runs/mine/adapter
    --controls random-sae=runs/random-sae/adapter --tasks resa:aime24 resa:amc23 --check_overlap deepscaler

The base and every adapter answer the same problems with the same seed, on a server or in process; under `accelerate
launch` each process answers its part. Ends with the verdict: is this adapter better than its base, and than each
control, by how much, how sure, at what cost. Needs the extra `eval`. Started again after an interruption, it goes on
where it stopped.
"""

import contextlib
import os
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
    if args.server is not None:
        refuse_several("resa-hf evaluate --server", "the server itself may use several GPUs.")
    with eval_extra():
        from ..evaluation.share import Share
        from ..experiment.evaluate import evaluate
        from ..experiment.evaluate_report import write_evaluation
    folder, share = Path(args.output_dir), Share.launched()
    with alone_in(folder), open(os.devnull, "w") as silence:
        with contextlib.nullcontext() if share.is_first else contextlib.redirect_stdout(silence):
            evaluation = evaluate(args, share)
        if not share.is_first:
            return
        print("\n" + write_evaluation(args, evaluation))
    print(f"\nReport: {folder / 'report.md'}, report.json, report.png. Answers: {folder / 'models'}.")
