"""Whether an evaluation is one of this very adapter, told by the sizes of its updates."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key

from ..errors import PublishError
from ..evaluation.arguments import EvaluateArguments
from ..evaluation.movement import LoraUpdate
from .adapter_files import read_adapter

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
        `PublishError`: if the adapter's files cannot be used; or if none of the evaluated adapters, controls aside,
            has these sizes, or several have.
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
    """||dW||_F of each linear module by its name in the base model."""
    config, tensors = read_adapter(adapter)
    alphas = config.alpha_pattern or {}
    norms = {}
    for key, A in tensors.items():
        if key.endswith(_A):
            name = key.removeprefix(_PREFIX).removesuffix(_A)
            alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
            # The rank of the tensor itself is that of rank_pattern, too.
            scaling = alpha / (math.sqrt(A.shape[0]) if config.use_rslora else A.shape[0])
            norms[name] = LoraUpdate(name, A, tensors[key.replace(_A, _B)], scaling).norm()
    return norms


def _is_same(norms: Mapping[str, float], measured: Mapping[str, float]) -> bool:
    return (
        bool(norms)
        and norms.keys() == measured.keys()
        and all(math.isclose(norms[name], measured[name], rel_tol=_TOLERANCE) for name in norms)
    )
