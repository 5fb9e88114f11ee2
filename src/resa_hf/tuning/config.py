"""The settings of Stage II, SAE-Tuning."""

from dataclasses import dataclass, field

from trl import SFTConfig

from ..precision import runnable_precision

# Controls in whose place another SAE stands: `control_sae`.
TRAINED_CONTROLS = ("other_layer", "random_source_sae", "prose_sae")
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "sae_in": ("student", "teacher"),
    "sae_gradient": ("flow", "stop"),
    "kl_reference": ("base", "adapted", "source"),
    "control": (None, "noise", "random_sae", "low_rank", *TRAINED_CONTROLS),
    "share_prefix": ("auto", "never"),
    "sae_dtype": ("auto", "bfloat16"),
}


@dataclass
class SAETuningConfig(SFTConfig):
    # docstyle-ignore
    r"""
    Configuration of [`SAETuningTrainer`]: [`~trl.SFTConfig`] with other defaults (learning rate 1e-6, constant; 2,048
    tokens a sequence, packing `wrapped`, loss on all tokens; bf16 where the device has it) and these fields.

    The method is SAE-Tuning, huggingface.co/papers/2506.09967. Where its text and its released code differ, the field
    says so.

    Args:
        sae (`str`, *optional*):
            The SAE: Hub repo, also as `owner/name@revision/sub/folder`, or a folder. `"none"` means `None`.
        sae_id (`str`, *optional*):
            Which SAE of a repo that holds several, for example `"layers.12"`.
        sae_revision (`str`, *optional*):
            Revision of the repo.
        sae_dtype (`str`, *optional*, defaults to `"auto"`):
            How the SAEs that `sae` and `control_sae` name are held: `"auto"`, as stored, or `"bfloat16"`, which halves
            a float32 SAE. Latents are then chosen, and gradients made, in bfloat16. A module that the trainer is given
            stays as it is.
        hookpoint (`int` or `str`, *optional*):
            Where the SAE is spliced in. `None`: the SAE's own hookpoint.
        allow_hookpoint_mismatch (`bool`, *optional*, defaults to `False`):
            Allow an SAE at another hookpoint than its own; warns with the FVU measured there.
        sae_in (`str`, *optional*, defaults to `"student"`):
            The forward that the SAE is spliced into: `"student"` or `"teacher"`.
        sae_gradient (`str`, *optional*, defaults to `"flow"`):
            `"flow"`: the gradient passes through the frozen SAE, so layers below learn too (the paper's text).
            `"stop"`: it ends at the SAE (the released code); adapters at or below a decoder-layer hookpoint then never
            move.
        kl_reference (`str`, *optional*, defaults to `"base"`):
            The teacher: `"base"`, all adapters off; `"adapted"`, the same adapter without the SAE; `"source"`, another
            model.
        kl_beta (`float`, *optional*, defaults to `0.0`):
            0 is KL(teacher || student) (the released code), 1 is KL(student || teacher) (the paper's D(y~, y)), in
            between TRL's generalised Jensen-Shannon divergence.
        kl_temperature (`float`, *optional*, defaults to `1.0`):
            Divides both logits. There is no T^2 factor.
        kl_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the divergence.
        sft_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the cross-entropy on the text, from the same student forward.
        control (`str`, *optional*):
            What stands in for the SAE, for a null arm to compare with, with an error as large as the SAE's. All need
            the SAE.
            `"noise"`: the error has a fresh random direction at every token, and the norm of the SAE's there.
            `"low_rank"`: the projection onto the principal components of the first 32 batches of the training data
            that has the SAE's fraction of variance unexplained (FVU) there; the last component is kept in part.
            `"random_sae"`: an untrained SAE of the same shape.
            `"other_layer"`: an SAE trained on another layer of the same model.
            `"random_source_sae"`: one trained on a model with random weights (huggingface.co/papers/2501.17727).
            `"prose_sae"`: one trained on prose.
            The error of the last four is scaled to the norm of the SAE's at every token.
        control_sae (`str`, *optional*):
            The SAE for `other_layer`, `random_source_sae` and `prose_sae`, named as `sae` is; no other control takes
            one. It has the width of the SAE, and its hookpoint, or with `other_layer` another one.
        control_sae_id (`str`, *optional*):
            Which SAE of that repo.
        exclude_special_tokens (`bool`, *optional*):
            Let special tokens pass the SAE untouched. `None`: as the SAE was trained, by its metadata.
        share_prefix (`str`, *optional*, defaults to `"auto"`):
            `"auto"`: run the layers up to the hookpoint once for teacher and student where that is exact
            (`sae_gradient`
            `"stop"`, a decoder-layer hookpoint, SAE in the student, teacher `"base"`, adapters below at zero, no
            dropout in the model; not under FSDP2 or ZeRO-3); `"never"`.
        teacher_cache (`str`, *optional*):
            A folder. The teacher's states of the first epoch are written there and read in those that follow, and in
            other runs with the same teacher, rows and precision, instead of running it. Takes 2 or, where the prefix
            is shared, 4 bytes in bf16 for each token and dimension, told before they are written; delete it by hand.
            `"none"` means `None`. Needs a teacher that stays as it is: `kl_reference` `"base"` or `"source"`, the SAE
            in the student.

    Raises:
        `ValueError`: for a wrong choice, or settings that contradict each other.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    max_length: int | None = field(default=2048, metadata={"help": "Tokens a sequence."})
    packing: bool = field(default=True, metadata={"help": "Join documents and cut them to `max_length`."})
    packing_strategy: str = field(default="wrapped", metadata={"help": "TRL's packing; `wrapped` is the paper's."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade time for memory."})

    sae: str | None = field(default=None, metadata={"help": "Hub repo or folder of the SAE; 'none' for none."})
    sae_id: str | None = field(default=None, metadata={"help": "Which SAE of the repo, e.g. 'layers.12'."})
    sae_revision: str | None = field(default=None, metadata={"help": "Revision of the SAE's repo."})
    sae_dtype: str = field(default="auto", metadata={"help": "How the SAE is held: 'auto' (as stored), 'bfloat16'."})
    hookpoint: int | str | None = field(default=None, metadata={"help": "Where to splice; default: the SAE's own."})
    allow_hookpoint_mismatch: bool = field(
        default=False, metadata={"help": "Allow an SAE at another hookpoint than its own; warns with the FVU there."}
    )
    sae_in: str = field(default="student", metadata={"help": "Forward with the SAE: 'student' or 'teacher'."})
    sae_gradient: str = field(default="flow", metadata={"help": "Gradient through the SAE: 'flow' or 'stop'."})
    kl_reference: str = field(default="base", metadata={"help": "The teacher: 'base', 'adapted' or 'source'."})
    kl_beta: float = field(default=0.0, metadata={"help": "0 is KL(teacher||student), 1 is KL(student||teacher)."})
    kl_temperature: float = field(default=1.0, metadata={"help": "Divides both logits; there is no T^2 factor."})
    kl_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence."})
    sft_weight: float = field(default=0.0, metadata={"help": "Weight of the cross-entropy on the text."})
    control: str | None = field(
        default=None,
        metadata={
            "help": "What stands in for the SAE: 'noise', 'random_sae', 'low_rank', 'other_layer', "
            "'random_source_sae', 'prose_sae', or 'none'."
        },
    )
    control_sae: str | None = field(default=None, metadata={"help": "Hub repo or folder of that control's SAE."})
    control_sae_id: str | None = field(default=None, metadata={"help": "Which SAE of that repo."})
    exclude_special_tokens: bool | None = field(
        default=None, metadata={"help": "Special tokens pass the SAE untouched; default: as the SAE was trained."}
    )
    share_prefix: str = field(
        default="auto", metadata={"help": "'auto': run the shared layers once where that is exact; 'never'."}
    )
    teacher_cache: str | None = field(
        default=None, metadata={"help": "Folder for the teacher's states, read from the second epoch on; 'none'."}
    )
    # The filter waits for the device at every step, and a NaN loss should be seen.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave NaN and inf losses out of the logs."})

    def __post_init__(self) -> None:
        places = ("sae", "sae_id", "sae_revision", "hookpoint", "control_sae", "control_sae_id", "teacher_cache")
        for name in (*places, "control"):
            if str(getattr(self, name)).lower() in ("none", "null"):
                setattr(self, name, None)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(map(str, choices))}."
                )
        self._check_numbers()
        self._check_contradictions()
        if self.control_sae is not None:
            self.check_control_sae(True)
        for name, value in runnable_precision(self.bf16, self.fp16, self.use_cpu).items():
            setattr(self, name, value)
        if self.tf32 is None and (self.torch_compile or self.torch_compile_backend or self.torch_compile_mode):
            self.tf32 = False  # transformers would switch it on, for the SAE's float32 too
        super().__post_init__()

    def _check_numbers(self) -> None:
        bounds: dict[str, tuple[float, float]] = {
            "kl_beta": (0.0, 1.0),
            "kl_weight": (0.0, float("inf")),
            "sft_weight": (0.0, float("inf")),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between {low} and {high}.")
        if not 0.0 < self.kl_temperature < float("inf"):
            raise ValueError(f"kl_temperature is {self.kl_temperature}; it must be above 0.")
        if self.kl_weight == 0 and self.sft_weight == 0:
            raise ValueError("kl_weight and sft_weight are both 0: there is nothing to train on.")

    def _check_contradictions(self) -> None:
        if self.sae_in == "teacher" and self.sae_gradient == "stop":
            raise ValueError(
                "sae_gradient: stop has no meaning with sae_in: teacher, which always runs without gradient."
            )
        if self.kl_weight == 0 and (
            self.sae_in == "teacher" or self.kl_reference != "base" or self.control is not None
        ):
            raise ValueError(
                "kl_weight is 0, so there is no teacher: sae_in, kl_reference and control must be left alone."
            )

        if self.teacher_cache is not None:
            self._check_teacher_cache()

    def _check_teacher_cache(self) -> None:
        if self.kl_weight == 0 or self.kl_reference == "adapted" or self.sae_in == "teacher":
            raise ValueError(
                f"teacher_cache needs a teacher that stays as it is: kl_weight above 0 (is {self.kl_weight}), "
                f"kl_reference base or source (is {self.kl_reference}), sae_in student (is {self.sae_in})."
            )
        if self.padding_free or (self.packing and self.packing_strategy != "wrapped"):
            raise ValueError("teacher_cache needs one row a text: packing_strategy wrapped, or packing: false.")

    def check_sae(self, has_sae: bool) -> None:
        """Checks what depends on whether there is an SAE, which may be given here or to the trainer.

        Raises:
            `ValueError`: for a control or a KL that needs an SAE that is not there.
        """
        if self.control is not None and not has_sae:
            raise ValueError(f"control: {self.control} takes its size from an SAE's error, but `sae` is not set.")
        if not has_sae and self.kl_weight > 0 and self.kl_reference != "source":
            raise ValueError(
                f"No SAE, kl_weight {self.kl_weight} and kl_reference {self.kl_reference!r}: teacher and student "
                "would be the same model and the loss zero. Set `sae`, or kl_reference: source, or kl_weight: 0 and "
                "sft_weight."
            )

    def check_source(self, has_source: bool) -> None:
        """Checks that there is a source model if the teacher is one, and only then.

        Raises:
            `ValueError`: if not.
        """
        if has_source != (self.kl_reference == "source"):
            raise ValueError(
                f"kl_reference is {self.kl_reference!r} and source_model is {'' if has_source else 'not '}given; "
                "source_model is needed with kl_reference: source, and has no use otherwise."
            )

    def check_control_sae(self, has_control_sae: bool) -> None:
        """Checks what depends on whether there is an SAE for the control, which may be given here or to the trainer.

        Raises:
            `ValueError`: if the control needs one that is not there, or takes none.
        """
        if has_control_sae == (self.control in TRAINED_CONTROLS):
            return
        if has_control_sae:
            raise ValueError(
                f"control_sae is set and control is {self.control!r}; only {', '.join(TRAINED_CONTROLS)} take one."
            )
        raise ValueError(f"control: {self.control} puts another SAE in the SAE's place: set `control_sae`.")
