"""The settings of a run: which models, which data, which arms. A run's recipe holds these and three sections."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..arguments import DataArguments, LoraArguments, ModelArguments, SourceArguments, unset_none
from ..evaluation.engine import Sampling

SAE_SOURCES = ("source", "base", "pretrained", "none")
KNOWN = ("zero_adapter", "svd_of_source", "weight_noise")


@dataclass
class RunArguments(ModelArguments, SourceArguments, LoraArguments, DataArguments):
    """
    What a run's recipe says at its top: [`ModelArguments`], [`SourceArguments`], [`LoraArguments`], [`DataArguments`],
    and the protocol. Its sections are `stage1` ([`SAETrainingConfig`]), `stage2` ([`SAETuningConfig`]), `sampling`
    ([`Sampling`]) and `arms`.

    Args:
        selection (`int`, *optional*, defaults to `0`):
            Further questions kept out of training, on which the learning rate is chosen where there are several.
        sae (`str`, *optional*):
            A pretrained SAE to use as it is: Hub repo or folder. `None`: Stage I trains one.
        sae_id (`str`, *optional*), sae_revision (`str`, *optional*):
            Which one, and its revision.
        seeds (`list[int]`, *optional*, defaults to `[0]`):
            Everything random is repeated with each. Five or more make a statement about the method, not one adapter.
        learning_rates (`list[float]`, *optional*):
            Stage II learning rates among which each arm chooses on the selection questions. `None`: `stage2`'s own.
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

    selection: int = field(default=0, metadata={"help": "Questions kept out, to choose the learning rate on."})
    sae: str | None = field(default=None, metadata={"help": "A pretrained SAE; default: Stage I trains one."})
    sae_id: str | None = field(default=None, metadata={"help": "Which SAE of the repo."})
    sae_revision: str | None = field(default=None, metadata={"help": "Revision of the SAE's repo."})
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Everything random is repeated with each."}
    )
    learning_rates: list[float] | None = field(default=None, metadata={"help": "Each arm chooses among these."})
    greedy: bool = field(default=False, metadata={"help": "Also evaluate at temperature 0."})
    margin: float = field(default=0.02, metadata={"help": "Accuracy differences below this count as equivalent."})
    processes: int = field(default=1, metadata={"help": "Arms and seeds worked on side by side, on CPU."})
    output_dir: str = field(default="runs/latest", metadata={"help": "Where everything lies afterwards."})

    def __post_init__(self) -> None:
        for parent in (ModelArguments, SourceArguments, LoraArguments, DataArguments):
            parent.__post_init__(self)
        unset_none(self, "sae", "sae_id")
        # YAML reads 1e-4 as text.
        if self.learning_rates is not None:
            self.learning_rates = [float(rate) for rate in self.learning_rates]
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; give at least one, each once.")
        if len(self.learning_rates or []) > 1 and self.selection < 1:
            raise ValueError("Several learning_rates, but no selection questions to choose on: set `selection`.")
        for name, low in (("held_out", 1), ("selection", 0), ("processes", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}.")
        if not 0 < self.margin < 1:
            raise ValueError(f"margin is {self.margin}; it must be between 0 and 1 (0.02 is two points).")


@dataclass(frozen=True)
class Arm:
    """One line of the result table.

    Args:
        name (`str`):
            As shown.
        sae_from (`str`):
            Whose SAE: trained on the `"source"` or the `"base"` (the target before tuning), `"pretrained"`, or
            `"none"`.
        known (`str`, *optional*):
            Not trained, but made so that the verdict is known: `"zero_adapter"`, `"svd_of_source"`, `"weight_noise"`.
        tuning (`dict`):
            What is different in `stage2`, and only that.
    """

    name: str
    sae_from: str = "source"
    known: str | None = None
    tuning: Mapping[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The name as a folder's."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def is_control(self) -> bool:
        """Whether something stands in for the SAE."""
        return self.tuning.get("control") is not None

    def is_control_of(self, other: "Arm") -> bool:
        """Whether this arm is the other one but for what stands in for the SAE."""
        mine, theirs = ({**arm.tuning, "control": None} for arm in (self, other))
        return self.is_control and not other.is_control and self.sae_from == other.sae_from and mine == theirs


def make_arms(section: Mapping[str, Any] | None, run: RunArguments) -> list[Arm]:
    """The arms of a recipe; without an `arms` section, SAE-Tuning alone.

    Raises:
        `ValueError`: for an unknown key or choice, or two names that would share a folder.
    """
    default_sae = "pretrained" if run.sae is not None else "source"
    if not section:
        return [Arm("SAE-Tuning", default_sae)]
    arms = []
    for name, entry in section.items():
        settings = dict(entry or {})
        sae_from, known = settings.pop("sae_from", default_sae), settings.pop("known", None)
        if sae_from not in SAE_SOURCES or known not in (None, *KNOWN):
            raise ValueError(
                f"Arm {name!r}: sae_from is {sae_from!r} (valid: {', '.join(SAE_SOURCES)}) and known is {known!r} "
                f"(valid: {', '.join(KNOWN)})."
            )
        arms.append(Arm(str(name), "none" if known else sae_from, known, settings))
        _check_arm(arms[-1], run)
    slugs = [arm.slug for arm in arms] + ["base"]
    if len(set(slugs)) != len(slugs) or not all(slugs):
        raise ValueError(f"The arms' names must stay different as folder names, and none may be 'base': {slugs[:-1]}.")
    return arms


def _check_arm(arm: Arm, run: RunArguments) -> None:
    if arm.known == "svd_of_source" and not run.has_source:
        raise ValueError(f"Arm {arm.name!r}: svd_of_source needs a source model that is not the target.")
    if arm.sae_from == "pretrained" and run.sae is None:
        raise ValueError(f"Arm {arm.name!r} wants the pretrained SAE, but `sae` is not set.")
    if arm.sae_from in ("source", "base") and run.sae is not None:
        raise ValueError(f"Arm {arm.name!r} wants an SAE of the {arm.sae_from}, but `sae` names a pretrained one.")


@dataclass(frozen=True)
class RunSettings:
    """Everything that a run's recipe says, checked. `stage1` and `stage2` hold the keys that were set."""

    run: RunArguments
    stage1: Mapping[str, Any]
    stage2: Mapping[str, Any]
    sampling: Sampling
    arms: list[Arm]

    @property
    def learning_rates(self) -> list[float]:
        """Stage II learning rates to choose among, the smallest first."""
        rates = self.run.learning_rates or [float(self.stage2.get("learning_rate", 1e-6))]
        return sorted(rates)

    @property
    def sae_sources(self) -> list[str]:
        """The models that Stage I trains an SAE on: `"source"`, `"base"`, both or none."""
        wanted = {arm.sae_from for arm in self.arms} & {"source", "base"}
        # Without another source, the source is the base: one SAE serves both.
        return sorted({name if self.run.has_source else "source" for name in wanted})


def rate_name(rate: float) -> str:
    """A learning rate as part of a folder's name: `1e-04`."""
    mantissa, exponent = f"{rate:.6e}".split("e")
    digits = mantissa.rstrip("0").rstrip(".")
    return f"{digits}e{int(exponent):03d}" if math.isfinite(rate) else str(rate)
