"""What recipes and flags say of models and data, alike in every command."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .text import Template

if TYPE_CHECKING:
    from peft import LoraConfig


def unset_none(arguments: Any, *names: str) -> None:
    """Reads `none` and `null`, as the command line gives them, as `None`."""
    for name in names:
        if str(getattr(arguments, name)).lower() in ("none", "null"):
            setattr(arguments, name, None)


@dataclass
class ModelArguments:
    """
    The target model; in Stage I, the model to read.

    Args:
        model_name_or_path (`str`):
            Hub repo, also as `owner/name@revision/sub/folder`, or a folder. `resa_hf/tiny/base` and
            `resa_hf/tiny/source` ship in the package.
        model_adapter (`str`, *optional*):
            A LoRA adapter of it, merged first; named in the same way.
        model_revision (`str`, *optional*):
            Its revision.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Of the models' weights: `"auto"` (as stored), `"float32"`, `"bfloat16"`, `"float16"`.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Hold the linear layers of every model in 4 bits (NF4); embeddings, norms and LM heads stay in `dtype`.
            Needs the extra `quant`. No adapter can then be merged first.
    """

    model_name_or_path: str = field(default="", metadata={"help": "Hub repo or folder of the model."})
    model_adapter: str | None = field(default=None, metadata={"help": "LoRA adapter of the model, merged first."})
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the model."})
    dtype: str = field(default="auto", metadata={"help": "Weights: auto, float32, bfloat16 or float16."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Hold the models' linear layers in 4 bits (NF4)."})

    def __post_init__(self) -> None:
        unset_none(self, "model_adapter", "model_revision")
        if not self.model_name_or_path:
            raise ValueError("model_name_or_path is not set: name a Hub repo or a folder.")
        valid = ("auto", "float32", "bfloat16", "float16")
        if self.dtype not in valid:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(valid)}.")
        if self.load_in_4bit and self.model_adapter is not None:
            raise ValueError(
                f"load_in_4bit: model_adapter {self.model_adapter!r} cannot be merged into 4-bit weights, which would "
                "round much of it away. Merge it in full precision, save the merged model and name that."
            )


@dataclass
class SourceArguments:
    """
    The source model, on whose activations the SAE is trained, and which may be the teacher.

    Args:
        source_model (`str`, *optional*):
            Hub repo, also as `owner/name@revision/sub/folder`, or a folder. `None`: the target model itself.
        source_adapter (`str`, *optional*):
            A LoRA adapter of it, merged first (that is how Tina's checkpoints come); named in the same way.
        source_revision (`str`, *optional*):
            Its revision.
    """

    source_model: str | None = field(
        default=None, metadata={"help": "Model the SAE is trained on; default: the target."}
    )
    source_adapter: str | None = field(default=None, metadata={"help": "LoRA adapter of the source, merged first."})
    source_revision: str | None = field(default=None, metadata={"help": "Revision of the source model."})

    def __post_init__(self) -> None:
        unset_none(self, "source_model", "source_adapter", "source_revision")

    @property
    def has_source(self) -> bool:
        """Whether the source is another model than the target."""
        return self.source_model is not None or self.source_adapter is not None


@dataclass
class LoraArguments:
    """
    The adapter that Stage II trains. Defaults: the released code's.

    Args:
        lora_r (`int`, *optional*, defaults to `32`):
            Rank.
        lora_alpha (`int`, *optional*, defaults to `128`):
            The update is scaled by `lora_alpha / lora_r`.
        lora_dropout (`float`, *optional*, defaults to `0.05`):
            Dropout of the adapter's input.
        lora_target_modules (`list[str]`, *optional*):
            Linear layers by name. `None`: all of them but the LM head.
    """

    lora_r: int = field(default=32, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=128, metadata={"help": "The update is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the adapter's input."})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Linear layers; default: all."})

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise ValueError(f"lora_r is {self.lora_r}; it must be at least 1.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; it must be between 0 and 1.")
        if self.lora_target_modules == ["all-linear"]:  # PEFT's word for it
            self.lora_target_modules = None

    def lora_config(self) -> "LoraConfig":
        """PEFT's settings."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules or "all-linear",
            task_type="CAUSAL_LM",
        )


@dataclass
class DataArguments:
    """
    Verified question-answer rows, without reasoning traces unless `solution_column` names them.

    Args:
        dataset (`str`):
            A `.jsonl`, `.csv` or `.parquet` file, a Hub dataset, or a preset.
        question_column, answer_column (`str`, *optional*):
            Its columns. `None`: the preset's, otherwise `problem` and `answer`.
        solution_column (`str`, *optional*):
            A column of reasoning traces, which then stand between the think tags of all text, that of Stage I, too:
            for the paper's CoT-based SFT ablation. `None`: the text is CoT-free.
        dataset_split (`str`, *optional*, defaults to `"train"`), dataset_revision (`str`, *optional*):
            Of a Hub dataset. No revision: the preset's, otherwise `main`.
        limit (`int`, *optional*):
            Use this many rows at most.
        held_out (`int`, *optional*, defaults to `200`):
            Questions kept out of training.
        train_rows (`int`, *optional*):
            Use this many of the rows that are left for training, the first ones; held-out and selection questions are
            the same whatever it is. `None`: all.
        split_seed (`int`, *optional*, defaults to `0`):
            Seed of that split.
        template (`str`, *optional*, defaults to `"paper"`):
            Of the CoT-free text: `"paper"` or `"chat"` (the tokenizer's).
        pack (`bool`, *optional*, defaults to `True`):
            Join documents and cut them into chunks of exactly `max_length` tokens, as the paper does. `False`: one
            document a row, for models that know single documents only.
    """

    dataset: str = field(default="", metadata={"help": "A .jsonl, .csv or .parquet file, a Hub dataset, or a preset."})
    question_column: str | None = field(default=None, metadata={"help": "Column with the questions."})
    answer_column: str | None = field(default=None, metadata={"help": "Column with the verified answers."})
    solution_column: str | None = field(
        default=None, metadata={"help": "Column with reasoning traces; default: CoT-free text."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub dataset."})
    limit: int | None = field(default=None, metadata={"help": "Use this many rows at most."})
    held_out: int = field(default=200, metadata={"help": "Questions kept out of training."})
    train_rows: int | None = field(default=None, metadata={"help": "Train on this many rows; default: all others."})
    split_seed: int = field(default=0, metadata={"help": "Seed of that split."})
    template: Template = field(default="paper", metadata={"help": "CoT-free text: paper or chat."})
    pack: bool = field(default=True, metadata={"help": "Chunks of exactly max_length; false: one document a row."})

    def __post_init__(self) -> None:
        unset_none(self, "question_column", "answer_column", "solution_column", "dataset_revision")
        unset_none(self, "limit", "train_rows")
        if not self.dataset:
            raise ValueError("dataset is not set: name a .jsonl, .csv or .parquet file, a Hub dataset, or a preset.")
        if self.train_rows is not None and self.train_rows < 1:
            raise ValueError(f"train_rows is {self.train_rows}; it must be at least 1.")
        if self.template not in ("paper", "chat"):
            raise ValueError(f"template is {self.template!r}; it must be one of paper, chat.")
