"""The tasks as lighteval runs them: in this process, and by its own command."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

pytest.importorskip("lighteval")

from gpqa_rows import gpqa_rows
from lighteval.logging.evaluation_tracker import EvaluationTracker
from lighteval.models.abstract_model import ModelConfig
from lighteval.pipeline import ParallelismManager, Pipeline, PipelineParameters
from lighteval.tasks.lighteval_task import LightevalTask, LightevalTaskConfig
from lighteval.tasks.tasks.aime import MATH_PROMPT_TEMPLATE, aime_prompt
from lighteval.tasks.tasks.gpqa import gpqa_instruct_prompt
from lighteval_oracle import Oracle

from resa_hf.errors import DataError
from resa_hf.evaluation import tasks
from resa_hf.evaluation.benchmarks import BENCHMARKS, FileTasks
from resa_hf.evaluation.tasks import TASKS_TABLE, only_our_tasks, pipeline_tasks, task_from_file, task_rows

NAMES = [f"resa:{name}" for name in BENCHMARKS]
PROBLEMS = [{"problem": f"What is {number} + 1?", "answer": str(number + 1)} for number in range(5)]


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`RESA_DATA_DIR` with a few rows of our own in every benchmark."""
    monkeypatch.setenv("RESA_DATA_DIR", str(tmp_path))
    for name in BENCHMARKS:
        _write(tmp_path / f"{name}.jsonl", gpqa_rows(5) if name == "gpqa_diamond" else PROBLEMS)
    return tmp_path


def _run(
    names: list[str], output: Path, n: int = 1, form: str = "boxed", wrong_every: int = 0, problems: int | None = None
) -> tuple[Pipeline, Oracle]:
    specification, module = pipeline_tasks(names, n)
    return _run_lighteval(specification, module, output, form, wrong_every, problems)


def _run_lighteval(
    specification: str, module: Any, output: Path, form: str, wrong_every: int, problems: int | None = None
) -> tuple[Pipeline, Oracle]:
    model = Oracle(ModelConfig(model_name="oracle", cache_dir=str(output / "cache")), form, wrong_every)
    parameters = PipelineParameters(ParallelismManager.NONE, custom_tasks_directory=module, max_samples=problems)
    with only_our_tasks():
        pipeline = Pipeline(specification, parameters, EvaluationTracker(str(output)), model=model)
    pipeline.evaluate()
    return pipeline, model


def _accuracies(pipeline: Pipeline) -> dict[str, float]:
    results = pipeline.get_results()["results"]
    scores = {name.removesuffix(":0"): values["pass@1"] for name, values in results.items()}
    return {name: scores[name] for name in scores.keys() - {"all", "resa:_average"}}


@pytest.mark.parametrize("form", ["boxed", "tags", "line"])
def test_oracles(form: str, folder: Path, tmp_path: Path) -> None:
    pipeline, _ = _run(["resa"], tmp_path / "out", form=form)
    assert _accuracies(pipeline) == dict.fromkeys(NAMES, 1.0)
    pipeline, _ = _run(["resa"], tmp_path / "out", form=form, wrong_every=1)
    assert _accuracies(pipeline) == dict.fromkeys(NAMES, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("wrong_every", [0, pytest.param(1, marks=pytest.mark.long)])
def test_oracles_on_the_real_rows(
    wrong_every: int, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESA_DATA_DIR", str(tmp_path))
    for file in shared_data.glob("*_test.jsonl"):
        (tmp_path / file.name).symlink_to(file)
    _write(tmp_path / "gpqa_diamond.jsonl", gpqa_rows(198))
    pipeline, _ = _run(["resa"], tmp_path / "out", wrong_every=wrong_every)
    assert _accuracies(pipeline) == dict.fromkeys(NAMES, 1.0 - wrong_every)
    sizes = {name: len(docs) for name, docs in pipeline.documents_dict.items()}
    assert sizes == {f"resa:{name}|0": known.size for name, known in BENCHMARKS.items()} | {"resa:gsm8k|0": 660}


def test_samples_reach_the_details(folder: Path, tmp_path: Path) -> None:
    pipeline, _ = _run(["resa:aime24"], tmp_path / "out", n=4, wrong_every=2)
    assert _accuracies(pipeline) == {"resa:aime24": 0.5}
    pipeline.save_and_push_results()
    (details,) = (tmp_path / "out").glob("details/oracle/*/details_resa:aime24*.parquet")
    rows = datasets.Dataset.from_parquet(str(details), cache_dir=str(tmp_path / "cache")).to_list()
    assert len(rows) == 5
    for row in rows:
        problem = PROBLEMS[int(row["doc"]["id"])]
        specific = row["doc"]["specific"]
        assert specific["problem"] == problem["problem"]
        assert specific["correct"] == [False, True, False, True]
        assert specific["extracted"][1] == problem["answer"] != specific["extracted"][0]
        assert row["metric"] == {"pass@1": 0.5}


def test_prompts_are_lightevals_own(folder: Path, tmp_path: Path) -> None:
    _, model = _run(["resa"], tmp_path / "out")
    expected = {aime_prompt({**row, "answer": "0"}).query for row in PROBLEMS}
    for name in NAMES:
        if name != "resa:gpqa_diamond":
            assert set(model.prompts[f"{name}|0"]) == expected
    # The prompt of GPQA is lighteval's with the options in some order: all 24 are tried.
    frames = {re.sub(r"\n[A-D]\) .*", "", gpqa_instruct_prompt(row).query) for row in gpqa_rows(5)}
    assert {re.sub(r"\n[A-D]\) .*", "", prompt) for prompt in model.prompts["resa:gpqa_diamond|0"]} == frames


def test_gpqa_does_not_depend_on_the_global_generator(folder: Path, tmp_path: Path) -> None:
    (config,) = (config for config in TASKS_TABLE if config.name == "resa:gpqa_diamond")
    documents = []
    for seed in range(8):
        random.seed(seed)
        docs = LightevalTask(config).get_docs()
        documents.append({doc.id: (doc.query, doc.gold_index) for doc in docs})
        for doc in docs:
            right = gpqa_rows(5)[int(doc.id)]["Correct Answer"].strip()
            assert f"\n{doc.get_golds()[0]}) {right}" in doc.query
    assert all(each == documents[0] for each in documents)


def test_number_of_samples_in_the_name(folder: Path, tmp_path: Path) -> None:
    _, module = pipeline_tasks([], 1)
    pipeline, _ = _run_lighteval("resa:aime24@n=3,resa:amc23", module, tmp_path / "out", "boxed", 3)
    assert {len(doc.specific["correct"]) for doc in pipeline.documents_dict["resa:aime24|0"]} == {3}
    assert {len(doc.specific["correct"]) for doc in pipeline.documents_dict["resa:amc23|0"]} == {1}
    assert _accuracies(pipeline) == {"resa:aime24": pytest.approx(2 / 3), "resa:amc23": 0.0}


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("resa:aime24@N=3", "only n can be set"),
        ("resa:aime24@n=0", "only n can be set"),
        ("resa:aime24@n=2.5", "only n can be set"),
        ("resa:aime24|5", "zero-shot"),
    ],
)
def test_wrong_parameters(specification: str, message: str, folder: Path, tmp_path: Path) -> None:
    _, module = pipeline_tasks([], 1)
    with pytest.raises(DataError, match=message):
        _run_lighteval(specification, module, tmp_path / "out", "boxed", 0)


def test_unknown_task() -> None:
    with pytest.raises(DataError, match=r"no task 'aime24'\. There are resa:aime24, resa:aime25, .*resa for all"):
        pipeline_tasks(["aime24"], 1)


def test_task_from_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "my problems, 2.jsonl"
    _write(
        file, [{"question": "1 + 1?", "final": r"\frac{4}{2}"}, {"question": "2 + 2?", "final": "4"}, {"final": "5"}]
    )
    config = task_from_file(file, FileTasks("question", "final"))
    assert config.name == "resa:my-problems-2"
    docs = LightevalTask(config).get_docs()
    assert {(doc.specific["problem"], doc.get_golds()[0]) for doc in docs} == {
        ("1 + 1?", r"\frac{4}{2}"),
        ("2 + 2?", "4"),
    }
    assert "2 of 3 rows can be used" in caplog.text
    assert all(doc.query == MATH_PROMPT_TEMPLATE.format(prompt=doc.specific["problem"]) for doc in docs)
    plain = LightevalTask(task_from_file(file, FileTasks("question", "final", "plain"))).get_docs()
    assert {doc.query for doc in plain} == {"1 + 1?", "2 + 2?"}
    with pytest.raises(ValueError, match="file_prompt is 'chat'; it must be one of paper, plain"):
        FileTasks(prompt="chat")


def test_rows_of_tasks(folder: Path, tmp_path: Path) -> None:
    _write(tmp_path / "mine.jsonl", PROBLEMS[:2])
    rows = task_rows([str(tmp_path / "mine.jsonl"), "resa:aime24"])
    assert list(rows) == ["resa:mine", "resa:aime24"] and rows["resa:mine"]["answer"] == ["1", "2"]
    _write(tmp_path / "mine.jsonl", [])
    with pytest.raises(DataError, match=r"mine.jsonl has no rows"):
        task_rows([str(tmp_path / "mine.jsonl")])


def test_files_beside_benchmarks(folder: Path, tmp_path: Path) -> None:
    _write(tmp_path / "mine.jsonl", PROBLEMS[:2])
    pipeline, _ = _run(["resa:aime24", str(tmp_path / "mine.jsonl")], tmp_path / "out", n=2)
    assert _accuracies(pipeline) == {"resa:aime24": 1.0, "resa:mine": 1.0}
    with pytest.raises(DataError, match="would be resa:aime24, as HuggingFaceH4/aime_2024 is: rename it"):
        pipeline_tasks([str(folder / "aime24.jsonl")], 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [("problem,answer\n", "has no rows"), ("problem,answer\n?,\n", "0 of 1 rows can be used"), (None, "no file")],
)
def test_a_file_that_cannot_be_used(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DataError, match=message):
        _run([str(file)], tmp_path / "out")


def test_other_peoples_tasks_are_loaded_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_stock_loader", lambda task: task.dataset_path)
    config = LightevalTaskConfig("theirs", aime_prompt, "owner/theirs", "default", metrics=[], few_shots_split="train")
    assert LightevalTask.download_dataset_worker(LightevalTask(config)) == "owner/theirs"


# One of lighteval's built-in tasks downloads a file when it is imported, which every command does first.
NO_DOWNLOAD = """
import sys, types
name = "lighteval.tasks.tasks.tiny_benchmarks"
sys.modules[name] = types.ModuleType(name)
"""


@pytest.mark.slow
def test_stock_command(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_DOWNLOAD)
    _write(tmp_path / "mine.jsonl", PROBLEMS)
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(here)]),
        "RESA_TASK_FILES": str(tmp_path / "mine.jsonl"),
        "ORACLE_FORM": "boxed",
        "ORACLE_WRONG_EVERY": "4",
    }
    command = [str(Path(sys.executable).with_name("lighteval")), "custom", "oracle", str(here / "lighteval_oracle.py")]
    command += ["resa@n=4", "--custom-tasks", "resa_hf.evaluation.tasks", "--output-dir", str(tmp_path / "out")]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (file,) = (tmp_path / "out" / "results" / "oracle").glob("results_*.json")
    results = json.loads(file.read_text())["results"]
    assert set(results) == {f"{name}|0" for name in [*NAMES, "resa:mine", "resa:_average"]} | {"all"}
    assert {values["pass@1"] for values in results.values()} == {0.75}
