"""What a folder holds that can be published: an adapter, SAEs, and what their reports say of them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from jinja2 import TemplateError

from ..errors import PublishError, ResaError
from ..escaping import without_token
from ..experiment.arms import Arm, Candidate, run_recipe
from ..experiment.folder import RunFolder, read_json
from ..experiment.stages import ADAPTER, STAGE1
from ..sae.checkpoint import list_saes
from ..sae.layouts import CONFIG_FILE
from .matching_evaluation import evaluated_as
from .record import Record

REPORT, ADAPTER_CONFIG = "report.json", "adapter_config.json"


@dataclass(frozen=True)
class Found:
    """What can be published of a folder.

    Args:
        record ([`Record`]): of the adapter, if there is one; of the SAEs otherwise.
        adapter (`Path`, *optional*): folder with `adapter_config.json`.
        saes (`Path`, *optional*): folder with one folder a hookpoint, or with a single SAE.
        report (`Path`, *optional*): folder with `report.json`, and with its text and picture where they exist.
        evaluation (`Path`, *optional*): the same of the evaluation.
        trained_with ([`Found`], *optional*): of an adapter, the SAEs that lie on this machine.
    """

    record: Record
    adapter: Path | None = None
    saes: Path | None = None
    report: Path | None = None
    evaluation: Path | None = None
    trained_with: "Found | None" = None


def find(folder: Path, *, arm: str | None = None, seed: int | None = None, evaluation: Path | None = None) -> Found:
    """
    Looks into the output of `run`, `compare`, `demo`, `tune` or `train-sae`, or into a plain folder of an adapter or
    of SAEs, of which nothing is then known but what is in their own files.

    Args:
        folder (`Path`):
            The folder.
        arm (`str`, *optional*):
            Of a run: whose adapter. `None`: the only trained one's.
        seed (`int`, *optional*):
            Of a run: which one. `None`: the first.
        evaluation (`Path`, *optional*):
            `report.json` of `resa-hf evaluate`, of this adapter.

    Raises:
        `PublishError`: if there is nothing to publish, if it is not clear what, or if the evaluation is of another
            adapter.
    """
    if not folder.is_dir():
        raise PublishError(f"There is no folder {folder}.")
    report = read_report(folder / REPORT) if (folder / REPORT).is_file() else None
    if report is not None and "arms" in report:
        with reading_reports(folder):
            found = _in_run(folder, report, arm, seed)
    elif arm is not None or seed is not None:
        raise PublishError(f"--arm and --seed choose among the arms of a run, and {folder} holds none.")
    else:
        found = _single(folder, report)
    if evaluation is None:
        return found
    if found.adapter is None:
        raise PublishError(f"{evaluation} evaluates adapters, and {folder} holds none.")
    measured = read_report(evaluation)
    name = evaluated_as(found.adapter, measured, evaluation)
    return replace(
        found, record=replace(found.record, evaluation=measured, evaluated_as=name), evaluation=evaluation.parent
    )


@contextmanager
def reading_reports(folder: Path) -> Iterator[None]:
    """Says that a report is damaged where the block finds in it something else than it should hold."""
    try:
        yield
    except (ResaError, HFValidationError):
        raise
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RecursionError, TemplateError) as bad:
        raise PublishError(
            f"{folder / REPORT}, or another of our JSON files that it tells of, is damaged, or of another version of "
            f"resa-hf: {bad!r}. Run the same command again: it repeats nothing but the report."
        ) from bad


def read_report(path: Path) -> dict[str, Any]:
    """Reads a report.json, or another of our JSON files, without the `hub_token` that its settings may hold.

    Raises:
        `PublishError`: if it is none.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise PublishError(f"{path} is not a report of resa-hf: {error}") from error
    if not isinstance(content, dict):
        raise PublishError(f"{path} is not a report of resa-hf: it must hold a JSON object.")
    return dict(without_token(content))


def _in_run(folder: Path, report: Mapping[str, Any], wanted: str | None, seed: int | None) -> Found:
    settings = report["settings"]
    run, arms = settings["run"], [Arm(**entry) for entry in settings["arms"]]
    arm = _chosen(arms, wanted)
    seed = run["seeds"][0] if seed is None else seed
    if seed not in run["seeds"]:
        raise PublishError(f"The run has no seed {seed}; its seeds are {', '.join(map(str, run['seeds']))}.")
    candidate = {line["name"]: line["candidate"] for line in report["arms"]}[arm.name]
    candidate = None if candidate is None else Candidate(**candidate)
    places = RunFolder.open(folder)
    adapter = places.arm(arm, candidate, seed) / ADAPTER
    if not os.path.isfile(adapter / ADAPTER_CONFIG):  # False, and no error, for what is too long to be a path
        raise PublishError(f"Arm {arm.name!r} has no adapter: there is no {adapter / ADAPTER_CONFIG}.")
    record = Record(
        report=report,
        arm=arm.name,
        seed=seed,
        recipe=run_recipe(settings),
        revisions=_revisions(report, adapter),
    )
    found = Found(record, adapter, report=folder)
    if arm.sae_from == "pretrained" and os.path.isdir(run["sae"]):
        return replace(found, trained_with=_saes_alone(Path(run["sae"])))
    has_source = run["source_model"] is not None or run["source_adapter"] is not None
    saes = places.sae(arm.sae_from if has_source else "source", seed)
    if arm.sae_from not in ("source", "base") or not os.path.isfile(saes / STAGE1):
        return found
    # Of the models, that which this SAE has read; and the data.
    data = {role: read for role, read in record.revisions.items() if role.endswith("dataset")}
    read = read_report(saes / STAGE1).get("revisions", {})
    known = replace(record, revisions={**read, **data}, saes=sae_facts(saes))
    return replace(found, trained_with=Found(known, saes=saes, report=folder))


def _chosen(arms: Sequence[Arm], wanted: str | None) -> Arm:
    trained = [arm for arm in arms if arm.is_trained]
    if wanted is None and len(trained) == 1:
        return trained[0]
    for arm in arms:
        if arm.name == wanted:
            return arm
    asked = "Several arms were trained" if wanted is None else f"There is no arm {wanted!r}"
    raise PublishError(f"{asked}: name one by --arm: {', '.join(repr(arm.name) for arm in arms)}.")


def _single(folder: Path, report: Mapping[str, Any] | None) -> Found:
    """The output of `tune` or `train-sae`, or a plain folder."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return _saes_alone(folder)
    settings = {} if report is None else report.get("settings", {})
    revisions = _revisions(report or {}, folder)
    record = Record(report=report, seed=settings.get("seed"), recipe=settings, revisions=revisions)
    found = Found(record, folder, report=None if report is None else folder)
    if settings.get("sae") is None or not os.path.isdir(settings["sae"]) or not own_saes(Path(settings["sae"])):
        return found
    return replace(found, trained_with=_saes_alone(Path(settings["sae"])))


def _saes_alone(folder: Path) -> Found:
    """The output of `train-sae`, one SAE of it, or a plain folder of SAEs."""
    names = own_saes(folder)
    if not names:
        raise PublishError(
            f"{folder} holds nothing to publish: neither {ADAPTER_CONFIG} nor an SAE. Name the output folder of run, "
            "compare, demo, tune or train-sae."
        )
    home = folder.parent if names == ["."] else folder
    report = read_report(home / REPORT) if (home / REPORT).is_file() else {}
    settings = report.get("settings", {})
    if "hookpoints" not in settings:
        # Not the report of their training.
        metadata = read_report(folder / names[0] / CONFIG_FILE).get("metadata", {})
        read = {"name": metadata.get("model_name"), "commit": metadata.get("model_revision")}
        revisions = {} if read["name"] is None else {"base": read}
        return Found(Record(revisions=revisions, saes=sae_facts(folder)), saes=folder)
    record = Record(
        report=report,
        seed=settings.get("seed"),
        recipe=settings,
        revisions=report.get("revisions", {}),
        saes=sae_facts(folder),
    )
    return Found(record, saes=folder, report=home)


def _revisions(report: Mapping[str, Any], adapter: Path) -> dict[str, Any]:
    """What the report says was read; without one, what the adapter itself says of its base."""
    config = read_report(adapter / ADAPTER_CONFIG)
    base = {"name": config.get("base_model_name_or_path"), "commit": config.get("revision")}
    return {"base": base, **report.get("revisions", {})}


def own_saes(folder: Path) -> list[str]:
    """The SAEs of a folder, without those of checkpoints in it and of what was published from it."""
    return [name for name in list_saes(folder) if "/" not in name]


def sae_facts(folder: Path) -> dict[str, dict[str, Any]]:
    """By hookpoint what `Record.saes` holds: sizes from cfg.json, quality from the report of the training."""
    measured: Mapping[str, Any] = {}
    reports = [(folder / STAGE1, "quality"), (folder / REPORT, "held_out"), (folder.parent / REPORT, "held_out")]
    for path, key in reports:
        if path.is_file() and not measured:
            measured = read_report(path).get(key) or {}
    facts = {}
    for name in own_saes(folder):
        config = read_report(folder / name / CONFIG_FILE)
        metadata = config.get("metadata", {})
        hookpoint = metadata.get("hookpoint") or (folder / name).resolve().name
        facts[hookpoint] = {
            "d_in": config.get("d_in"),
            "num_latents": config.get("d_sae") or config.get("num_latents"),  # sae-lens' word, and sparsify's
            "k": config.get("k"),
            "hook_name": metadata.get("hook_name"),
            **sae_quality_of(measured, hookpoint),
        }
    return facts


def sae_quality_of(measured: Mapping[str, Any], hookpoint: str) -> dict[str, float]:
    """What an evaluation of Stage I says of one SAE: `eval_fvu/layers.12` and so on, as `fvu`."""
    keys = {key: f"eval_{key}/{hookpoint}" for key in ("fvu", "l0", "dead_share", "ce_recovered")}
    return {key: measured[at] for key, at in keys.items() if measured.get(at) is not None}
