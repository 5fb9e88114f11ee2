"""Whether an evaluation is one of this very adapter, told by the sizes of its updates."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file

from ..errors import PublishError
from ..evaluation.arguments import EvaluateArguments
from ..evaluation.movement import LoraUpdate

_A, _B, _PREFIX = ".lora_A.weight", ".lora_B.weight", "base_model.model."
_TOLERANCE = 1e-3  # relative; the evaluation may have held the adapter in bfloat16


def evaluated_as(adapter: Path, evaluation: Mapping[str, Any], path: Path) -> str:
    """
    The name under which `resa-hf evaluate` evaluated an adapter.

    Its report holds ||dW|| of every module of each adapter. Folders are not compared: they move between machines, and
    may hold another training by now.

    Args:
        adapter (`Path`): the adapter's folder.
        evaluation (`Mapping`): the report.
        path (`Path`): where it lies, for messages.

    Raises:
        `PublishError`: if none of the evaluated adapters, controls aside, has these sizes, or several have.
    """
    norms = update_norms(adapter)
    try:
        groups = [EvaluateArguments.name_and_place(text)[0] for text in evaluation["settings"]["adapters"]]
        moved = {model["name"]: model["moved"] for model in evaluation["models"] if model["name"] in groups}
    except (KeyError, TypeError):
        raise PublishError(f"{path} is not a report of resa-hf evaluate.") from None
    same = [name for name, measured in moved.items() if _is_same(norms, measured.get("update_norms", {}))]
    if len(same) == 1:
        return same[0]
    unmeasured = " (evaluated on a server, which does not tell the weights)" if not any(moved.values()) else ""
    raise PublishError(
        f"{path} is {'of several adapters with the weights' if same else 'not an evaluation'} of {adapter}: it "
        f"evaluates {', '.join(moved) or 'none'}{unmeasured}. Run resa-hf evaluate --adapters {adapter}."
    )


def update_norms(adapter: Path) -> dict[str, float]:
    """||dW||_F of each module by its name in the base model; empty for what is not LoRA."""
    config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, LoraConfig):
        return {}
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    tensors = load_file(adapter / "adapter_model.safetensors")
    return {
        name: LoraUpdate(name, A, tensors[key.replace(_A, _B)], scaling).norm()
        for key, A in tensors.items()
        if key.endswith(_A)
        for name in [key.removeprefix(_PREFIX).removesuffix(_A)]
    }


def _is_same(norms: Mapping[str, float], measured: Mapping[str, float]) -> bool:
    return (
        bool(norms)
        and norms.keys() == measured.keys()
        and all(math.isclose(norms[name], measured[name], rel_tol=_TOLERANCE) for name in norms)
    )
