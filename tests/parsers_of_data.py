"""Files that a user writes: rows, prose, benchmarks, recipes, rewards."""

import csv
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from fuzz_parsers import Parser
from small_sweep import recipe, write
from tree_mutations import byte_changes, json_changes, line_changes, yaml_changes

from resa_hf.arguments import DataArguments, LoraArguments, ModelArguments, SourceArguments
from resa_hf.commands.grid import parse_sweep
from resa_hf.commands.recipe import parse_flat, parse_run
from resa_hf.data import load_qa, load_questions
from resa_hf.evaluation.arguments import EvaluateArguments
from resa_hf.evaluation.benchmarks import DATA_DIR, load_benchmark
from resa_hf.evaluation.engine import Completion, Sampling
from resa_hf.evaluation.store import Store, stored_seconds
from resa_hf.explore.accuracy import problems_from_text
from resa_hf.features.arguments import FeatureArguments
from resa_hf.hub.arguments import PublishArguments
from resa_hf.prose import load_prose
from resa_hf.rl.config import RLConfig
from resa_hf.rl.limited import LimitedReward
from resa_hf.sae.config import SAETrainingConfig
from resa_hf.tuning.config import SAETuningConfig

_ROWS = [{"problem": f"What is {n} + 1, “ü”?", "answer": f"{n + 1}", "level": n} for n in range(12)]
_GPQA = {"Question": "Which?", "Correct Answer": "a", **{f"Incorrect Answer {n}": f"{n}" for n in (1, 2, 3)}}
_DATA: dict[str, Any] = {"dataset": "rows.jsonl", "held_out": 2, "limit": 8, "template": "paper", "pack": True}
_MODEL: dict[str, Any] = {"model_name_or_path": "resa_hf/tiny/base", "dtype": "float32", "output_dir": "out"}
_RECIPES = Path(__file__).parents[1] / "recipes" / "tiny-reasoner"


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _rows(folder: Path) -> None:
    _jsonl(folder / "rows.jsonl", _ROWS)
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(_ROWS[0]))
        writer.writeheader()
        writer.writerows(_ROWS)
    pq.write_table(pa.Table.from_pylist(_ROWS), folder / "rows.parquet")
    (folder / "prose.txt").write_text("Some text.\n\nMore of it, with ü.\n\n\nAnd more.\n", encoding="utf-8")
    _jsonl(folder / "aime24.jsonl", [*_ROWS, {"question": "q", "solution": "s #### 4"}])
    _jsonl(folder / "gpqa_diamond.jsonl", [_GPQA] * 3)
    pq.write_table(pa.Table.from_pylist(_ROWS), folder / "minerva_test.parquet")
    (folder / "pasted.txt").write_text('1+1\t2\n{"problem": "2+2", "answer": "4"}\n\n3+3\t6\n')


def _qa(folder: Path, name: str) -> None:
    rows, report = load_qa(folder / name)
    assert len(rows) == report.kept > 0
    assert all(isinstance(cell, str) for row in rows for cell in row.values())
    list(load_questions(folder / name))


def _benchmark(folder: Path, name: str) -> None:
    os.environ[DATA_DIR] = str(folder)
    rows = load_benchmark(name)
    assert all(isinstance(row["problem"], str) and isinstance(row["answer"], str) for row in rows)


def _pasted(folder: Path) -> None:
    problems_from_text((folder / "pasted.txt").read_bytes().decode(errors="replace"))


def _recipes(folder: Path) -> None:
    small = recipe(Path("out"))
    arms = {"ours": {}, "noise": {"control": "noise"}, "taken": {"adapter": "a/b"}}
    write(folder / "run.yaml", small | {"arms": arms, "learning_rates": [1e-4, 1e-3], "selection": 4})
    write(folder / "sweep.yaml", small | {"grid": {"hookpoint": ["layers.1", "layers.2"], "stage1.k": [2, 4]}})
    flat: dict[str, dict[str, Any]] = {
        "tune": {**_MODEL, **_DATA, "sae": "saes", "hookpoint": "layers.1", "max_steps": 2, "kl_beta": 0.5},
        "train-sae": {**_MODEL, **_DATA, "hookpoints": ["layers.1", 2], "num_latents": 64, "k": 4},
        "train-rl": yaml.safe_load((_RECIPES / "rl" / "grpo.yaml").read_text()),
        "evaluate": {**_MODEL, "adapters": ["ours=a/b"], "tasks": ["resa:aime24"], "samples": 2},
        "features": yaml.safe_load((_RECIPES / "features" / "layers.yaml").read_text()),
        "publish": {"folder": "out", "repo_id": "you/adapter", "private": True},
    }
    for name, content in flat.items():
        write(folder / f"{name}.yaml", content)


_TYPES: dict[str, tuple[Any, ...]] = {
    "tune": (ModelArguments, SourceArguments, LoraArguments, DataArguments, SAETuningConfig),
    "train-sae": (ModelArguments, DataArguments, SAETrainingConfig),
    "train-rl": (ModelArguments, LoraArguments, DataArguments, RLConfig),
    "evaluate": (EvaluateArguments,),
    "features": (FeatureArguments,),
    "publish": (PublishArguments,),
}


def _flat(folder: Path, name: str) -> None:
    parse_flat(_TYPES[name], ["--config", str(folder / f"{name}.yaml")], name, "")


def _with_sections(folder: Path, name: str, parse: Callable[..., object]) -> None:
    parse(["--config", str(folder / f"{name}.yaml")], name, "")


_SAMPLING = Sampling(samples=2, temperature=1.0, max_new_tokens=4)


def _store(folder: Path) -> Store:
    return Store(folder / "kept.jsonl", {"model": "m"}, ["a", "b"], _SAMPLING)


def _completions(folder: Path) -> None:
    store = _store(folder)
    for problem in (0, 1):
        store.add(
            {(problem, sample): Completion(text="x", length=1, truncated=False, tokens=(1,)) for sample in (0, 1)}
        )


def _read_completions(folder: Path) -> None:
    store = _store(folder)
    every = [(problem, sample) for problem in (0, 1) for sample in (0, 1)]
    store.add({key: Completion("y", 1, False) for key in every if key not in store.done})
    stored_seconds(folder / "kept.jsonl")
    for row in store.answers():
        assert all(one.text.strip() is not None and one.length + sum(one.tokens) is not None for one in row)


def _reward(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "def brevity(completions, **columns):\n    return [1.0 / (1 + len(text)) for text in completions]\n"
    )


def _call_reward(folder: Path) -> None:
    os.chdir(folder)
    reward = LimitedReward("mine.brevity", 5.0)
    assert len(reward(["a", "b"], ["x", "yy"], [[1], [2, 3]])) == 2


def _saved(folder: Path) -> None:
    from resa_hf.experiment.prepare import save_rows

    save_rows(datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5], [6]]}), folder / "train")


def _read_saved(folder: Path) -> None:
    from resa_hf.experiment.prepare import read_rows

    assert all(isinstance(row["input_ids"], list) for row in read_rows(folder / "train"))


_SAVED = ("data-00000-of-00001.arrow", "dataset_info.json", "state.json")
DATA = [
    Parser("rows: .jsonl", _rows, "rows.jsonl", partial(_qa, name="rows.jsonl"), line_changes),
    Parser("rows: .csv", _rows, "rows.csv", partial(_qa, name="rows.csv"), byte_changes),
    Parser("rows: .parquet", _rows, "rows.parquet", partial(_qa, name="rows.parquet"), byte_changes),
    Parser("prose", _rows, "prose.txt", lambda folder: load_prose(folder / "prose.txt"), byte_changes),
    Parser("benchmark: aime24.jsonl", _rows, "aime24.jsonl", partial(_benchmark, name="aime24"), line_changes),
    Parser("benchmark: gpqa_diamond.jsonl", _rows, "gpqa_diamond.jsonl", partial(_benchmark, name="gpqa_diamond"),
           line_changes),
    Parser("benchmark: minerva.parquet", _rows, "minerva_test.parquet", partial(_benchmark, name="minerva"),
           byte_changes),
    Parser("problems pasted into the explorer", _rows, "pasted.txt", _pasted, byte_changes),
    *(Parser(f"tokens of a run: {name}", _saved, f"train/{name}", _read_saved,
             byte_changes if name.endswith("arrow") else json_changes) for name in _SAVED),
    Parser("recipe: run", _recipes, "run.yaml", partial(_with_sections, name="run", parse=parse_run), yaml_changes,
           True),
    Parser("recipe: sweep", _recipes, "sweep.yaml", partial(_with_sections, name="sweep", parse=parse_sweep),
           yaml_changes, True),
    *(Parser(f"recipe: {name}", _recipes, f"{name}.yaml", partial(_flat, name=name), yaml_changes, True)
      for name in _TYPES),
    Parser("completions", _completions, "kept.jsonl", _read_completions, line_changes),
    Parser("reward of one's own", _reward, "mine.py", _call_reward, byte_changes),
]  # fmt: skip
