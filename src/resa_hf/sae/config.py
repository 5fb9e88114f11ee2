"""The settings of Stage I, SAE training."""

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..precision import runnable_precision

_SAE_OPTIMIZERS = ("signum", "adam")
# sparsify's learning rates at 16,384 latents; both fall with the root of the number of latents.
_BASE_LEARNING_RATE = {"signum": 5e-3, "adam": 2e-4}


@dataclass
class SAETrainingConfig(TrainingArguments):
    r"""
    Configuration of [`SAETrainer`]: [`~transformers.TrainingArguments`] with other defaults and these fields.

    Stage I of the paper [Resa](https://huggingface.co/papers/2506.09967). Other defaults: one epoch, batches of 16
    sequences, constant learning rate, no clipping of gradients (a common norm would couple the SAEs), bf16 for the
    source model where the device has it. The SAE's own weights and arithmetic stay float32.

    Args:
        hookpoints (`list[str]`):
            Where to train an SAE each, all in one pass over the source model: `"layers.12"`, `"layers.12.mlp"`.
        num_latents (`int`, *optional*):
            Latents of each SAE. From scratch, `None` means `expansion_factor` times the width of the activations.
        expansion_factor (`int`, *optional*):
            Latents per dimension of the activations, if `num_latents` is not set; 32 if neither is.
        k (`int`, *optional*):
            Active latents a token. `None` means that of `initial_sae`, or 32 from scratch.
        initial_sae (`str`, *optional*):
            The SAE to start from (finetuned): Hub repo, also as `owner/name@revision/sub/folder`, or a folder. `None`,
            or `"none"` or `"null"` on the command line, means from scratch. Where it holds several, the one named like
            the hookpoint is taken.
        initial_sae_id (`str`, *optional*):
            Folder inside `initial_sae` to start from, at every hookpoint.
        initial_sae_revision (`str`, *optional*):
            Branch, tag or commit of `initial_sae`.
        sae_optimizer (`str`, *optional*, defaults to `"signum"`):
            `"signum"` ([`ScheduleFreeSignum`], momentum 0.95, as in the released code) or `"adam"`.
        learning_rate (`float`, *optional*):
            `None` means sparsify's rule: 5e-3 / sqrt(num_latents / 16384) for Signum, 2e-4 / sqrt(num_latents / 16384)
            for Adam. The paper's table gives 2.5e-4 for Signum.
        auxk_alpha (`float`, *optional*, defaults to `0.0`):
            Weight of the AuxK loss, in which dead latents reconstruct what is left over. Gao et al. use 1/32.
        dead_after_tokens (`int`, *optional*, defaults to `1_000_000`):
            A latent that has not fired for more tokens is dead. The paper's value; the released code's is 10 million.
        spread_hookpoints (`bool`, *optional*, defaults to `False`):
            With several processes, each trains the SAEs of its share of the hookpoints on the activations of all: the
            same result as with all SAEs on each, with less memory, and with activations sent instead of gradients. All
            processes must see `output_dir`.
        exclude_special_tokens (`bool`, *optional*, defaults to `False`):
            Leave out the tokenizer's special tokens. Attention sinks have norms tens of times the median.
        max_norm_ratio (`float`, *optional*):
            Leave out tokens whose activation has a norm above so many times the median norm of its batch.
        max_length (`int`, *optional*, defaults to `2048`):
            Tokens a chunk, into which documents are packed. Datasets with `input_ids` are taken as they are.

    Raises:
        `ValueError`: if a value is out of range or not among the choices, or if settings contradict each other.
    """

    hookpoints: list[str] = field(
        default_factory=list, metadata={"help": "Where to train an SAE each, for example layers.12 layers.12.mlp."}
    )
    num_latents: int | None = field(default=None, metadata={"help": "Latents of each SAE."})
    expansion_factor: int | None = field(
        default=None, metadata={"help": "Latents per dimension of the activations; 32 if num_latents is not set."}
    )
    k: int | None = field(
        default=None, metadata={"help": "Active latents a token; default: that of initial_sae, or 32."}
    )
    initial_sae: str | None = field(
        default=None, metadata={"help": "Hub repository or folder of the SAE to start from; none: from scratch."}
    )
    initial_sae_id: str | None = field(default=None, metadata={"help": "Folder inside initial_sae."})
    initial_sae_revision: str | None = field(default=None, metadata={"help": "Revision of initial_sae."})
    sae_optimizer: str = field(default="signum", metadata={"help": "Optimiser.", "choices": list(_SAE_OPTIMIZERS)})
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Learning rate; default: sparsify's rule, by optimiser and number of latents."}
    )
    auxk_alpha: float = field(default=0.0, metadata={"help": "Weight of the AuxK loss."})
    dead_after_tokens: int = field(
        default=1_000_000, metadata={"help": "A latent that has not fired for more tokens is dead."}
    )
    spread_hookpoints: bool = field(
        default=False, metadata={"help": "Each process trains the SAEs of its share of the hookpoints."}
    )
    exclude_special_tokens: bool = field(default=False, metadata={"help": "Leave out special tokens."})
    max_norm_ratio: float | None = field(
        default=None, metadata={"help": "Leave out tokens whose norm exceeds so many times the batch's median."}
    )
    max_length: int = field(default=2048, metadata={"help": "Tokens a chunk."})

    # Other defaults than those of TrainingArguments.
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the dataset."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Sequences a batch and device."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the learning rate."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clips the gradients of all SAEs together; 0: no."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logs, or their share if below 1."})
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bf16 for the source model; default: where the device has it."}
    )
    optim: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Not used: set sae_optimizer."}
    )
    # The filter waits for the device at every step, and a NaN loss should be seen.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave NaN and inf losses out of the logs."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter is used, so there is nothing to find."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.hookpoints, str | int):
            self.hookpoints = [self.hookpoints]
        self.hookpoints = [str(hookpoint) for hookpoint in self.hookpoints]
        for name in ("initial_sae", "initial_sae_id", "initial_sae_revision"):
            if str(getattr(self, name)).lower() in ("none", "null"):
                setattr(self, name, None)
        self._check_ranges()
        self._check_contradictions()
        # TrainingArguments turns it into an enum member, which is how a copy of these arguments is told from a user.
        self.optim = "adamw_torch"
        for name, value in runnable_precision(self.bf16, self.fp16, self.use_cpu).items():
            setattr(self, name, value)
        if self.tf32 is None and (self.torch_compile or self.torch_compile_backend or self.torch_compile_mode):
            self.tf32 = False  # transformers would switch it on, for the SAE's float32 too
        super().__post_init__()

    def _check_ranges(self) -> None:
        if self.sae_optimizer not in _SAE_OPTIMIZERS:
            raise ValueError(f"sae_optimizer must be one of {', '.join(_SAE_OPTIMIZERS)}, not {self.sae_optimizer!r}.")
        for name in ("num_latents", "expansion_factor", "k", "dead_after_tokens", "max_length"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, not {count}.")
        if self.k is not None and self.num_latents is not None and self.k > self.num_latents:
            raise ValueError(f"k ({self.k}) must not exceed num_latents ({self.num_latents}).")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}.")
        if not 0 <= self.auxk_alpha < math.inf:
            raise ValueError(f"auxk_alpha must not be negative, but is {self.auxk_alpha}.")
        if self.max_norm_ratio is not None and not self.max_norm_ratio > 1:
            raise ValueError(f"max_norm_ratio must be above 1 (times the median), but is {self.max_norm_ratio}.")

    def _check_contradictions(self) -> None:
        if self.spread_hookpoints and self.max_grad_norm:
            raise ValueError(
                f"max_grad_norm ({self.max_grad_norm}) clips the gradients of all SAEs together, and with "
                "spread_hookpoints no process has them all: set max_grad_norm: 0."
            )
        if self.num_latents is not None and self.expansion_factor is not None:
            raise ValueError(
                f"num_latents ({self.num_latents}) and expansion_factor ({self.expansion_factor}) both set the number "
                "of latents. Set one."
            )
        if self.optim is not None and not isinstance(self.optim, OptimizerNames):
            raise ValueError(f"optim ({self.optim!r}) is not used here. Set sae_optimizer: signum or adam.")
        if self.weight_decay:
            raise ValueError(f"weight_decay ({self.weight_decay}) is not used here: the decoder has unit norm.")
        if self.initial_sae is None and (self.initial_sae_id or self.initial_sae_revision):
            raise ValueError("initial_sae_id and initial_sae_revision belong to initial_sae, which is not set.")
        if self.initial_sae is not None and self.expansion_factor is not None:
            raise ValueError(
                f"expansion_factor ({self.expansion_factor}) is for training from scratch: an SAE finetuned from "
                f"{self.initial_sae!r} keeps its number of latents."
            )

    def learning_rate_for(self, num_latents: int) -> float:
        """
        The learning rate of an SAE: `learning_rate`, or sparsify's rule.

        Args:
            num_latents (`int`): number of latents of the SAE.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        return _BASE_LEARNING_RATE[self.sae_optimizer] / math.sqrt(num_latents / 16384)
