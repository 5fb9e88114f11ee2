"""What is known of an artifact that is to be published: what its reports say, and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Record:
    """The evidence behind a model card. What is not in it, the card does not claim.

    Args:
        report (`Mapping`, *optional*):
            report.json of `resa-hf run`, `compare`, `demo`, `tune` or `train-sae`.
        evaluation (`Mapping`, *optional*):
            report.json of `resa-hf evaluate`, of this very adapter.
        arm (`str`, *optional*):
            The adapter's arm in `report`, where it has arms.
        evaluated_as (`str`, *optional*):
            The adapter's name among the `models` of `evaluation`.
        seed (`int`, *optional*):
            The seed that this adapter or SAE was trained with.
        recipe (`Mapping`):
            The whole recipe, as YAML can hold it: flat for `tune` and `train-sae`, with sections for the others.
        revisions (`Mapping`):
            By role (`base`, `base_adapter`, `source`, `source_adapter`, `sae`, `initial_sae`, `evaluate_on`,
            `dataset`, `trigger_dataset`) the `name`, and the `commit` that was used (`None` for what is not on the
            Hub, moved meanwhile, or was not recorded).
        saes (`Mapping`):
            By hookpoint what is known of the SAE: `d_in`, `num_latents`, `k`, `hook_name`, and where measured `fvu`,
            `l0`, `dead_share`, `ce_recovered`.
    """

    report: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    arm: str | None = None
    evaluated_as: str | None = None
    seed: int | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    revisions: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    saes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def datasets(self) -> list[str]:
        """The names of the Hub datasets that were trained on: those of which a commit is known."""
        return [
            str(read["name"])
            for role, read in self.revisions.items()
            if role.endswith("dataset") and read["commit"] is not None
        ]
