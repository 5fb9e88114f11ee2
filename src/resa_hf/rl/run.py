"""GRPO with LoRA, from rows to the adapter and its report."""

from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase, ProgressCallback
from trl import GRPOTrainer

from ..adapters import base_of_adapter
from ..arguments import DataArguments, LoraArguments, ModelArguments
from ..checkpoints import WholeCheckpoints
from ..evaluation.cost import Cost, current_device
from ..evaluation.share import Share
from ..evaluation.tables import finite, markdown
from ..experiment.folder import check_settings, claim, write_json, write_whole
from ..experiment.inputs import INPUTS, check_inputs
from ..experiment.manifest import note_start
from ..experiment.prepare import MEASURED_DOCUMENTS, load_rows, split_rows, told_of
from ..experiment.report import versions
from ..experiment.stages import train_from_last_checkpoint, warned_of
from ..guards import Guarded, check_token_id
from ..models import load_causal_lm, load_tokenizer
from ..places import parse_place
from ..provenance import base_revisions, data_revisions
from ..text import add_text, tokenize_documents
from ..tuning.epoch_order import EpochOrder
from .callbacks import KeepSteps, ShortLog
from .config import RLConfig
from .log import log_table, plot_log, windows
from .prompts import prompt_rows
from .rewards import make_rewards

STEPS = "steps"


def train_rl(
    model_args: ModelArguments, lora: LoraArguments, data: DataArguments, args: RLConfig, given: dict[str, Any]
) -> Path:
    """Trains from the last checkpoint, and writes adapter, kept steps and report into `args.output_dir`.

    Args:
        model_args, lora, data, args: what the recipe says.
        given (`dict`): the keys that were set, for the report.

    Returns:
        `Path`: of report.json.

    Raises:
        `DataError`: if the data cannot be used, or the folder was started with other settings or data.
        `ValueError`: for settings that contradict each other.
    """
    output = Path(str(args.output_dir))
    tokenizer = load_tokenizer(model_args.model_name_or_path, revision=model_args.model_revision)
    train, held_out, told = _read(data, tokenizer, args)
    settings = {"settings": given, "data": told["fingerprint"]}
    path = output / "report.json"
    if Share.of_training(args).of_first(path.is_file()):
        check_settings(output, settings)
        return path  # finished before
    trainer = _trainer(model_args, lora, args, train, tokenizer)
    check_token_id(told["largest_token"], trainer.model, "A prompt")  # type: ignore[arg-type]  # made by now
    keep = KeepSteps(trainer, output / STEPS, args.checkpoints or [], held_out)
    trainer.add_callback(keep)
    begun = any(output.glob("checkpoint-*")) or any(output.glob(f"{STEPS}/*"))
    # Until a step is kept, a mistake that shows when training begins is to be mended in the same folder.
    claim(output, settings, free=() if begun else ("settings",))
    if not begun:
        (output / INPUTS).unlink(missing_ok=True)
    check_inputs(output, base_revisions(model_args))
    note_start(output, given, told)
    seconds = train_from_last_checkpoint(trainer, args.steps_between_generations)
    trainer.save_model()
    log = trainer.state.log_history
    report = {
        "settings": given,
        "data": told,
        "revisions": base_revisions(model_args) | data_revisions(told),
        "seconds": seconds,
        "costs": {"RL": Cost(seconds, int(trainer.state.num_input_tokens_seen)).as_plain()},
        "windows": windows(log),
        "steps": {step: str(output / STEPS / step) for step in map(str, args.checkpoints or [])},
        "moved": keep.moved(),
        **warned_of(trainer),
        "log": log,
        "device": current_device(),
        "versions": versions(),
    }
    if trainer.is_world_process_zero():
        subject = f"{model_args.model_name_or_path} on {data.dataset}, seed {args.seed}"
        _write(output, finite(report), subject, args.log_completions)
    return path


class _Trainer(Guarded, WholeCheckpoints, GRPOTrainer):
    """TRL's, guarded, with an order of the prompts that depends on the epoch alone."""

    def _get_train_sampler(self, dataset: datasets.Dataset | None = None) -> EpochOrder:
        return EpochOrder(super()._get_train_sampler(dataset))


def _trainer(
    model_args: ModelArguments,
    lora: LoraArguments,
    args: RLConfig,
    train: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
) -> GRPOTrainer:
    name = model_args.model_name_or_path
    if args.use_vllm and base_of_adapter(parse_place(name)) is not None:
        raise ValueError(f"vLLM cannot load {name!r}, which is an adapter: set use_vllm: false, or merge it first.")
    try:
        rewards = make_rewards(args)
        weights: dict[str, Any] = {"dtype": model_args.dtype, "load_in_4bit": model_args.load_in_4bit}
        model = load_causal_lm(name, revision=model_args.model_revision, **weights)
        trainer = _Trainer(
            model=model,
            reward_funcs=[*rewards],
            args=args,
            train_dataset=train,
            processing_class=tokenizer,
            peft_config=lora.lora_config(),
        )
    except (ImportError, NotImplementedError, RuntimeError) as error:
        # What TRL refuses: packages that are not there, settings that do not go together.
        raise ValueError(str(error)) from error
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ShortLog())
    return trainer


def _read(
    data: DataArguments, tokenizer: PreTrainedTokenizerBase, args: RLConfig
) -> tuple[datasets.Dataset, datasets.Dataset | None, dict[str, Any]]:
    """Rows to train on, held-out rows of tokens, and what was read, told."""
    rows, qa = load_rows(data)
    told: dict[str, Any] = {**told_of(data, qa)}
    rows, held_out, _ = split_rows(rows, data, args.selection)
    measured = None
    if held_out is not None:
        held_out = held_out.select(range(min(len(held_out), MEASURED_DOCUMENTS)))
        text = add_text(held_out, template=data.template, tokenizer=tokenizer)
        measured, _ = tokenize_documents(text, tokenizer, 2048)
    train, prompts = prompt_rows(rows, data.template, tokenizer, args.max_prompt_length)
    told["prompts"] = prompts.describe()
    told |= {name: getattr(prompts, name) for name in ("unverifiable", "too_long", "largest_token")}
    for name in ("rows", "prompts"):
        print(f"{name}: {told[name]}", flush=True)
    return train, measured, told


def _write(output: Path, report: dict[str, Any], subject: str, completions: bool) -> None:
    moved = report["moved"]
    kept = [
        [step, *((f"{moved[step]['kl']:.4f}", f"{moved[step]['update_norm']:.2f}") if step in moved else ("", ""))]
        for step in report["steps"]
    ]
    table = markdown(["step", "KL(base, tuned)", "size of dW"], kept) if kept else "No step was kept."
    text = (
        f"# GRPO: {subject}\n\n{report['data']['rows']} {report['data']['prompts']}\n\n"
        f"Means over parts of the run, in {report['seconds']:,.0f} s:\n\n{log_table(report['log'])}\n\n"
        f"Adapters kept in `{STEPS}/`, measured on held-out text:\n\n{table}\n\n"
        "These rewards are of training problems. `resa-hf compare` or `resa-hf evaluate` tells whether an adapter "
        f"answers others better than its base.\n\n"
        f"{'Completions: `completions/*.parquet`.' if completions else 'No completions were kept.'}\n\n"
        "![By step](report.png)\n"
    )
    write_whole(output / "report.md", text)
    plot_log(report["log"], output / "report.png", subject)
    write_json(output / "report.json", report)
