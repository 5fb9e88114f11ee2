"""The arms of an experiment: what is trained, taken or made, and held against the untouched base."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SAE_SOURCES = ("source", "base", "pretrained", "none")
KNOWN = ("zero_adapter", "svd_of_source", "weight_noise", "random_adapter", "source")
# What Stage II reads: the dataset's text, what a model writes to the training questions, or what the adapter does.
DATASET, SOURCE, TARGET, STUDENT = TEXTS = ("dataset", "source", "target", "student")
_SEED = "{seed}"
# What Stage I trains the SAE of a control on.
_CONTROL_SOURCES = {"prose_sae": "prose", "random_source_sae": "random"}


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
            Not trained, but made: `"zero_adapter"`, `"svd_of_source"`, `"weight_noise"`, whose verdicts are known
            beforehand; `"random_adapter"`, with every ||dW|| that of the arm `like`; `"source"`, the source itself.
        like (`str`, *optional*):
            The trained arm whose size a random adapter has.
        adapter (`str`, *optional*):
            Not trained, but taken: a PEFT adapter, as a folder or Hub repo, also as `owner/name@revision/sub/folder`.
            `{seed}` in it stands for the seed, where each has an adapter of its own.
        tuning (`dict`):
            What is different in `stage2`, and only that.
        text (`str`):
            What it is trained on: `"dataset"`, the dataset's text; `"source"`, the source's answers to the training
            questions, those that are right and not truncated; `"target"`, all of the untouched target's answers;
            `"student"`, on-policy: what the adapter itself answers at each step.
    """

    name: str
    sae_from: str = "source"
    known: str | None = None
    like: str | None = None
    adapter: str | None = None
    tuning: Mapping[str, Any] = field(default_factory=dict)
    text: str = DATASET

    @property
    def slug(self) -> str:
        """The name as a folder's."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def is_trained(self) -> bool:
        """Whether Stage II makes it."""
        return self.known is None and self.adapter is None and self != BASE

    @property
    def has_adapter(self) -> bool:
        """Whether it is the target with an adapter, and not another model."""
        return self != BASE and self.known not in ("weight_noise", "source")

    @property
    def is_seeded(self) -> bool:
        """Whether the model itself is another one with every seed."""
        return self.is_trained or self.known in ("weight_noise", "random_adapter") or _SEED in (self.adapter or "")

    def taken_with(self, seed: int) -> str | None:
        """The adapter that is taken, if one is."""
        return None if self.adapter is None else self.adapter.replace(_SEED, str(seed))

    @property
    def is_control(self) -> bool:
        """Whether it is there to be compared with: a stand-in for the SAE, a random adapter, or CoT-free SFT."""
        return self.stands_in or self.known == "random_adapter" or self._is_sft

    @property
    def stands_in(self) -> bool:
        """Whether something stands in for its SAE."""
        return self.tuning.get("control") is not None

    @property
    def sae_sources(self) -> set[str]:
        """What Stage I must train SAEs on for it, for example `{"source", "source-prose"}`."""
        if not self.is_trained or self.sae_from not in ("source", "base"):
            return set()
        other = self.control_source
        return {self.sae_from} if other is None else {self.sae_from, other}

    @property
    def control_source(self) -> str | None:
        """What Stage I trains the SAE on that stands in for its SAE, unless the recipe names one."""
        control = self.tuning.get("control")
        if self.sae_from not in ("source", "base") or "control_sae" in self.tuning:
            return None
        if control == "other_layer":
            return self.sae_from
        return f"{self.sae_from}-{_CONTROL_SOURCES[control]}" if control in _CONTROL_SOURCES else None

    def is_control_of(self, other: "Arm") -> bool:
        """Whether what is claimed of the other arm should hold against this one.

        It is the other arm but for what stands in for the SAE, or a random adapter of its size, or CoT-free SFT.
        SFT on text that a model wrote is none: it may well teach more than the other arm does.
        """
        if other.is_control or not (other.is_trained or other.adapter is not None):
            return False
        if self.known == "random_adapter":
            return self.like == other.name
        if self._is_sft:
            return True
        swapped = ("control", "control_sae", "control_sae_id")
        mine, theirs = (
            {key: value for key, value in arm.tuning.items() if key not in swapped} for arm in (self, other)
        )
        alike = self.sae_from == other.sae_from and self.text == other.text
        return self.is_control and alike and mine == theirs

    @property
    def _is_sft(self) -> bool:
        return self.is_trained and self.tuning.get("kl_weight") == 0 and self.text == DATASET


BASE = Arm("base", "none")


@dataclass(frozen=True)
class Candidate:
    """One way to train an arm, among which it chooses.

    Args:
        rate (`float`): learning rate of Stage II.
        step (`int`, *optional*): the checkpoint; `None` for the last one.
    """

    rate: float
    step: int | None = None

    @property
    def folder_name(self) -> str:
        """The learning rate as a folder's name: `1e-04`."""
        mantissa, exponent = f"{self.rate:.6e}".split("e")
        digits = mantissa.rstrip("0").rstrip(".")
        return f"{digits}e{int(exponent):03d}" if math.isfinite(self.rate) else str(self.rate)

    def __str__(self) -> str:
        return f"lr {self.rate:g}" + ("" if self.step is None else f", step {self.step}")


def make_arms(section: Mapping[str, Any] | None, pretrained: bool, has_source: bool) -> list[Arm]:
    """The arms of a recipe; without an `arms` section, SAE-Tuning alone.

    Args:
        section (`Mapping` or `None`): the recipe's `arms`.
        pretrained (`bool`): whether the run names a pretrained SAE.
        has_source (`bool`): whether the source is another model than the target.

    Raises:
        `ValueError`: for an unknown key or choice, or two names that would share a folder.
    """
    default_sae = "pretrained" if pretrained else "source"
    if not section:
        return [Arm("SAE-Tuning", default_sae)]
    arms = []
    for name, entry in section.items():
        settings = dict(entry or {})
        keys = ("sae_from", "known", "like", "adapter", "text")
        sae_from, known, like, adapter, text = (settings.pop(key, None) for key in keys)
        if sae_from not in (None, *SAE_SOURCES) or known not in (None, *KNOWN):
            raise ValueError(
                f"Arm {name!r}: sae_from is {sae_from!r} (valid: {', '.join(SAE_SOURCES)}) and known is {known!r} "
                f"(valid: {', '.join(KNOWN)})."
            )
        if text not in (None, *TEXTS):
            raise ValueError(f"Arm {name!r}: text is {text!r} (valid: {', '.join(TEXTS)}).")
        made = known is not None or adapter is not None
        if made and text is not None:
            raise ValueError(f"Arm {name!r} cannot set text: it is not trained.")
        sae_from = "none" if made else sae_from or default_sae
        arms.append(Arm(str(name), sae_from, known, like, adapter, settings, text or DATASET))
        _check_arm(arms[-1], pretrained, has_source)
    slugs = [arm.slug for arm in arms] + ["base"]
    if len(set(slugs)) != len(slugs) or not all(slugs):
        raise ValueError(f"The arms' names must stay different as folder names, and none may be 'base': {slugs[:-1]}.")
    trained = [arm.name for arm in arms if arm.is_trained]
    for arm in arms:
        if (arm.known == "random_adapter") != (arm.like is not None) or arm.like not in (None, *trained):
            raise ValueError(
                f"Arm {arm.name!r}: like is {arm.like!r}; a random_adapter, and no other, needs a trained "
                f"arm: {', '.join(trained)}."
            )
    return arms


def run_recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, as its report has them, as `--config` takes them."""
    sections = {name: section for name, section in settings.items() if name not in ("run", "arms")}
    keys = ("sae_from", "known", "like", "adapter", "text")
    named = {
        arm.name: {key: value for key in keys if (value := plain_arm(arm).get(key)) is not None} | dict(arm.tuning)
        for arm in (Arm(**entry) for entry in settings["arms"])
    }
    return {**settings["run"], **sections, "arms": named}


def plain_arm(arm: Arm) -> dict[str, Any]:
    """An arm as JSON can hold it; `text` only where it is not the dataset's, as in runs that knew no other."""
    plain = {**asdict(arm), "tuning": dict(arm.tuning)}
    return {key: value for key, value in plain.items() if (key, value) != ("text", DATASET)}


def _check_arm(arm: Arm, pretrained: bool, has_source: bool) -> None:
    if arm.known is not None and arm.adapter is not None:
        raise ValueError(f"Arm {arm.name!r} is both known ({arm.known}) and taken ({arm.adapter}): it can be one.")
    if arm.known in ("svd_of_source", "source") and not has_source:
        raise ValueError(f"Arm {arm.name!r}: {arm.known} needs a source model that is not the target.")
    if arm.text in (SOURCE, STUDENT) and not has_source:
        raise ValueError(f"Arm {arm.name!r}: text: {arm.text} needs a source model that is not the target.")
    if arm.sae_from == "pretrained" and not pretrained:
        raise ValueError(f"Arm {arm.name!r} wants the pretrained SAE, but `sae` is not set.")
    if arm.sae_from in ("source", "base") and pretrained:
        raise ValueError(f"Arm {arm.name!r} wants an SAE of the {arm.sae_from}, but `sae` names a pretrained one.")
