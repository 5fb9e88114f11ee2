"""The card of an adapter that `resa-hf evaluate` has measured, from the report that it writes."""

import json
import re

import numpy as np
import pytest
from card_reports import REVISIONS
from huggingface_hub import ModelCard

pytest.importorskip("lighteval")

from resa_hf.cards import adapter_card
from resa_hf.evaluation.arguments import EvaluateArguments
from resa_hf.evaluation.engine import Outcomes
from resa_hf.evaluation.pipeline import TaskResult
from resa_hf.experiment.evaluate import Evaluated, Evaluation
from resa_hf.experiment.evaluate_report import write_evaluation
from resa_hf.hub.licences import Licence
from resa_hf.hub.record import Record

TASKS = {"resa:aime24": 30, "resa:mine": 50}


def result(task, share, generator):
    size = TASKS[task]
    correct = generator.random((size, 4)) < share
    problems = [str(i) for i in range(size)]
    outcomes = Outcomes(
        completions=[["x"] * 4] * size, correct=correct, lengths=np.full((size, 4), 9),
        truncated=generator.random((size, 4)) < 0.1,
    )  # fmt: skip
    return TaskResult(task, problems, problems, outcomes, [["1"] * 4] * size, 2.0)


@pytest.fixture
def report(tmp_path):
    generator = np.random.default_rng(0)
    mine, control = (tmp_path / "jane doe" / name for name in ("mine", "control"))
    for folder in (mine, control):
        folder.mkdir(parents=True)
    shares = {"base": 0.3, str(mine): 0.6, str(control): 0.6}
    models = [
        Evaluated(name, {task: result(task, share, generator) for task in TASKS}, {}) for name, share in shares.items()
    ]
    args = EvaluateArguments(
        model_name_or_path="owner/base-1.5b", adapters=[str(mine)], controls=[str(control)],
        tasks=list(TASKS), samples=4, output_dir=str(tmp_path),
    )  # fmt: skip
    write_evaluation(args, Evaluation(models, {"text": "", "difference": 0.1}, {}))
    return json.loads((tmp_path / "report.json").read_text())


def test_an_evaluation_is_told_in_full(report):
    line = report["models"][1]
    record = Record(evaluation=report, evaluated_as=line["name"], revisions=REVISIONS)
    card = ModelCard(adapter_card("me/x", record, Licence("mit"), adapter_config={"r": 1, "lora_alpha": 2}))
    assert line["name"].endswith("jane doe/mine")
    assert line["verdict"]["word"] == "better than base but not than each control"
    first = [text for text in card.text.splitlines() if text.strip()][1]
    assert first.startswith("> **Verdict: better than base but not than each control.** `mine` is better")
    assert "`control`" in first and "jane" not in str(card)
    assert "on this adapter, not on the method" in first
    rows = [row for row in card.text.splitlines() if row.startswith("| **`mine`**")]
    (numbers,) = (re.findall(r"[-+]?\d+\.\d", row) for row in rows)
    expected = [
        f"{100 * line['accuracy'][key]:.1f}" for key in ("estimate", "low", "high")
    ] + [f"{100 * line['difference'][key]:+.1f}" for key in ("estimate", "low", "high")]  # fmt: skip
    assert numbers[:6] == expected
    assert "80 problems (`resa:aime24`, `resa:mine`), 4 answers a problem" in card.text and "seed 0." in card.text
    cut = np.mean([detail["truncated"] for detail in line["tasks_detail"].values()])
    assert f"{100 * cut:.1f}% of its answers were cut at 32,768 new tokens" in card.text
    assert "The base: `owner/base-1.5b`, commit `not recorded`." in card.text
    assert [(one.dataset_type, one.metric_value) for one in card.data.eval_results] == [
        ("HuggingFaceH4/aime_2024", pytest.approx(line["tasks"]["resa:aime24"]["accuracy"]["estimate"], abs=5e-5))
    ]
    # Answers that never came to their end.
    for detail in line["tasks_detail"].values():
        detail["truncated"] = 0.6
    card = ModelCard(adapter_card("me/x", record, Licence("mit"), adapter_config={"r": 1, "lora_alpha": 2}))
    assert "More than half of its answers were cut" in card.text.split("**Verdict")[0]
