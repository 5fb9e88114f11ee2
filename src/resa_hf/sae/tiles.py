"""Passes over large tensors, piece by piece."""

from collections.abc import Iterator

from torch import Tensor

# Elements of a piece. On a CPU 1 MiB in float32, so that four tensors' pieces stay in the caches between passes: half
# the time at [65,536, 1536]. On an accelerator it only bounds the memory for what a pass makes.
_ELEMENTS_CPU = 2**18
_ELEMENTS = 2**26


def tiles(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """
    The same pieces of several tensors, one after the other. A contiguous matrix is cut into blocks of whole rows.

    Args:
        tensors (`torch.Tensor`): of one shape.

    Yields:
        `tuple[torch.Tensor, ...]`: views, one of each.
    """
    first = tensors[0]
    if first.dim() == 0:
        yield tensors
        return
    outer = max(range(first.dim()), key=first.stride)
    elements = _ELEMENTS_CPU if first.device.type == "cpu" else _ELEMENTS
    size = max(1, elements * first.shape[outer] // max(1, first.numel()))
    yield from zip(*(tensor.split(size, outer) for tensor in tensors), strict=True)
