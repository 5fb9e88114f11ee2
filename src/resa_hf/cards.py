"""Model cards of adapters, merged models and SAEs, from plain data: what their reports say, and nothing else.

What a user or a repository has named is put into them by [`escaping`]. `.eval_results/` is not written: the Hub takes
there only results on datasets that are registered as benchmarks, with their task's id
(huggingface.co/docs/hub/eval-results), and a report knows neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .escaping import as_yaml, code, plain, prose
from .evidence import Evidence, evidence_of_evaluation, evidence_of_run

if TYPE_CHECKING:
    from .hub.licences import Licence
    from .hub.record import Record

_REPO = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*", re.ASCII)
_DATASETS = ("dataset", "trigger_dataset")
_QUALITY = {"fvu": "FVU", "l0": "L0", "dead_share": "dead share", "ce_recovered": "CE recovered"}
_SIZES = {"d_in": "d_in", "num_latents": "latents", "k": "k"}


def adapter_card(
    repo_id: str,
    record: Record,
    licence: Licence,
    *,
    adapter_config: Mapping[str, Any],
    sae_repo: str | None = None,
    merged: bool = False,
) -> str:
    """
    The README.md of an adapter, or of a model that it was merged into.

    Args:
        repo_id (`str`): where it is published.
        record ([`~hub.record.Record`]): the evidence.
        licence ([`~hub.licences.Licence`]): the base's.
        adapter_config (`Mapping`): content of adapter_config.json.
        sae_repo (`str`, *optional*): the Hub repository of the SAE that it was trained with.
        merged (`bool`, *optional*, defaults to `False`): whether the repository holds the merged model.
    """
    found = _evidence(record)
    base = record.revisions.get("base", {"name": adapter_config.get("base_model_name_or_path"), "commit": None})
    method = "grpo" if "reward_funcs" in record.recipe else "sae-tuning"
    tags = ["resa-hf", *([method, "trl"] if _is_ours(record) else []), *([] if merged else ["lora"])]
    data = _metadata(
        record,
        licence,
        ("base",),
        tags=tags,
        relation="finetune" if merged else "adapter",
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        **_results(repo_id, record, found),
    )
    # A verdict that speaks against the adapter is not to be found below one that speaks for it.
    found = sorted(found, key=lambda one: one.word == "better")
    return _render(
        "adapter.md",
        data,
        record,
        licence,
        repo_id=repo_id,
        config=adapter_config,
        sae_repo=sae_repo,
        merged=merged,
        found=found,
        base=base,
        quality=_quality(_trained_with(record)),
        origins=_origins(record, licence, "base"),
        benchmarks=_benchmarks,
        trained=_training(record),
        chat=record.recipe.get("template") == "chat",  # then the base has a chat template
    )


def sae_card(repo_id: str, record: Record, licence: Licence, *, sparsify: bool = False) -> str:
    """
    The README.md of a repository of SAEs, one folder a hookpoint.

    Args:
        repo_id (`str`): where it is published.
        record ([`~hub.record.Record`]): the evidence.
        licence ([`~hub.licences.Licence`]): that of the model whose activations the SAEs were trained on.
        sparsify (`bool`, *optional*, defaults to `False`): whether its folders hold sparsify's weights, too.
    """
    read = "base" if _training(record).get("sae_from") == "base" or "source" not in record.revisions else "source"
    topk = all(sae.get("k") is not None for sae in record.saes.values())
    tags = ["resa-hf", "sparse-autoencoder", *(["topk"] if topk else [])]
    data = _metadata(record, licence, (read, f"{read}_adapter"), tags=tags, library_name="saelens")
    return _render(
        "sae.md",
        data,
        record,
        licence,
        repo_id=repo_id,
        sparsify=sparsify,
        topk=topk,
        read=read,
        quality=_quality(record.saes),
        origins=_origins(record, licence, read),
    )


def _render(template: str, data: ModelCardData, record: Record, licence: Licence, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("resa_hf"), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template(template).render(
        card_data=data.to_yaml(),
        record=record,
        report=record.report or {},
        licence=licence,
        revisions=record.revisions,
        is_ours=_is_ours(record),
        **values,
        **{"code": code, "prose": prose, "as_yaml": as_yaml, "link": _link, "on_hub": _on_hub},
    )
    return str(ModelCard(re.sub(r"\n{3,}", "\n\n", text)))


def _metadata(
    record: Record, licence: Licence, bases: tuple[str, ...], relation: str | None = None, **values: Any
) -> ModelCardData:
    names = {role: str(entry["name"]) for role, entry in record.revisions.items() if _on_hub(entry)}
    base_model = [names[role] for role in bases if role in names]
    return ModelCardData(
        base_model=base_model[0] if len(base_model) == 1 else base_model or None,
        base_model_relation=relation if base_model else None,
        datasets=list(dict.fromkeys(names[role] for role in _DATASETS if role in names)) or None,
        license=None if licence.id == "unknown" else licence.id,
        license_name=licence.name,
        license_link=licence.link,
        **values,
    )


def _on_hub(entry: Mapping[str, str | None]) -> bool:
    """Whether others can load it. Without a commit, the name may be that of a folder on somebody's machine."""
    return entry["commit"] is not None and _is_repo_name(entry)


def _is_repo_name(entry: Mapping[str, str | None]) -> bool:
    name = str(entry["name"])
    return _REPO.fullmatch(name) is not None and not name.startswith("resa_hf/")


def _link(entry: Mapping[str, str | None], dataset: bool = False) -> str:
    name = "/".join(str(entry[key]) for key in ("name", "subfolder") if entry.get(key))
    if not _on_hub(entry):
        return code(name)
    return f"[{prose(name)}](https://huggingface.co/{'datasets/' if dataset else ''}{entry['name']})"


def _origins(record: Record, licence: Licence, licensed: str) -> list[list[str]]:
    """What it was made from, a row each: role, name, commit, licence (of the role `licensed`)."""
    rows = []
    for role, entry in record.revisions.items():
        commit = entry["commit"]
        terms = {licensed: licence.name or licence.id}
        if role in _DATASETS:
            terms[role] = licence.datasets.get(str(entry["name"])) or "unknown"
        rows.append(
            [
                prose(role.replace("_", " ")),
                _link(entry, dataset=role in _DATASETS),
                _unrecorded(entry) if commit is None else code(commit),
                code(terms[role]) if role in terms else "",
            ]
        )
    return rows


def _unrecorded(entry: Mapping[str, str | None]) -> str:
    return "not recorded" if "/" in str(entry["name"]) and _is_repo_name(entry) else "not on the Hub"


def _benchmarks(one: Evidence) -> list[list[str]]:
    """What it was evaluated on, a row each: task, dataset, commit."""
    return [
        [code(task), _link(entry, dataset=True), code(entry["commit"] or "not pinned")]
        for task, entry in one.benchmarks.items()
    ]


def _trained_with(record: Record) -> Mapping[str, Mapping[str, Any]]:
    """Of the SAEs of its run, that which it was trained with, where that is told."""
    name = str(_training(record).get("sae_id"))
    return {name: record.saes[name]} if name in record.saes else record.saes


def _quality(saes: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the SAEs' table; what was measured of none has no column."""
    keys = [key for key in (*_SIZES, *_QUALITY) if any(sae.get(key) is not None for sae in saes.values())]
    rows = [
        [code(hookpoint), *("" if (value := sae.get(key)) is None else _number(value) for key in keys)]
        for hookpoint, sae in saes.items()
    ]
    return ["hookpoint", *({**_SIZES, **_QUALITY}[key] for key in keys)], rows


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _is_ours(record: Record) -> bool:
    """Whether it is known to be trained by resa-hf: a plain folder's adapter or SAE may come from anywhere."""
    return bool(record.report or record.recipe)


def _training(record: Record) -> dict[str, Any]:
    """The settings of Stage II that made it, and `sae_from` as in an arm: `None` where that is not known."""
    recipe = record.recipe
    arm = recipe.get("arms", {}).get(record.arm)
    if arm is not None:
        taken = {"sae_id": recipe.get("sae_id")} if arm.get("sae_from") == "pretrained" else {}
        return {**taken, **recipe.get("stage2", {}), **arm}
    # A trainer may have been given its SAE as a module, of which its settings know nothing.
    known = "pretrained" if recipe.get("sae") else "none" if recipe.get("kl_weight") == 0 else None
    return {"sae_from": known, **recipe}


def _evidence(record: Record) -> list[Evidence]:
    """What its reports say of the adapter: of this very one first."""
    found = []
    if record.evaluation is not None and record.evaluated_as is not None:
        found.append(evidence_of_evaluation(record.evaluation, record.evaluated_as))
    if record.report is not None and record.arm is not None and "arms" in record.report:
        found.append(evidence_of_run(record.report, record.arm, record.seed))
    return found


def _results(repo_id: str, record: Record, found: Sequence[Evidence]) -> dict[str, Any]:
    """The accuracies on the Hub's datasets as its metadata have them; none that the card itself warns of."""
    if not found or found[0].doubts:
        return {}
    one, results = found[0], []
    for task, accuracy in one.accuracies.items():
        held_out = task == "held_out"
        entry = record.revisions.get("dataset") if held_out else one.benchmarks.get(task)
        if entry is None or not (_on_hub(entry) if held_out else _is_repo_name(entry)):
            continue
        pretty = f"held-out questions of {entry['name']}" if held_out else task.removeprefix("resa:")
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=str(entry["name"]),
                dataset_name=plain(pretty),
                dataset_split=plain(str(record.recipe.get("dataset_split", "train"))) if held_out else None,
                dataset_revision=entry["commit"],
                metric_type="accuracy",
                metric_name=one.metric,
                metric_value=round(accuracy, 4),
            )
        )
    return {"model_name": repo_id.rpartition("/")[2], "eval_results": results} if results else {}
