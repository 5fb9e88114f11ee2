"""The settings of `resa-hf train-rl`."""

import math
from dataclasses import dataclass, field

import torch
from trl import GRPOConfig
from trl.import_utils import is_vllm_available

from ..precision import runnable_precision

BUILT_IN = ("accuracy", "format", "tag_count", "cosine", "length", "repetition_penalty")


@dataclass
class RLConfig(GRPOConfig):
    # docstyle-ignore
    r"""
    Configuration of GRPO with LoRA, as Tina's (huggingface.co/papers/2504.15777): [`~trl.GRPOConfig`] with other
    defaults (bf16 where the device has it; vLLM where it is installed; completions logged) and these fields.

    Args:
        reward_funcs (`list[str]`, *optional*, defaults to `["accuracy"]`):
            The rewards, summed with `reward_weights`: `accuracy`, `format`, `tag_count`, `cosine`, `length`,
            `repetition_penalty` ([`resa_hf.rl.rewards`]), or the path of a function of one's own,
            `my_package.rewards.brevity`, as [`~trl.GRPOTrainer`] calls it.
        cosine_max_length (`int`, *optional*):
            Of `cosine`: tokens at which a completion counts as long. `None`: `max_completion_length`.
        cosine_correct (`list[float]`, *optional*, defaults to `[1.0, 0.5]`):
            Of `cosine`: the reward of a right answer, if shortest and if longest.
        cosine_wrong (`list[float]`, *optional*, defaults to `[-1.0, -0.5]`):
            Of `cosine`: the reward of a wrong answer, if shortest and if longest.
        repetition_ngram (`int`, *optional*, defaults to `3`):
            Of `repetition_penalty`: tokens in what is counted as repeated.
        repetition_max_penalty (`float`, *optional*, defaults to `-1.0`):
            Of `repetition_penalty`: the reward of a completion that only repeats.
        reward_time_limit (`float`, *optional*, defaults to `60.0`):
            Seconds for a batch in a function of one's own. It is then stopped, and the batch scores 0 there. The
            judgement of a single answer has a limit of its own ([`resa_hf.evaluation.answers.is_correct`]).
        max_prompt_length (`int`, *optional*, defaults to `512`):
            Rows with a longer prompt are left out, and counted.
        selection (`int`, *optional*, defaults to `0`):
            Further questions kept out of training, behind `held_out`: those on which a run with the same number
            chooses learning rates.
        checkpoints (`list[int]`, *optional*):
            Steps after which the adapter is kept, in `steps/<step>`, to be a `source_model`. The last step's is the
            output folder's own.

    Raises:
        `ValueError`: for a value that is out of range, or not among the choices.
    """

    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bf16; default: where the device has it, not on CPU."}
    )
    use_vllm: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Generate with vLLM; default: where it is installed."}
    )
    log_completions: bool = field(default=True, metadata={"help": "Keep completions on disk and in the tracker."})
    num_completions_to_print: int | None = field(default=0, metadata={"help": "Completions to print at each log."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two logs."})

    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy"],
        metadata={"help": f"Rewards: {', '.join(BUILT_IN)}, or the dotted path of a function."},
    )
    cosine_max_length: int | None = field(default=None, metadata={"help": "Tokens of a long completion, in cosine."})
    cosine_correct: list[float] = field(
        default_factory=lambda: [1.0, 0.5], metadata={"help": "Reward of a right answer, shortest and longest."}
    )
    cosine_wrong: list[float] = field(
        default_factory=lambda: [-1.0, -0.5], metadata={"help": "Reward of a wrong answer, shortest and longest."}
    )
    repetition_ngram: int = field(default=3, metadata={"help": "Tokens in what is counted as repeated."})
    repetition_max_penalty: float = field(default=-1.0, metadata={"help": "Reward of what only repeats."})
    reward_time_limit: float = field(default=60.0, metadata={"help": "Seconds for a batch in a function of yours."})
    max_prompt_length: int = field(default=512, metadata={"help": "Rows with a longer prompt are left out."})
    selection: int = field(default=0, metadata={"help": "Further questions kept out, as in a run."})
    checkpoints: list[int] | None = field(default=None, metadata={"help": "Steps whose adapters are kept."})

    def __post_init__(self) -> None:
        for name, value in runnable_precision(self.bf16, self.fp16, self.use_cpu).items():
            setattr(self, name, value)
        if self.use_vllm is None:
            self.use_vllm = torch.cuda.is_available() and is_vllm_available()
        elif self.use_vllm and not is_vllm_available():
            raise ValueError("use_vllm is true, but vLLM is not installed: `pip install vllm`, or leave use_vllm out.")
        super().__post_init__()
        self._check_rewards()
        for name, low in (
            ("max_prompt_length", 1),
            ("repetition_ngram", 1),
            ("cosine_max_length", 1),
            ("selection", 0),
        ):
            if (value := getattr(self, name)) is not None and value < low:
                raise ValueError(f"{name} is {value}; it must be at least {low}.")
        if self.checkpoints is not None and min(self.checkpoints, default=0) < 1:
            raise ValueError(f"checkpoints is {self.checkpoints}; give steps, from 1 on.")
        self._check_resumable()

    def _check_rewards(self) -> None:
        unknown = [name for name in self.reward_funcs if name not in BUILT_IN and "." not in name]
        if unknown or not self.reward_funcs or len(set(self.reward_funcs)) < len(self.reward_funcs):
            raise ValueError(
                f"reward_funcs is {self.reward_funcs}; give some of {', '.join(BUILT_IN)}, or functions as "
                "module.function, each once."
            )
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"There are {len(self.reward_weights)} reward_weights for {len(self.reward_funcs)} reward_funcs "
                f"({', '.join(self.reward_funcs)}): give one each."
            )
        for name in ("cosine_correct", "cosine_wrong"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name} is {getattr(self, name)}; give two numbers: shortest, longest.")
        if self.repetition_max_penalty > 0:
            raise ValueError(f"repetition_max_penalty is {self.repetition_max_penalty}; it must be 0 or less.")
        if self.reward_time_limit <= 0:
            raise ValueError(f"reward_time_limit is {self.reward_time_limit}; it must be above 0 seconds.")

    @property
    def steps_between_generations(self) -> int:
        """Steps from one generation that begins with a step to the next such."""
        batches = (self.steps_per_generation or 1) * self.num_iterations
        return math.lcm(batches, self.gradient_accumulation_steps) // self.gradient_accumulation_steps

    def _check_resumable(self) -> None:
        """A checkpoint between two generations could not be resumed exactly: the completions are not in it."""
        every = self.steps_between_generations
        if self.save_strategy == "steps" and every > 1 and (self.save_steps < 1 or self.save_steps % every):
            raise ValueError(
                f"save_steps is {self.save_steps}, but completions are generated every {every} steps, and only a "
                f"checkpoint between two generations can be resumed exactly: make it a multiple of {every}."
            )
