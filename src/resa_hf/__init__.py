"""SAE-Tuning for the Hugging Face ecosystem: elicit reasoning with a sparse autoencoder, and judge whether it worked.

The public names are imported when they are first used: torch and sae-lens take seconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "HookpointError": "errors",
    "IncompatibleAdapterError": "errors",
    "IncompatibleSAEError": "errors",
    "SAETrainer": "sae.trainer",
    "SAETrainingConfig": "sae.config",
    "SAETuningConfig": "tuning.config",
    "SAETuningTrainer": "tuning.trainer",
    "capture": "hookpoints",
    "load_reasoning_adapter": "adapters",
    "load_sae": "sae.checkpoint",
    "push_sae_to_hub": "hub.sae_repo",
    "resolve_hookpoint": "hookpoints",
    "save_sae": "sae.checkpoint",
    "splice": "hookpoints",
}

__all__ = [
    "HookpointError",
    "IncompatibleAdapterError",
    "IncompatibleSAEError",
    "SAETrainer",
    "SAETrainingConfig",
    "SAETuningConfig",
    "SAETuningTrainer",
    "capture",
    "load_reasoning_adapter",
    "load_sae",
    "push_sae_to_hub",
    "resolve_hookpoint",
    "save_sae",
    "splice",
]

if TYPE_CHECKING:
    from .adapters import load_reasoning_adapter
    from .errors import HookpointError, IncompatibleAdapterError, IncompatibleSAEError
    from .hookpoints import capture, resolve_hookpoint, splice
    from .hub.sae_repo import push_sae_to_hub
    from .sae.checkpoint import load_sae, save_sae
    from .sae.config import SAETrainingConfig
    from .sae.trainer import SAETrainer
    from .tuning.config import SAETuningConfig
    from .tuning.trainer import SAETuningTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
