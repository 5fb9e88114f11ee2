"""
resa-hf train-sae: Stage I alone.

    resa-hf train-sae --config recipes/deepseek-r1-distill-qwen-1.5b/sae/paper.yaml

Trains one TopK SAE at each hookpoint on a frozen model's activations, in one pass; a rerun goes on from the last
checkpoint. Leaves one folder a hookpoint, which sae-lens loads, and report.json.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    from ..arguments import DataArguments, ModelArguments
    from ..experiment.folder import alone_in
    from ..models import load_causal_lm, load_tokenizer
    from ..provenance import base_revisions, data_revisions, sae_metadata, sae_revision
    from ..sae.config import SAETrainingConfig
    from ..sae.trainer import SAETrainer
    from .dry_run import describe_stage, take_dry_run
    from .recipe import parse_flat
    from .single_stage import run_stage, stage_text

    rest, dry = take_dry_run(argv)
    types = (ModelArguments, DataArguments, SAETrainingConfig)
    (model_args, data_args, args), given = parse_flat(types, rest, "resa-hf train-sae", __doc__ or "")
    if dry:
        print(describe_stage(model_args, data_args, given, args))
        return
    with alone_in(Path(args.output_dir)):
        tokenizer = load_tokenizer(model_args.model_name_or_path, revision=model_args.model_revision)
        train, held_out, told = stage_text(data_args, tokenizer, args.max_length)
        load = partial(
            load_causal_lm,
            model_args.model_name_or_path,
            model_args.model_adapter,
            revision=model_args.model_revision,
            dtype=model_args.dtype,
            load_in_4bit=model_args.load_in_4bit,
        )
        read = base_revisions(model_args)
        metadata = sae_metadata(read, data_revisions(told)["dataset"])
        # The trainer alone holds it, and can let it go.
        trainer = SAETrainer(
            load(hookpoints=args.hookpoints), args, train, held_out, processing_class=tokenizer, metadata=metadata
        )
        read |= sae_revision("initial_sae", args.initial_sae, args.initial_sae_revision)
        report = run_stage(trainer, given, told, read, load)
        print(f"\nSAEs: {', '.join(str(report.parent / name) for name in trainer.saes)}. Report: {report}.")
