"""
resa-hf publish: what a run has made, to the Hub: an adapter, its SAE, or the merged model, with a card.

    resa-hf publish --folder runs/mine --repo_id me/my-adapter --sae_repo_id me/my-sae
    --evaluation runs/eval/report.json

The folder is the output of run, compare, demo, tune or train-sae, or a plain adapter or SAE. The card says what the
reports in it say, and no more; they are published beside it. One commit a repository; to be run again after an
interruption. What goes up stays in FOLDER/published.
"""

from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    from ..hub.arguments import PublishArguments
    from ..hub.publish import publish
    from .dry_run import take_dry_run
    from .recipe import parse_flat

    rest, dry = take_dry_run(argv)
    (args,), _ = parse_flat((PublishArguments,), rest, "resa-hf publish", __doc__ or "")
    commits = publish(args, dry_run=dry)
    if dry:
        print("\nNothing was uploaded.")
    for commit in commits:
        print(f"Published: {commit.repo_url}, commit {commit}.")
