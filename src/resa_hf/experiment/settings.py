"""The settings of a run: which models, which data, which arms. A run's recipe holds these and three sections."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..arguments import DataArguments, LoraArguments, ModelArguments, SourceArguments, unset_none
from ..evaluation.benchmarks import FileTasks
from ..evaluation.engine import Sampling
from .arms import SOURCE, TARGET, Arm, Candidate


@dataclass
class RunArguments(ModelArguments, SourceArguments, LoraArguments, DataArguments):
    """
    What a run's recipe says at its top: [`ModelArguments`], [`SourceArguments`], [`LoraArguments`], [`DataArguments`],
    and the protocol. Its sections are `stage1` ([`SAETrainingConfig`]), `stage2` ([`SAETuningConfig`]), `sampling`
    ([`Sampling`]) and `arms`.

    Args:
        trigger_dataset (`str`, *optional*):
            What Stage I reads, named as `dataset` is, with the same columns and limit. `None`: `dataset`, which is
            also the elicitation dataset of Stage II. Held-out questions are left out of it.
        prose (`str`, *optional*, defaults to `"python-docs"`):
            Plain text for the SAE of a `prose_sae` control: see [`resa_hf.prose.load_prose`].
        selection (`int`, *optional*, defaults to `0`):
            Further questions kept out of training, on which learning rate and checkpoint are chosen.
        sae (`str`, *optional*):
            A pretrained SAE to use as it is: Hub repo, also as `owner/name@revision/sub/folder`, or a folder.
            `None`: Stage I trains one.
        sae_id (`str`, *optional*), sae_revision (`str`, *optional*):
            Which one, and its revision.
        seeds (`list[int]`, *optional*, defaults to `[0]`):
            Everything random is repeated with each. Five or more make a statement about the method, not one adapter.
        learning_rates (`list[float]`, *optional*):
            Stage II learning rates among which each arm chooses on the selection questions. `None`: `stage2`'s own.
        checkpoints (`list[int]`, *optional*):
            Steps of Stage II after which the adapter is kept; each arm chooses among them, too. `None`: the last one.
        choose_on_test (`bool`, *optional*, defaults to `False`):
            Choose on the very questions that the verdict is on, as the paper does. The report then says so.
        evaluate_on (`str`, *optional*), evaluate_on_revision (`str`, *optional*):
            A sibling of the target onto which the adapters are moved to answer; it is then the base of the verdict.
            Named as the target is.
        tasks (`list[str]`, *optional*):
            Benchmarks for the verdict, their macro-average first: `resa:aime24`, `resa` for all, or files of problems
            and answers. `None`: the held-out questions. Needs the extra `eval`.
        rl_arm (`str`, *optional*):
            An arm that was trained by RL: the others' retention and gain recovered are told.
        rl_seconds (`float`, *optional*):
            What its training took, for the ratio of times.
        rl_gpus (`int`, *optional*, defaults to `1`):
            GPUs that it held meanwhile, for the ratio of GPU-hours.
        file_prompt (`str`, *optional*, defaults to `"paper"`):
            Of tasks that are files, whose columns are named as the dataset's: see [`FileTasks`].
        price_per_gpu_hour (`float`, *optional*):
            Dollars; without it the report tells GPU-hours only.
        greedy (`bool`, *optional*, defaults to `False`):
            Also evaluate at temperature 0.
        margin (`float`, *optional*, defaults to `0.02`):
            Accuracies that differ by less than this count as equivalent.
        processes (`int`, *optional*, defaults to `1`):
            Arms and seeds worked on side by side, the machine's cores shared between them. For CPU.
        output_dir (`str`, *optional*, defaults to `"runs/latest"`):
            Where everything lies afterwards. A run started again with the same settings goes on where it stopped.

    Raises:
        `ValueError`: for a value that is missing, out of range, or not among the choices.
    """

    trigger_dataset: str | None = field(default=None, metadata={"help": "What Stage I reads; default: dataset."})
    prose: str = field(default="python-docs", metadata={"help": "Plain text for the prose_sae control."})
    selection: int = field(default=0, metadata={"help": "Questions kept out, to choose learning rates etc. on."})
    sae: str | None = field(default=None, metadata={"help": "A pretrained SAE; default: Stage I trains one."})
    sae_id: str | None = field(default=None, metadata={"help": "Which SAE of the repo."})
    sae_revision: str | None = field(default=None, metadata={"help": "Revision of the SAE's repo."})
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Everything random is repeated with each."}
    )
    learning_rates: list[float] | None = field(default=None, metadata={"help": "Each arm chooses among these."})
    checkpoints: list[int] | None = field(default=None, metadata={"help": "Each arm chooses among these steps."})
    choose_on_test: bool = field(default=False, metadata={"help": "Choose on the test questions; the report says so."})
    evaluate_on: str | None = field(default=None, metadata={"help": "Sibling model that the adapters are moved to."})
    evaluate_on_revision: str | None = field(default=None, metadata={"help": "Its revision."})
    tasks: list[str] | None = field(default=None, metadata={"help": "Benchmarks; default: the held-out questions."})
    rl_arm: str | None = field(default=None, metadata={"help": "The arm trained by RL, to compare the others with."})
    rl_seconds: float | None = field(default=None, metadata={"help": "Seconds that its training took."})
    rl_gpus: int = field(default=1, metadata={"help": "GPUs that it held meanwhile."})
    file_prompt: str = field(default="paper", metadata={"help": "Of tasks from files: the paper's prompt, or plain."})
    price_per_gpu_hour: float | None = field(default=None, metadata={"help": "Dollars a GPU-hour."})
    greedy: bool = field(default=False, metadata={"help": "Also evaluate at temperature 0."})
    margin: float = field(default=0.02, metadata={"help": "Accuracy differences below this count as equivalent."})
    processes: int = field(default=1, metadata={"help": "Arms and seeds worked on side by side, on CPU."})
    output_dir: str = field(default="runs/latest", metadata={"help": "Where everything lies afterwards."})

    def __post_init__(self) -> None:
        for parent in (ModelArguments, SourceArguments, LoraArguments, DataArguments):
            parent.__post_init__(self)
        unset_none(self, "sae", "sae_id", "trigger_dataset", "evaluate_on", "evaluate_on_revision", "rl_arm")
        if self.load_in_4bit and self.source_adapter is not None:
            raise ValueError(
                f"load_in_4bit: source_adapter {self.source_adapter!r} cannot be merged into 4-bit weights, which "
                "would round much of it away. Merge it in full precision, save the merged model and name that."
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; give at least one, each once.")
        several = len(self.learning_rates or []) > 1 or len(self.checkpoints or []) > 1
        if several and self.selection < 1 and not self.choose_on_test:
            raise ValueError(
                "Several learning_rates or checkpoints, but no selection questions to choose on: set `selection`."
            )
        if self.checkpoints is not None and min(self.checkpoints, default=0) < 1:
            raise ValueError(f"checkpoints is {self.checkpoints}; give steps of Stage II, from 1 on.")
        for name, low in (("held_out", 2), ("selection", 0), ("processes", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}.")
        self.files()
        if not 0 < self.margin < 1:
            raise ValueError(f"margin is {self.margin}; it must be between 0 and 1 (0.02 is two points).")

    def files(self) -> FileTasks:
        """How tasks are made of files."""
        return FileTasks(self.question_column, self.answer_column, self.file_prompt)


@dataclass(frozen=True)
class RunSettings:
    """Everything that a run's recipe says, checked. `stage1` and `stage2` hold the keys that were set."""

    run: RunArguments
    stage1: Mapping[str, Any]
    stage2: Mapping[str, Any]
    sampling: Sampling
    arms: list[Arm]

    @property
    def candidates(self) -> list[Candidate]:
        """What each trained arm chooses among, the smallest learning rate and the first checkpoint first."""
        rates = self.run.learning_rates or [float(self.stage2.get("learning_rate", 1e-6))]
        steps: list[int | None] = [*sorted(self.run.checkpoints)] if self.run.checkpoints else [None]
        return [Candidate(rate, step) for rate in sorted(rates) for step in steps]

    @property
    def sae_sources(self) -> list[str]:
        """What Stage I trains SAEs on: `"source"`, `"base"`, and for controls `"source-prose"`, `"source-random"`."""
        return sorted({self.sae_source(source) for arm in self.arms for source in arm.sae_sources})

    def sae_source(self, wanted: str) -> str:
        """Without another source the source is the base: one SAE serves both."""
        return wanted if self.run.has_source else wanted.replace("base", "source")

    @property
    def reads_prose(self) -> bool:
        """Whether the SAE of some control is trained on plain text."""
        return any(source.endswith("-prose") for source in self.sae_sources)

    @property
    def source_teaches(self) -> bool:
        """Whether the source is some arm's teacher, or writes what it is trained on."""
        return any(
            arm.text == SOURCE or {**self.stage2, **arm.tuning}.get("kl_reference") == "source" for arm in self.arms
        )

    @property
    def texts(self) -> list[str]:
        """What is sampled before Stage II: `"source"`, `"target"`."""
        return sorted({arm.text for arm in self.arms if arm.text in (SOURCE, TARGET)})

    @property
    def chosen_on(self) -> str:
        """The questions that learning rates and checkpoints are chosen on."""
        return "held_out" if self.run.choose_on_test else "selection"
