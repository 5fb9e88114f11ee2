"""
resa-hf train-rl: makes a source model, by GRPO with LoRA.

    resa-hf train-rl --config recipes/deepseek-r1-distill-qwen-1.5b/rl/tina-still.yaml

Leaves a plain adapter, those after the steps named in `checkpoints` (in steps/), each to be a `source_model`; sampled
completions; report.md, report.json and report.png. A rerun goes on from the last checkpoint.
"""

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

# Of text, of models that TRL loads, and what a rerun does by itself.
_WITHOUT_USE = {
    "solution_column": "RL takes questions and answers, and no traces",
    "pack": "RL takes questions and answers, and no text",
    "model_init_kwargs": "see dtype and model_revision",
    "resume_from_checkpoint": "a rerun goes on from the last checkpoint of its output_dir",
    "model_adapter": "name the adapter itself as model_name_or_path, so that what is trained on it can be loaded",
}


def _refuse(given: Collection[str], pushing: Collection[str]) -> None:
    for name in sorted(given):
        if name in _WITHOUT_USE:
            raise ValueError(f"{name} cannot be set: {_WITHOUT_USE[name]}.")
        if name in pushing:
            raise ValueError(f"{name} cannot be set: publish it when it is done, by `resa-hf publish --folder`.")


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    from ..arguments import DataArguments, LoraArguments, ModelArguments
    from ..experiment.folder import alone_in
    from ..rl.config import RLConfig
    from ..rl.run import train_rl
    from .dry_run import describe_rl, take_dry_run
    from .recipe import PUSHING, parse_flat

    rest, dry = take_dry_run(argv)
    types = (ModelArguments, LoraArguments, DataArguments, RLConfig)
    (model_args, lora, data, args), given = parse_flat(types, rest, "resa-hf train-rl", __doc__ or "")
    _refuse(given, PUSHING)
    if dry:
        print(describe_rl(model_args, lora, data, args, given))
        return
    # TRL 1.16 asks transformers for it by its old name at every generation.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
    with alone_in(Path(str(args.output_dir))):
        report = train_rl(model_args, lora, data, args, given)
    print(f"\nAdapter: {report.parent}. Report: {report.with_suffix('.md')}, report.json, report.png.")
