"""The settings of `resa-hf evaluate`."""

import math
import os
import re
from dataclasses import dataclass, field

from ..arguments import ModelArguments, unset_none
from .benchmarks import FileTasks
from .engine import Sampling

BASE = "base"


@dataclass
class EvaluateArguments(ModelArguments):
    """
    What `resa-hf evaluate` compares: [`ModelArguments`] name the base; sampling defaults to the paper's protocol
    (temperature 0.6, top-p 0.95, 32,768 new tokens), with more than one sample a problem.

    Args:
        adapters (`list[str]`, *optional*):
            PEFT adapters: folders or Hub repos, also as `owner/name@revision/sub/folder`; as `name=folder` if the
            report is to call them by a name. With `server`, the names under which it serves them. The names must also
            differ as folder names.
        controls (`list[str]`, *optional*):
            Adapters that the others should beat, such as one tuned with a random SAE.
        rl_adapter (`str`, *optional*):
            The name of one of `adapters` that was trained by RL: the others' retention and gain recovered are told.
        tasks (`list[str]`):
            `resa:aime24` and its like, `resa` for all, or files of problems and answers.
        file_prompt (`str`, *optional*, defaults to `"paper"`), question_column, answer_column (`str`, *optional*):
            Of those files, as in [`FileTasks`]: the paper's prompt for mathematics or the problem alone (`"plain"`).
        server (`str`, *optional*):
            Base URL of an OpenAI-compatible server, for example `http://127.0.0.1:8000/v1`. `None`: in process.
        concurrency (`int`, *optional*, defaults to `8`):
            Requests to the server at once.
        samples, temperature, top_p, max_new_tokens, batch_size, seed:
            As in [`Sampling`].
        system_prompt (`str`, *optional*):
            Before every problem, where the chat template has a place for it.
        max_problems (`int`, *optional*):
            Of each task, to try things out.
        margin (`float`, *optional*, defaults to `0.02`):
            Accuracies that differ by less than this count as equivalent.
        gpus (`int`, *optional*):
            How many are held. `None`: as many as this process sees; with `server`, unknown.
        price_per_gpu_hour (`float`, *optional*):
            Dollars; without it the report tells GPU-hours only. With `server`, needs `gpus`.
        check_overlap (`list[str]`, *optional*):
            Training sets, named as `dataset` is elsewhere, whose problems are looked for in the tasks; but for
            presets, they are read from `question_column`.
        output_dir (`str`, *optional*, defaults to `"runs/evaluate"`):
            Where everything lies afterwards. Started again with the same settings, it goes on where it stopped.

    Raises:
        `ValueError`: for a value that is missing or out of range.
    """

    adapters: list[str] = field(default_factory=list, metadata={"help": "Folders or Hub repos of PEFT adapters."})
    controls: list[str] = field(default_factory=list, metadata={"help": "Adapters that the others should beat."})
    rl_adapter: str | None = field(default=None, metadata={"help": "The adapter that was trained by RL."})
    tasks: list[str] = field(default_factory=list, metadata={"help": "resa:aime24, resa for all, or files."})
    file_prompt: str = field(default="paper", metadata={"help": "Of tasks from files: the paper's prompt, or plain."})
    question_column: str | None = field(default=None, metadata={"help": "Column with the questions of those files."})
    answer_column: str | None = field(default=None, metadata={"help": "Column with their answers."})
    server: str | None = field(default=None, metadata={"help": "Base URL of an OpenAI-compatible server."})
    concurrency: int = field(default=8, metadata={"help": "Requests to the server at once."})
    samples: int = field(default=4, metadata={"help": "Answers a problem."})
    temperature: float = field(default=0.6, metadata={"help": "0 is greedy."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus sampling."})
    max_new_tokens: int = field(default=32_768, metadata={"help": "Longer completions are cut."})
    batch_size: int = field(default=64, metadata={"help": "Completions generated at once, in process."})
    seed: int = field(default=0, metadata={"help": "Of the sampling."})
    system_prompt: str | None = field(default=None, metadata={"help": "Before every problem."})
    max_problems: int | None = field(default=None, metadata={"help": "Of each task, to try things out."})
    margin: float = field(default=0.02, metadata={"help": "Accuracy differences below this count as equivalent."})
    gpus: int | None = field(default=None, metadata={"help": "How many are held; default: all this process sees."})
    price_per_gpu_hour: float | None = field(default=None, metadata={"help": "Dollars a GPU-hour."})
    check_overlap: list[str] = field(default_factory=list, metadata={"help": "Training sets to look for in tasks."})
    output_dir: str = field(default="runs/evaluate", metadata={"help": "Where everything lies afterwards."})

    def __post_init__(self) -> None:
        super().__post_init__()
        unset_none(self, "rl_adapter", "server", "question_column", "answer_column")
        unset_none(self, "system_prompt", "max_problems", "gpus", "price_per_gpu_hour")
        if not self.tasks:
            raise ValueError("tasks is not set: resa:aime24 and its like, resa for all, or files of problems.")
        names = [self.name_and_place(adapter)[0] for adapter in (*self.adapters, *self.controls)]
        slugs = [slug(name) for name in (BASE, *names)]
        if not all(slugs) or len(set(slugs)) < len(slugs):
            listed = ", ".join(f"{name!r} (folder {slug(name)!r})" for name in names)
            raise ValueError(
                f"Each adapter and control needs a name of its own, none {BASE!r}, as a folder's too: {listed}. "
                "Write name=folder, with Latin letters or digits in the name."
            )
        if self.rl_adapter not in (None, *names):
            raise ValueError(f"rl_adapter is {self.rl_adapter!r}; it must be one of {', '.join(names)}.")
        if self.model_adapter is not None and self.server is not None:
            raise ValueError("model_adapter is merged in process; with a server, name the model that it serves.")
        if not 0 < self.margin < 1:
            raise ValueError(f"margin is {self.margin}; it must be between 0 and 1 (0.02 is two points).")
        for name, value in (("concurrency", self.concurrency), ("max_problems", self.max_problems)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        for name, amount in (("gpus", self.gpus), ("price_per_gpu_hour", self.price_per_gpu_hour)):
            if amount is not None and not 0 <= amount < math.inf:
                raise ValueError(f"{name} is {amount}; it must be 0 or more, and finite.")
        if self.price_per_gpu_hour is not None and self.server is not None and self.gpus is None:
            raise ValueError("price_per_gpu_hour needs gpus: set it to how many GPUs the server holds.")
        self.sampling()
        self.files()

    @staticmethod
    def name_and_place(adapter: str) -> tuple[str, str]:
        """Splits `name=folder`; without a name the folder, which may hold a `=` of its own, is the name."""
        name, separator, place = adapter.partition("=")
        return (name, place) if separator and "/" not in name and not os.path.isdir(adapter) else (adapter, adapter)

    def files(self) -> FileTasks:
        """How tasks are made of files."""
        return FileTasks(self.question_column, self.answer_column, self.file_prompt)

    def sampling(self) -> Sampling:
        """As the engines take it."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            samples=self.samples,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            seed=self.seed,
        )


def slug(name: str) -> str:
    """A model's name as that of a folder, and of an adapter inside PEFT, where it may hold no dot."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")
