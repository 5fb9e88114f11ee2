"""The one place that imports private names of TRL, so that a new TRL version has one file to be checked against.

`_ForwardRedirection` routes a loss that calls the backbone directly through the DDP/FSDP wrapper's forward; without it
DDP never all-reduces the gradients. `maybe_gather_lm_head_ctx` makes the LM head's weight whole under ZeRO-3, where it
is read without a call of the layer. They have no public counterpart (trl 1.16).
"""

from trl.models.utils import _ForwardRedirection as ForwardRedirection
from trl.trainer.utils import maybe_gather_lm_head_ctx

__all__ = ["ForwardRedirection", "maybe_gather_lm_head_ctx"]
