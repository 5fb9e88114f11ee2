"""
resa-hf train-rl: makes a source model, by GRPO with LoRA.

    resa-hf train-rl --config recipes/deepseek-r1-distill-qwen-1.5b/rl/tina-still.yaml

Leaves a plain adapter, those after the steps named in `checkpoints` (in steps/), each to be a `source_model`; sampled
completions; report.md, report.json and report.png. A rerun goes on from the last checkpoint.
"""

import warnings
from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    from ..arguments import DataArguments, LoraArguments, ModelArguments
    from ..rl.config import RLConfig
    from ..rl.run import train_rl
    from .dry_run import describe_rl, take_dry_run
    from .recipe import parse_flat

    rest, dry = take_dry_run(argv)
    types = (ModelArguments, LoraArguments, DataArguments, RLConfig)
    (model_args, lora, data, args), given = parse_flat(types, rest, "resa-hf train-rl", __doc__ or "")
    if data.solution_column is not None or not data.pack:
        raise ValueError("solution_column and pack are of text to train on; RL takes questions and answers.")
    if dry:
        print(describe_rl(model_args, lora, data, args, given))
        return
    # TRL 1.16 asks transformers for it by its old name at every generation.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
    report = train_rl(model_args, lora, data, args, given)
    print(f"\nAdapter: {report.parent}. Report: {report.with_suffix('.md')}, report.json, report.png.")
