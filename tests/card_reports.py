"""Reports as the commands write them, of answers drawn at random, and the records that cards are made of."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from resa_hf.evaluation.engine import Sampling
from resa_hf.experiment.arms import BASE, Arm, Candidate
from resa_hf.experiment.folder import RunFolder, read_json, write_json
from resa_hf.experiment.plan import plan
from resa_hf.experiment.report import write_report
from resa_hf.experiment.results import collect
from resa_hf.experiment.settings import RunArguments, RunSettings
from resa_hf.hub.record import Record

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "89abcdef0123456789abcdef0123456789abcdef"
REVISIONS = {
    "base": {"name": "owner/base-1.5b", "commit": COMMIT},
    "source": {"name": "owner/source", "commit": OTHER},
    "dataset": {"name": "owner/questions", "commit": OTHER},
}
SAES = {
    "layers.1": {"d_in": 32, "num_latents": 1024, "k": 16, "hook_name": "blocks.1.hook_resid_post", "fvu": 0.123456},
    "layers.2": {"d_in": 32, "num_latents": 1024, "k": 16, "hook_name": "blocks.2.hook_resid_post", "l0": 15.5},
}
CHOSEN = Candidate(1e-4)
PROBLEMS = 200


def run_report(
    folder: Path,
    shares: Mapping[str, float],
    *,
    arms: Sequence[Arm] | None = None,
    seeds: Sequence[int] = (0,),
    tasks: Sequence[str] = ("held_out",),
    tried: Sequence[str] = (),
    truncated: float = 0.0,
    **run: Any,
) -> dict[str, Any]:
    """report.json of a run whose arms get the given shares of right answers; the base gets half."""
    arms = arms or [Arm(name, tuning={"control": "noise"} if "noise" in name else {}) for name in shares]
    defaults = {"model_name_or_path": "owner/base-1.5b", "source_model": "owner/source", "dataset": "owner/questions"}
    named = None if list(tasks) == ["held_out"] else list(tasks)
    arguments = RunArguments(
        **{**defaults, "seeds": list(seeds), "selection": 9, "template": "chat", "tasks": named, **run}
    )
    settings = RunSettings(arguments, {"hookpoints": ["layers.1"]}, {}, Sampling(), list(arms))
    places, rng = RunFolder(folder), np.random.default_rng(0)
    for seed in seeds:
        base = rng.random(PROBLEMS) < 0.5
        for arm in (BASE, *arms):
            # The arm is right where the base is, and elsewhere as often as its share asks for; or wrong, likewise.
            flips, more = (
                rng.random(PROBLEMS) < 2 * abs(shares.get(arm.name, 0.5) - 0.5),
                shares.get(arm.name, 0) > 0.5,
            )
            correct = np.where(flips, more, base)
            place = places.arm(arm, CHOSEN if arm.is_trained or arm.like else None, seed)
            for index, task in enumerate(tasks):
                _write_answers(
                    place / "answers" / "held_out" / f"{index}.jsonl", task, np.roll(correct, index), truncated
                )
            write_json(place / "movement.json", {"kl": 0.01, "update_norm": 2.0})
            if arm.is_trained:
                evaluations = [{"step": 0, "eval_kl": 0.5}, {"step": 9, "eval_kl": 0.1}]
                tuning = {"seconds": 20.0 + seed, "tokens": 10, "steps": 9, "evaluations": evaluations}
                write_json(place / "tuning.json", tuning)
        for source in ("source", "base"):
            stage1 = {"seconds": 100.0, "tokens": 9, "quality": {"eval_fvu/layers.1": 0.1}}
            write_json(places.sae(source, seed) / "stage1.json", stage1)
    data = {
        "dataset": "owner/questions", "rows": "200 of 200 rows can be used.", "fingerprint": "f" * 64,
        "train_rows": 100, "held_out_rows": PROBLEMS, "tokens": {"train": {"describe": "100 documents."}},
    }  # fmt: skip
    choice = {arm.name: dict.fromkeys(tried, 0.5) for arm in arms} if tried else {}
    results = collect(places, settings, {arm.name: CHOSEN for arm in arms if arm.is_trained})
    planned = plan(dict.fromkeys(tasks, (PROBLEMS, 1)), len(seeds))
    with mock.patch("resa_hf.experiment.report.plot_comparison"):
        write_report(places, settings, results, data, choice, planned)
    return dict(read_json(folder / "report.json"))


def _write_answers(path: Path, task: str, correct: np.ndarray, truncated: float) -> None:
    rows = [
        {
            "problem": str(i), "completions": ["x"], "correct": [bool(right)], "lengths": [7],
            "truncated": [i < truncated * len(correct)],
        }
        for i, right in enumerate(correct)
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in [{"task": task, "seconds": 1.0}, *rows]) + "\n")


def recipe_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a run's report, as `--config` takes it."""
    settings = report["settings"]
    keys = ("sae_from", "known", "like", "adapter", "text")
    arms = {
        arm["name"]: {**{key: arm[key] for key in keys if arm.get(key) is not None}, **arm["tuning"]}
        for arm in settings["arms"]
    }
    return {**settings["run"], **{key: settings[key] for key in ("stage1", "stage2", "sampling")}, "arms": arms}


def record_of(report: Mapping[str, Any], arm: str, **changes: Any) -> Record:
    """The record of an arm's adapter of the run's first seed."""
    known: dict[str, Any] = {
        "report": report, "arm": arm, "seed": report["settings"]["run"]["seeds"][0], "recipe": recipe_of(report),
        "revisions": REVISIONS, "saes": SAES,
    }  # fmt: skip
    return Record(**known | changes)
