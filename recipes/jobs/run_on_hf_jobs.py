# /// script
# requires-python = ">=3.11"
# dependencies = ["resa-hf[eval]"]
# ///
r"""
One recipe on Hugging Face Jobs: runs it, and publishes the adapter and its SAEs at the end.

    hf jobs uv run --flavor a100-large --timeout 48h --secrets HF_TOKEN --volume hf://buckets/me/resa-runs:/runs \
        --volume ./dist:/dist --env UV_FIND_LINKS=/dist \
        recipes/jobs/run_on_hf_jobs.py --recipe deepseek-r1-distill-qwen-1.5b/run/resa-still-v5.yaml \
        --output_dir /runs/resa-still-v5 --repo_id me/resa-still-v5 --sae_repo_id me/resa-still-v5-sae

`dist` holds resa-hf's wheel (see README.md beside this file). The bucket keeps the run: the same command after a
timeout goes on where it stopped. Flags that are not known here go to `resa-hf run`, for example
`--price_per_gpu_hour 2.5`, with which the report tells the cost.

A recipe in `sae/`, `tune/` or `rl/` is run by `resa-hf train-sae`, `tune` or `train-rl`, on all GPUs of the flavor by
DDP; one in `compare/` by `resa-hf compare`, and any other by `resa-hf run`.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import create_repo

from resa_hf.cli import main as resa_hf
from resa_hf.commands.recipe import recipe_path

STAGES = {"sae": "train-sae", "tune": "tune", "rl": "train-rl"}


def run(command: str, flags: Sequence[str]) -> int:
    """Runs a command, a stage with a process on each GPU; returns its exit status."""
    gpus = torch.cuda.device_count()
    if command not in STAGES.values() or gpus < 2:
        return resa_hf([command, *flags])
    config = recipe_path("accelerate_configs/multi_gpu.yaml")
    launch = ["accelerate", "launch", "--config_file", str(config), "--num_processes", str(gpus)]
    return subprocess.run([*launch, "-m", "resa_hf.cli", command, *flags], check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Runs and publishes; returns the exit status of what failed, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a recipe that ships with resa-hf, or a file")
    parser.add_argument("--output_dir", required=True, help="folder of the run, on a volume that outlives the job")
    parser.add_argument("--repo_id", help="repository of the adapter, if the recipe trains one")
    parser.add_argument("--sae_repo_id", help="repository of the SAEs, if the recipe trains any")
    parser.add_argument("--arm", default="SAE-Tuning", help="whose adapter is published")
    parser.add_argument("--private", action="store_true", help="make the repositories private")
    args, flags = parser.parse_known_args(argv)
    if not (args.repo_id or args.sae_repo_id):
        parser.error("name a repository: --repo_id of an adapter, --sae_repo_id of SAEs, or both")
    recipe = Path(args.recipe) if Path(args.recipe).is_file() else recipe_path(args.recipe)
    print(recipe.read_text().partition("\n\n")[0], flush=True)
    named = {"--repo_id": args.repo_id, "--sae_repo_id": args.sae_repo_id}
    repos = {flag: repo_id for flag, repo_id in named.items() if repo_id}
    for repo_id in repos.values():
        # A token that may not write is known now, and not after the run.
        create_repo(repo_id, private=args.private or None, exist_ok=True)
    started = time.monotonic()
    kind = recipe.parent.name
    command = "compare" if kind == "compare" else STAGES.get(kind, "run")
    status = run(command, ["--config", str(recipe), "--output_dir", args.output_dir, *flags])
    hours = (time.monotonic() - started) / 3600
    print(f"\n{hours:.2f} h. A job costs that times the price of its flavor.", flush=True)
    if status:
        return status
    places = [word for flag, repo_id in repos.items() for word in (flag, repo_id)]
    private = ["--private"] if args.private else []
    arm = [] if command in STAGES.values() else ["--arm", args.arm]
    return resa_hf(["publish", "--folder", args.output_dir, *arm, *places, *private])


if __name__ == "__main__":
    sys.exit(main())
