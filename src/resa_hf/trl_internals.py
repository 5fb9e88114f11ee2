"""The one place that imports private names of TRL, so that a new TRL version has one file to be checked against.

`_ForwardRedirection` routes a loss that calls the backbone directly through the DDP/FSDP wrapper's forward; without it
DDP never all-reduces the gradients. It has no public counterpart (trl 1.16).
"""

from trl.models.utils import _ForwardRedirection as ForwardRedirection

__all__ = ["ForwardRedirection"]
