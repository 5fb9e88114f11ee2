"""A yes or no of the device that the host reads without making the device wait for it."""

import torch
from torch import Tensor


class LateFlag:
    """
    Holds one flag, to be read when more work is queued behind it: then it is there, and nobody has to wait.

    Asking an accelerator for a value at once lets it run dry, until the host has queued the next step.
    """

    def __init__(self) -> None:
        self._flag: Tensor | None = None
        self._copied: torch.Event | None = None

    def put(self, flag: Tensor) -> None:
        """
        Args:
            flag (`torch.Tensor`): bool, one value.
        """
        self._flag = flag
        if flag.device.type == "cuda":
            self._flag = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._flag.copy_(flag, non_blocking=True)
            self._copied = torch.Event(flag.device)
            self._copied.record()

    def take(self) -> bool:
        """What was put last, once; `False` if nothing was."""
        flag, self._flag = self._flag, None
        if flag is None:
            return False
        if self._copied is not None:
            self._copied.synchronize()
        return bool(flag)
