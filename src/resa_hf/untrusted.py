"""Files that strangers wrote: JSON and safetensors, looked at before anything in them is believed."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_JSON_BYTES = 2**20
_JSON_DEPTH = 64
# Of a safetensors header: 100,000 tensors. The library itself would parse a hundred megabytes.
_HEADER_BYTES = 2**24
_FLOATS = ("F64", "F32", "BF16", "F16")


def read_json_object(path: Path, root: Path, error: type[ValueError]) -> dict[str, Any]:
    """The JSON object of a file of an artifact.

    Args:
        path (`Path`): the file.
        root (`Path`): the artifact's folder, out of which no link may lead.
        error (`type[ValueError]`): what is raised.

    Raises:
        `error`: if it is missing, larger than 1 MiB, no JSON object, nested deeper than 64 levels, or names a key
            twice.
    """
    check_plain(path, root, error)
    if path.stat().st_size > _JSON_BYTES:
        raise error(f"{path} is larger than {_JSON_BYTES} bytes: too large for a configuration.")
    try:
        value = json.loads(path.read_bytes().decode(), object_pairs_hook=_each_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not valid JSON: {cause}.") from cause
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    level: list[Any] = [value]
    for _ in range(_JSON_DEPTH):
        level = [
            item
            for container in level
            if isinstance(container, dict | list)
            for item in (container.values() if isinstance(container, dict) else container)
        ]
    if level:
        raise error(f"{path} is nested deeper than {_JSON_DEPTH} levels.")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def check_plain(path: Path, root: Path, error: type[ValueError]) -> None:
    """Raises unless it is a regular file whose links stay inside, or lead to the blobs of the Hub's own cache."""
    if not path.is_file():
        raise error(f"{path} is missing, or no regular file.")
    real, inside = path.resolve(), root.resolve()
    cached = real.parent.name == "blobs" and real.parents[1] / "snapshots" in inside.parents
    if not (real.is_relative_to(inside) or cached):
        raise error(f"{path} is a link that leads out of {root}.")


def read_shapes(path: Path, root: Path, error: type[ValueError]) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors, from its header alone.

    Args:
        path (`Path`): the file.
        root (`Path`): the artifact's folder, out of which no link may lead.
        error (`type[ValueError]`): what is raised.

    Raises:
        `error`: if it is missing, no whole safetensors file, or has a tensor that is not floating.
    """
    check_plain(path, root, error)
    with path.open("rb") as raw:
        start, header = raw.read(8), raw.read(1)
    # A header's length may begin with these bytes, too; the header itself is JSON.
    if header != b"{" and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"):
        raise error(f"{path} is a pickle under another name. Pickles can run code, and are not read.")
    size = int.from_bytes(start, "little")
    if size > _HEADER_BYTES:
        raise error(f"{path} is corrupt or cut short, or no safetensors file: its header would take {size} bytes.")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a mapping
            for name, tensor in slices.items():
                if tensor.get_dtype() not in _FLOATS:
                    raise error(f"{path}: {name} has dtype {tensor.get_dtype()}, not one of {', '.join(_FLOATS)}.")
            return {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
    except (SafetensorError, OSError) as cause:
        raise error(f"{path} is corrupt or cut short ({cause}). Save or download it again.") from cause


def read_tensors(path: Path, error: type[ValueError]) -> dict[str, Tensor]:
    """The tensors of a file that `read_shapes` has looked at, on the CPU.

    Raises:
        `error`: if one is not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    except (SafetensorError, OSError) as cause:
        raise error(f"{path} is corrupt or cut short ({cause}). Save or download it again.") from cause
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            broken = int((~torch.isfinite(_as_converted(tensor))).sum())
            raise error(f"{path}: {name} has {broken} entries that are NaN or infinite.")
    return tensors


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; unlike `isfinite` it makes no copy of what may be a mapped file."""
    return not tensor.numel() or all(bool(_as_converted(end).isfinite()) for end in tensor.aminmax())


def _as_converted(tensor: Tensor) -> Tensor:
    """What is too large for float32 would be infinite after the first conversion."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor
