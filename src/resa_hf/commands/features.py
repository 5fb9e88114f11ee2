"""
resa-hf features: which latents are active at the thinking tokens, at which layers, and whether they do anything.

    resa-hf features --config recipes/tiny-reasoner/features/layers.yaml

Reads one prompt through a model with an SAE at each layer, counts the latents that are active at <think> and </think>
and nowhere else, holds the count against other tokens and against the same tokens in prose, suggests hookpoints, and
tests the latents: ablated, amplified and patched, against random latents like them. Started again after an
interruption, it goes on where it stopped.
"""

from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    from ..features.arguments import FeatureArguments
    from .alone import refuse_several
    from .dry_run import describe_features, take_dry_run
    from .recipe import parse_flat

    rest, dry = take_dry_run(argv)
    (args,), _ = parse_flat((FeatureArguments,), rest, "resa-hf features", __doc__ or "")
    if dry:
        print(describe_features(args))
        return
    refuse_several("resa-hf features", "it uses one GPU.")
    from ..experiment.features_report import run_features
    from ..experiment.folder import alone_in

    folder = args.output_dir
    with alone_in(Path(folder)):
        print("\n" + run_features(args))
    print(f"\nReport: {folder}/report.html, report.md, report.json. Pictures: {folder}/pictures.")
