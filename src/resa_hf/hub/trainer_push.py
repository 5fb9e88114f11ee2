"""What a trainer itself knows of what it has trained, and its way to the Hub."""

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, constants
from peft import PeftModel

from ..cards import adapter_card, sae_card
from ..evaluation.tables import finite
from ..experiment.report import versions
from ..sae.trainer import SAETrainer
from ..tuning.trainer import SAETuningTrainer
from .adapter_repo import stage_adapter, with_base, write_card
from .folder_contents import Found, sae_quality_of
from .licences import Licence
from .record import Record
from .retries import patiently, publish_errors
from .sae_repo import stage_saes
from .staging import staged
from .upload import upload

Trained = SAETrainer | SAETuningTrainer


def push(
    trainer: Trained, message: str, blocking: bool, token: str | None, revision: str | None, private: bool | None
) -> CommitInfo | Future[CommitInfo] | None:
    """The work of [`~resa_hf.pushing.PushToHub.push_to_hub`]."""
    args = trainer.args
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    token = token or args.hub_token
    repo_id = _repo_id(trainer, token)
    found = found_of(trainer)
    with staged(Path(str(args.output_dir)), repo_id) as stage:
        if isinstance(trainer, SAETrainer):
            stage_saes(stage, repo_id, found, sparsify=False, token=token)
        else:
            found = dataclasses.replace(found, record=with_base(found.record, None, token=token))
            stage_adapter(stage, found)
            write_card(stage, repo_id, found, None, merged=False, token=token)
    private = args.hub_private_repo if private is None else private
    call = partial(upload, stage, repo_id, private=bool(private), message=message, token=token)
    call = partial(call, branch=revision or args.hub_revision)
    return call() if blocking else HfApi().run_as_future(call)


def make_repo(trainer: Trained, make: Callable[..., None], token: str | None, private: bool | None) -> None:
    """The work of [`~resa_hf.pushing.PushToHub.init_hf_repo`]; `make` is the Trainer's own."""
    name = trainer.args.hub_model_id or Path(str(trainer.args.output_dir)).absolute().name
    with publish_errors(f"The repository {name}, of push_to_hub, cannot be made.", token or trainer.args.hub_token):
        patiently(partial(make, token, private))


def write_draft(trainer: Trained) -> None:
    """The work of [`~resa_hf.pushing.PushToHub.create_model_card`]; nothing is asked of the Hub."""
    if not trainer.is_world_process_zero():
        return
    folder, name = Path(str(trainer.args.output_dir)), trainer.args.hub_model_id
    repo_id, found = name or folder.name, found_of(trainer)
    if isinstance(trainer, SAETrainer):
        card = sae_card(repo_id, found.record, Licence())
    else:
        adapted: PeftModel = trainer.accelerator.unwrap_model(trainer.model)
        config = _plain(adapted.active_peft_config.to_dict())
        card = adapter_card(repo_id, found.record, Licence(), adapter_config=config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / constants.REPOCARD_NAME).write_text(card, encoding="utf-8")


def found_of(trainer: Trained) -> Found:
    """
    What the trainer saves, and what it knows: its settings, its log, the last evaluation, and which models and SAE it
    read. Not its dataset: a [`~datasets.Dataset`] from the Hub does not say which repository and commit it is.
    """
    args, folder = trainer.args, Path(str(trainer.args.output_dir))
    # New TrainingArguments would otherwise reset accelerate's state, which the trainer is using.
    usual = type(args)(output_dir=args.output_dir, accelerator_config={"use_configured_state": True}).to_dict()
    unsaid = ("hub_token", "accelerator_config")
    changed = {key: value for key, value in args.to_dict().items() if value != usual[key] and key not in unsaid}
    settings = _plain({"output_dir": args.output_dir, "seed": args.seed, **changed})
    log = trainer.state.log_history
    measured = next((entry for entry in reversed(log) if "eval_loss" in entry), {})
    report = _plain({"settings": settings, "held_out": measured, "log": log, "versions": versions()})
    record = Record(report=report, seed=args.seed, recipe=settings, revisions=trainer.revisions)
    if isinstance(trainer, SAETrainer):
        saes = {
            hookpoint: {"d_in": sae.d_in, "num_latents": sae.num_latents, "k": sae.k}
            | sae_quality_of(measured, hookpoint)
            for hookpoint, sae in trainer.saes.items()
        }
        return Found(dataclasses.replace(record, saes=saes), saes=folder)
    return Found(record, adapter=folder)


def _plain(value: Any) -> Any:
    """As JSON and YAML can hold it."""
    return finite(json.loads(json.dumps(value, default=_plain_one)))


def _plain_one(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _repo_id(trainer: Trained, token: str | None) -> str:
    """`args.hub_model_id`, or the output folder's name; the user's own if it names no owner."""
    name = trainer.args.hub_model_id or Path(str(trainer.args.output_dir)).absolute().name
    if "/" in name:
        return name
    with publish_errors(f"{name} was not published.", token):
        return f"{patiently(HfApi(token=token).whoami)['name']}/{name}"
