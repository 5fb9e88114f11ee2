"""
resa-hf tune: Stage II alone.

    resa-hf tune --config recipes/deepseek-r1-distill-qwen-1.5b/tune/paper.yaml --sae runs/sae/layers.12

Trains a LoRA adapter with a frozen SAE spliced in; a rerun goes on from the last checkpoint. Leaves a plain PEFT
adapter and report.json.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    from ..arguments import DataArguments, LoraArguments, ModelArguments, SourceArguments
    from ..experiment.folder import alone_in
    from ..models import check_same_vocabulary, load_causal_lm, load_tokenizer
    from ..provenance import base_revisions, sae_revision, source_revisions
    from ..tuning.config import SAETuningConfig
    from ..tuning.trainer import SAETuningTrainer
    from .dry_run import describe_stage, take_dry_run
    from .recipe import parse_flat
    from .single_stage import run_stage, stage_text

    rest, dry = take_dry_run(argv)
    types = (ModelArguments, SourceArguments, LoraArguments, DataArguments, SAETuningConfig)
    (model_args, source_args, lora_args, data_args, args), given = parse_flat(
        types, rest, "resa-hf tune", __doc__ or ""
    )
    if source_args.has_source != (args.kl_reference == "source"):
        named = "named" if source_args.has_source else "not named"
        raise ValueError(
            f"kl_reference is {args.kl_reference!r} and a source model is {named}: "
            "`source_model` or `source_adapter` is needed with kl_reference: source, and has no use otherwise."
        )
    if args.completion_only_loss and data_args.pack:
        raise ValueError("completion_only_loss needs pack: false, one document a row.")
    if dry:
        print(describe_stage(model_args, data_args, given, (args, lora_args, source_args)))
        return
    with alone_in(Path(args.output_dir)):
        name = model_args.model_name_or_path
        tokenizer = load_tokenizer(name, revision=model_args.model_revision)
        source = None
        weights: dict[str, Any] = {"dtype": model_args.dtype, "load_in_4bit": model_args.load_in_4bit}
        if args.kl_reference == "source":
            source_name = source_args.source_model or name
            check_same_vocabulary(tokenizer, load_tokenizer(source_name, revision=source_args.source_revision))
            source = load_causal_lm(
                source_name, source_args.source_adapter, revision=source_args.source_revision, **weights
            )
        length, marked = args.max_length or 2048, bool(args.completion_only_loss)
        train, held_out, told = stage_text(data_args, tokenizer, length, marked)
        # The text is packed already, so that it could be counted before training starts.
        args = dataclasses.replace(args, packing=False)
        model = load_causal_lm(name, model_args.model_adapter, revision=model_args.model_revision, **weights)
        trainer = SAETuningTrainer(
            model,
            args,
            train,
            held_out,
            processing_class=tokenizer,
            source_model=source,
            peft_config=lora_args.lora_config(),
        )
        read = base_revisions(model_args) | source_revisions(model_args, source_args)
        read |= sae_revision("sae", args.sae, args.sae_revision)
        report = run_stage(trainer, given, told, read)
        print(f"\nAdapter: {report.parent}. Report: {report}.")
