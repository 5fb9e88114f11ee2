"""Files of output folders, which commands wrote and a later one reads: to go on, to publish, to show."""

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from fuzz_parsers import Parser
from tree_mutations import byte_changes, json_changes, line_changes

from resa_hf.commands.recipe import parse_flat, parse_run
from resa_hf.evaluation.arguments import EvaluateArguments
from resa_hf.evaluation.cost import Cost, current_device
from resa_hf.evaluation.engine import Outcomes
from resa_hf.experiment.folder import RunFolder, claim, write_json
from resa_hf.experiment.manifest import note_start
from resa_hf.experiment.together import Task, work_through
from resa_hf.explore.layers import layers_html
from resa_hf.explore.results import _read, adapters_of, recipe_of, result_html, saes_of
from resa_hf.features.arguments import FeatureArguments
from resa_hf.hub.arguments import PublishArguments
from resa_hf.tiny.task import training_questions

_TUNED = "arms/sae-tuning/1e-03/seed-0"
_ANSWERS = "answers/held_out/held_out.jsonl"


def _results(folder: Path) -> None:
    """A run, a sweep and features, by the commands, in a process of its own: training leaves threads behind."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])}
    subprocess.run(
        [sys.executable, str(here / "explorer_results.py"), str(folder)],
        check=True, capture_output=True, env=environment, cwd=folder,
    )  # fmt: skip
    text = {"asked": 1, "kept": 1, "tokens": 5, "seconds": 1.0}
    write_json(folder / "run/text/source/seed-0/text.json", text)  # as if an arm had been trained on it
    for path in folder.rglob("cache-*.arrow"):
        path.unlink()


# A dataset of seconds, always the same.
_known = cache(training_questions)
_quickly = partial(mock.patch, "resa_hf.tiny.task.training_questions", _known)


def _again(folder: Path) -> None:
    """The run started again: everything is there, and is read."""
    from resa_hf.experiment.pipeline import run_experiment

    settings = parse_run(["--config", str(folder / "run.yaml")], "run", "")
    settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, output_dir=str(folder / "run")))
    with _quickly(), mock.patch("resa_hf.experiment.report.plot_comparison"):
        run_experiment(RunFolder(folder / "run"), settings)


def _sweep_again(folder: Path) -> None:
    from resa_hf.commands.grid import parse_sweep
    from resa_hf.experiment.sweep import run_points
    from resa_hf.experiment.sweep_checks import check_sweep
    from resa_hf.experiment.sweep_report import report_once

    since = time.time()
    sweep = parse_sweep(["--config", str(folder / "sweep.yaml"), "--output_dir", str(folder / "sweep")], "sweep", "")
    check_sweep(sweep)
    plots = [mock.patch(f"resa_hf.experiment.{module}.plot_comparison") for module in ("report", "sweep_report")]
    with _quickly(), plots[0], plots[1]:
        report_once(sweep, run_points(sweep, since), since)


def _features_again(folder: Path) -> None:
    from resa_hf.experiment.features_report import run_features

    (args,), _ = parse_flat((FeatureArguments,), ["--config", str(folder / "features.yaml")], "features", "")
    with _quickly():
        run_features(dataclasses.replace(args, output_dir=str(folder / "features")))


def _publish(folder: Path) -> None:
    from resa_hf.hub.publish import publish

    args = PublishArguments(
        folder=str(folder / "run"), repo_id="you/adapter", sae_repo_id="you/saes", base="you/base", arm="SAE-Tuning"
    )
    publish(args, dry_run=True)


def _stages(folder: Path) -> None:
    """Reports of `train-sae` and `tune`, beside what they are about."""
    from adapter_files import save_adapter
    from conftest import _make_model
    from sae_files import make_sae

    from resa_hf.sae.checkpoint import save_sae

    told = {"dataset": "you/rows", "fingerprint": "f" * 64, "rows": "9 of 9 rows can be used."}
    revisions = {"base": {"name": "you/base", "commit": None}, "dataset": {"name": "you/rows", "commit": "c" * 40}}
    more: dict[str, Any] = {
        "costs": {"Stage I": Cost(3.0, 4000).as_plain()}, "revisions": revisions, "data": told, "moved": {},
        "log": [{"loss": 1.5, "step": 1}], "device": current_device(), "versions": {"torch": "2.13"},
        "seconds": 3.0, "tokens": 4000,
    }  # fmt: skip
    save_sae(make_sae(), folder / "saes" / "layers.1")
    stage1 = {"hookpoints": ["layers.1"], "model_name_or_path": "you/base", "seed": 0}
    measured = {"eval_fvu/layers.1": 0.25, "eval_l0/layers.1": 4.0}
    write_json(folder / "saes" / "report.json", {"settings": stage1, "held_out": measured, **more})
    save_adapter(folder / "tuned", _make_model("qwen2", num_hidden_layers=1))
    stage2 = {"model_name_or_path": "you/base", "sae": str(folder / "saes"), "seed": 0, "learning_rate": 1e-4}
    write_json(folder / "tuned" / "report.json", {"settings": stage2, "held_out": {"eval_loss": 1.5}, **more})


def _evaluated(folder: Path) -> None:
    """The same, and an evaluation of the adapter against another, by lighteval's part of the package."""
    from resa_hf.experiment.evaluate import Evaluated, Evaluation
    from resa_hf.experiment.evaluate_report import write_evaluation
    from resa_hf.hub.matching_evaluation import update_norms

    _stages(folder)
    shutil.copytree(folder / "tuned", folder / "other")
    (folder / "evaluated").mkdir()
    args = EvaluateArguments(
        model_name_or_path="you/base", adapters=[str(folder / "tuned")], controls=[str(folder / "other")],
        tasks=["resa:aime24"], samples=4, output_dir=str(folder / "evaluated"),
    )  # fmt: skip
    generator = np.random.default_rng(0)
    moved = {"kl": 0.1, "update_norm": 2.0, "update_norms": update_norms(folder / "tuned")}
    models = [
        Evaluated(name, {"resa:aime24": _answered(share, generator)}, norms)
        for name, share, norms in [("base", 0.3, {}), (args.adapters[0], 0.6, moved), (args.controls[0], 0.6, {})]
    ]
    with mock.patch("resa_hf.experiment.evaluate_report.plot_comparison"):
        write_evaluation(args, Evaluation(models, {"text": "", "difference": 0.1}, {}))


def _answered(share: float, generator: np.random.Generator) -> Any:
    correct = generator.random((30, 4)) < share
    outcomes = Outcomes(correct, np.full((30, 4), 9), generator.random((30, 4)) < 0.1, [["x"] * 4] * 30)
    names = [str(number) for number in range(30)]
    return SimpleNamespace(
        task="resa:aime24", problems=names, prompts=names, outcomes=outcomes, answers=[["1"] * 4] * 30, seconds=2.0
    )


def _publish_single(folder: Path, name: str) -> None:
    from resa_hf.hub.publish import publish

    repo = {"sae_repo_id": "you/saes"} if name == "saes" else {"repo_id": "you/adapter", "base": "you/base"}
    evaluation = str(folder / "evaluated" / "report.json") if name == "evaluated" else None
    publish(
        PublishArguments(folder=str(folder / ("saes" if name == "saes" else "tuned")), evaluation=evaluation, **repo),
        dry_run=True,
    )


def _explore(folder: Path, name: str, repo: str | None = None) -> None:
    """As the explorer does: alone and among all layers; a `repo` makes it a stranger's, without a text of its own."""
    if repo is not None:
        (folder / name / "report.md").unlink(missing_ok=True)
    result = _read(folder / name, name, repo)
    for look in (adapters_of, saes_of, result_html, recipe_of):
        look(result)
    layers_html([result])


_SETTINGS: dict[str, Any] = {"run": {"dataset": "a", "seeds": [0], "output_dir": "x"}, "arms": [{"name": "ours"}]}


def _claimed(folder: Path) -> None:
    claim(folder, _SETTINGS)
    note_start(folder, _SETTINGS)
    RunFolder(folder, folder.parent / "shared" / "a", folder.parent / "shared" / "b", 2).note_shared()


def _opened(folder: Path) -> None:
    for place in RunFolder.open(folder).roots:
        assert place == folder or place.parent == folder.parent / "shared"


def _failed(folder: Path) -> None:
    (folder / "one.failed").write_text("It did not work.")


def _look_at_failure(folder: Path) -> None:
    """Of a task that another process has tried since the start."""
    done: list[str] = []
    tasks = [Task("one", lambda: done.append("one")), Task("two", lambda: done.append("two"), frozenset(["one"]))]
    assert work_through(tasks, folder, since=0.0).keys() == {"one", "two"} and not done


def _told(names: list[tuple[str, str]], parse: Callable[[Path], object], how: str) -> list[Parser]:
    kinds = {".json": json_changes, ".jsonl": line_changes}
    return [Parser(f"{how}: {name}", _results, file, parse, kinds[Path(file).suffix]) for name, file in names]


_STAGE1 = "sae/source/seed-0/stage1.json"
RUNS = [
    Parser("settings.json", _claimed, "settings.json", lambda folder: claim(folder, _SETTINGS), json_changes),
    Parser("manifest.json", _claimed, "manifest.json", lambda folder: note_start(folder, _SETTINGS), json_changes),
    Parser("shared.json", _claimed, "shared.json", _opened, json_changes),
    Parser("failure of a task", _failed, "one.failed", _look_at_failure, byte_changes),
    *_told(
        [("settings.json", "run/settings.json"), ("manifest.json", "run/manifest.json"),
         ("data.json", "run/data/data.json"), ("stage1.json", f"run/{_STAGE1}"),
         ("tuning.json", f"run/{_TUNED}/tuning.json"), ("movement.json", f"run/{_TUNED}/movement.json"),
         ("answers", f"run/{_TUNED}/{_ANSWERS}"), ("text.json", "run/text/source/seed-0/text.json"),
         ("revisions.json", "run/arms/base/untrained/seed-0/revisions.json")],
        _again, "run again",
    ),
    *_told(
        [("settings.json", "sweep/hookpoint-layers.1/settings.json"),
         ("tuning.json", f"sweep/hookpoint-layers.2/{_TUNED}/tuning.json"),
         ("answers", f"sweep/hookpoint-layers.2/{_TUNED}/{_ANSWERS}")],
        _sweep_again, "sweep again",
    ),
    *_told(
        [("settings.json", "features/settings.json"), ("answers.jsonl", "features/answers.jsonl"),
         *((f"{part}.json", f"features/parts/{part}.json")
           for part in ("layers", "quality", "attribution", "effects", "examples"))],
        _features_again, "features again",
    ),
    *_told(
        [("report.json", "run/report.json"), ("stage1.json", f"run/{_STAGE1}"),
         ("adapter_config.json", f"run/{_TUNED}/adapter/adapter_config.json"),
         ("cfg.json", "run/sae/source/seed-0/layers.2/cfg.json")],
        _publish, "publish a run",
    ),
    *(
        Parser(f"publish: report.json of {what}", make, f"{name}/report.json", partial(_publish_single, name=name),
               json_changes)
        for make, name, what in (
            (_stages, "saes", "train-sae"), (_stages, "tuned", "tune"), (_evaluated, "evaluated", "evaluate")
        )
    ),
    *(
        Parser(f"explorer: {name}'s report.json{whose}", make, f"{name}/report.json",
               partial(_explore, name=name, repo=repo), json_changes)
        for make, name in (
            (_results, "run"), (_results, "sweep"), (_results, "features"), (_stages, "saes"), (_stages, "tuned"),
            (_evaluated, "evaluated"),
        )
        for whose, repo in (("", None), (", a stranger's", "you/results"))
    ),
    Parser("explorer: report.md", _results, "run/report.md", partial(_explore, name="run"), byte_changes),
    Parser("explorer: a sweep's shared.json", _results, "sweep/hookpoint-layers.1/shared.json",
           partial(_explore, name="sweep"), json_changes),
    Parser("explorer: a point's report.json", _results, "sweep/hookpoint-layers.1/report.json",
           partial(_explore, name="sweep"), json_changes),
]  # fmt: skip
