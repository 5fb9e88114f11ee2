"""The benchmarks as lighteval tasks: `resa:aime24`, ..., superset `resa`, and files of problems and answers.

For the stock command:

    lighteval accelerate "model_name=..." "resa:aime24@n=16,resa:gpqa_diamond" --custom-tasks resa_hf.evaluation.tasks

`@n=16` draws 16 samples a problem; the metric `pass@1` is their mean. `RESA_DATA_DIR` reads the benchmarks from a
folder (see [`benchmarks`]), and `RESA_TASK_FILES`, files or Hub ids with commas between them, makes a task of each
([`task_from_file`]).

For `lighteval.pipeline.Pipeline` in this process: `tasks, module = pipeline_tasks(["resa:aime24", "mine.jsonl"], n)`,
then `with only_our_tasks(): Pipeline(tasks=tasks, ..., custom_tasks_directory=module)`. After `evaluate()`, every
`Doc` holds the judgement of its samples: `doc.specific == {"correct": [bool, ...], "extracted": [str | None, ...]}`,
also in the details that are saved. `doc.id` is the row's index in the dataset, and `doc.specific["problem"]` its text.
"""

import contextlib
import functools
import logging
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import datasets
import numpy as np
from lighteval.metrics.metrics_sample import SampleLevelComputation, SamplingMetric
from lighteval.metrics.utils.metric_utils import SampleLevelMetric
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.lighteval_task import LightevalTask, LightevalTaskConfig
from lighteval.tasks.registry import Registry
from lighteval.tasks.requests import Doc, SamplingMethod
from lighteval.tasks.tasks.aime import MATH_PROMPT_TEMPLATE
from lighteval.tasks.tasks.gpqa import gpqa_instruct_prompt

from ..data import PRESETS, TINY, load_qa
from ..errors import DataError
from ..sources import SUFFIXES
from .benchmarks import BENCHMARKS, FileTasks, Kind, load_benchmark
from .scoring import score

logger = logging.getLogger(__name__)

TASK_FILES = "RESA_TASK_FILES"
SUPERSET = "resa"
_MAX_NEW_TOKENS = 32_768  # the paper's


class PassAt1(SamplingMetric, SampleLevelComputation):
    """Mean of the judgements of `n` samples; the judgements themselves go to `doc.specific`.

    Args:
        kind (`str`):
            As in [`~resa_hf.evaluation.scoring.score`].
        n (`int`, *optional*, defaults to 1):
            Samples a problem. lighteval sets it from `task@n=16`.
    """

    def __init__(self, kind: Kind, n: int = 1) -> None:
        self.kind = kind
        self.n = n

    def num_samples(self) -> int:
        # lighteval sets whatever attribute the task's name has, `@N=16` too, and would then draw one sample.
        unknown = vars(self).keys() - {"kind", "n"}
        if unknown or type(self.n) is not int or self.n < 1:
            raise DataError(f"Task parameters {vars(self)}: only n can be set, a whole number: resa:aime24@n=16.")
        return self.n

    def compute(self, doc: Doc, model_response: ModelResponse, **kwargs: Any) -> float:
        # The text as it was written: the score knows better than lighteval what is reasoning.
        judged = [score(self.kind, text, doc.get_golds()[0]) for text in model_response.text[: self.n]]
        correct = [right for right, _ in judged]
        doc.specific = {**(doc.specific or {}), "correct": correct, "extracted": [answer for _, answer in judged]}
        return sum(correct) / len(correct)


@dataclass
class ResaTaskConfig(LightevalTaskConfig):
    """A lighteval task whose rows are loaded by `load`."""

    load: Callable[[], datasets.Dataset] = datasets.Dataset


def _math_prompt(line: dict[str, Any], task_name: str) -> Doc:
    query = MATH_PROMPT_TEMPLATE.format(prompt=line["problem"])
    specific = {"problem": line["problem"]}
    return Doc(task_name=task_name, query=query, choices=[line["answer"]], gold_index=0, specific=specific)


def _plain_prompt(line: dict[str, Any], task_name: str) -> Doc:
    doc = _math_prompt(line, task_name)
    doc.query = line["problem"]
    return doc


def _gpqa_prompt(line: dict[str, Any], task_name: str) -> Doc:
    """lighteval's prompt, which puts the right answer at a place drawn from the global generator, with our order."""
    generator = random.Random()
    generator.setstate(random.getstate())
    place = generator.randint(0, 3)  # what lighteval is about to draw
    options = list(line["choices"])
    row = {"Question": line["problem"], "Correct Answer": options.pop(place)}
    row |= {f"Incorrect Answer {number}": option for number, option in enumerate(options, start=1)}
    doc = gpqa_instruct_prompt(row, task_name)
    doc.gold_index = doc.choices.index(line["answer"])
    doc.specific = {"problem": line["problem"]}
    return doc


def _task(
    name: str, kind: Kind, load: Callable[[], datasets.Dataset], repo: str, subset: str, revision: str | None
) -> LightevalTaskConfig:
    metric = SampleLevelMetric(
        # The registry applies `@n=16` only to metrics with an @ in their name.
        metric_name="pass@1",
        sample_level_fn=PassAt1(kind),
        category=SamplingMethod.GENERATIVE,
        corpus_level_fn=np.mean,
        higher_is_better=True,
    )
    return ResaTaskConfig(
        name=f"{SUPERSET}:{name}",
        prompt_function=_gpqa_prompt if kind == "choice" else _math_prompt,
        hf_repo=repo,
        hf_subset=subset,
        hf_revision=revision,
        hf_avail_splits=["test"],
        evaluation_splits=["test"],
        few_shots_split="none",  # or lighteval says that it takes examples from the problems evaluated
        generation_size=_MAX_NEW_TOKENS,
        stop_sequence=[],
        metrics=[metric],
        version=1,
        load=load,
    )


def task_from_file(source: str | Path, files: FileTasks = FileTasks()) -> LightevalTaskConfig:  # noqa: B008  # frozen
    """Makes a task of any file of problems and answers. The rows are read when the task is run.

    Args:
        source (`str` or `Path`):
            As in [`~resa_hf.data.load_qa`]: a local file, a Hub id or a preset.
        files ([`FileTasks`], *optional*):
            Its columns, and the prompt.

    Returns:
        `LightevalTaskConfig`: `resa:<file name without its suffix>`, scored as mathematics. Its rows raise `DataError`
        when they cannot be used.
    """
    name = re.sub(r"[^\w.-]+", "-", Path(source).stem)
    config = _task(name, "math", functools.partial(_load_file, source, files), str(source), "default", None)
    if files.prompt == "plain":
        config.prompt_function = _plain_prompt
    return config


def _load_file(source: str | Path, files: FileTasks) -> datasets.Dataset:
    rows, report = load_qa(source, question_column=files.question_column, answer_column=files.answer_column)
    if report.kept < report.rows_read:
        logger.warning("%s: %s", source, report.describe())
    return rows


def pipeline_tasks(
    tasks: Sequence[str],
    n: int,
    files: FileTasks = FileTasks(),  # noqa: B008  # frozen
) -> tuple[str, ModuleType]:
    """What lighteval's `Pipeline` takes as `tasks` and as `custom_tasks_directory`.

    Args:
        tasks (`Sequence[str]`):
            Names (`"resa:aime24"`; `"resa"` for all), files and Hub ids.
        n (`int`):
            Samples a problem.
        files ([`FileTasks`], *optional*):
            How tasks are made of the files.

    Returns:
        `tuple[str, ModuleType]`: the names, each with `@n=...`, and a module with the table of their tasks.

    Raises:
        `DataError`: if a name is unknown (the message lists those there are), or taken by another task.
    """
    table = {config.name: config for config in TASKS_TABLE}
    names: dict[str, None] = {}  # a set that keeps its order
    for task in tasks:
        if task == SUPERSET:
            names |= dict.fromkeys(config.name for config in TASKS_TABLE)
        elif task in table:
            names[task] = None
        elif "/" in task or task in (*PRESETS, *TINY) or task.endswith(SUFFIXES):
            names[_add_file(table, task, files)] = None
        else:
            raise DataError(
                f"There is no task {task!r}. There are {', '.join(table)}, and {SUPERSET} for all of them; "
                f"or give a file of problems and answers ({', '.join(SUFFIXES)}), or a Hub dataset's owner/name."
            )
    module = ModuleType("resa_tasks")
    module.__dict__["TASKS_TABLE"] = list(table.values())
    return ",".join(f"{name}@n={n}" for name in names), module


def task_rows(
    tasks: Sequence[str],
    files: FileTasks = FileTasks(),  # noqa: B008  # frozen
) -> dict[str, datasets.Dataset]:
    """Loads the rows of tasks, named as in `pipeline_tasks`, by the tasks' names.

    Raises:
        `DataError`: for a task that is unknown, cannot be loaded, is gated or has no rows.
    """
    spec, module = pipeline_tasks(tasks, 1, files)
    table = {config.name: config for config in module.__dict__["TASKS_TABLE"]}
    return {name: table[name].load() for name in (part.partition("@")[0] for part in spec.split(","))}


def _add_file(table: dict[str, LightevalTaskConfig], source: str, files: FileTasks) -> str:
    config = task_from_file(source, files)
    if table.setdefault(config.name, config).hf_repo != source:
        raise DataError(f"The task of {source} would be {config.name}, as {table[config.name].hf_repo} is: rename it.")
    return config.name


@contextlib.contextmanager
def only_our_tasks() -> Iterator[None]:
    """Inside it, lighteval's registry holds the custom tasks only.

    It imports its thousand built-in tasks first, one of which downloads and unpickles a file, so that without network
    nothing runs (lighteval 0.13, `Registry.load_all_task_configs`).
    """
    nothing = staticmethod(lambda *args: {})
    with mock.patch.multiple(Registry, _load_from_files=nothing, _load_from_subdirs=nothing):
        yield


_stock_loader = LightevalTask.download_dataset_worker


def _load_rows(task: LightevalTask) -> datasets.DatasetDict:
    if not isinstance(task.config, ResaTaskConfig):
        return _stock_loader(task)
    if task.config.num_fewshots:
        raise DataError(f"{task.full_name}: the tasks are zero-shot, as the paper's are; write |0 or nothing.")
    return datasets.DatasetDict({"test": task.config.load()})


# lighteval reads no local file, and its own errors do not say what to do; other people's tasks are loaded as before.
LightevalTask.download_dataset_worker = staticmethod(_load_rows)  # type: ignore[method-assign]


def _tasks_table(sources: Sequence[str]) -> list[LightevalTaskConfig]:
    table: dict[str, LightevalTaskConfig] = {}
    for name, benchmark in BENCHMARKS.items():
        load = functools.partial(load_benchmark, name)
        config = _task(name, benchmark.kind, load, benchmark.repo, benchmark.subset, benchmark.revision)
        table[config.name] = config
    for source in sources:
        _add_file(table, source, FileTasks())
    return list(table.values())


TASKS_TABLE = _tasks_table([source.strip() for source in os.environ.get(TASK_FILES, "").split(",") if source.strip()])
