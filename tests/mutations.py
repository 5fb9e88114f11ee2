"""Strategies for hypothesis: a JSON configuration or a safetensors file, as an attacker or a bad disk leaves it."""

import json
import struct
from collections.abc import Callable
from typing import Any

import torch
import yaml
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save

Change = Callable[[bytes], bytes]

# What a change raises on a file that an earlier one broke.
_BROKEN = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    SafetensorError,
    yaml.YAMLError,
)

SIZES = st.sampled_from([-1, 0, 1, 7, 8, 9, 24, 2**31, 2**63, 10**12, 10**30])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    SIZES,
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=()), max_size=8),
    st.sampled_from(["../../evil", "topk", "float32", "none", "layers.1", "(a+)+$", "main", "__class__", "self"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def _set(key: str, value: Any) -> Change:
    return lambda raw: json.dumps({**json.loads(raw), key: value}).encode()


def _set_inside(outer: str, key: str, value: Any) -> Change:
    return lambda raw: _set(outer, {**json.loads(raw)[outer], key: value})(raw)


def _drop(key: str) -> Change:
    return lambda raw: json.dumps({name: value for name, value in json.loads(raw).items() if name != key}).encode()


def _nest(key: str, depth: int) -> Change:
    return lambda raw: raw.rstrip()[:-1] + f', "{key}": '.encode() + b"[" * depth + b"]" * depth + b"}"


def _cut(at: int) -> Change:
    return lambda raw: raw[: at % (len(raw) + 1)]


def _flip(at: int, bit: int) -> Change:
    def change(raw: bytes) -> bytes:
        spot = at % max(len(raw), 1)
        return raw[:spot] + bytes([raw[spot] ^ (1 << bit)]) + raw[spot + 1 :] if raw else raw

    return change


def _insert(at: int, more: bytes) -> Change:
    return lambda raw: raw[: at % (len(raw) + 1)] + more + raw[at % (len(raw) + 1) :]


def _overwrite(at: int, more: bytes) -> Change:
    return lambda raw: raw[: at % (len(raw) + 1)] + more + raw[at % (len(raw) + 1) + len(more) :]


def _repeat(at: int, size: int) -> Change:
    return lambda raw: raw[: at % (len(raw) + 1) + size] + raw[at % (len(raw) + 1) :]


def damage() -> st.SearchStrategy[Change]:
    """One change of bytes: cut short, a bit flipped, some put in, written over, lost to zeros, or there twice."""
    spots, sizes = st.integers(0, 2**16), st.sampled_from([1, 2, 7, 16, 64, 512, 4096])
    return st.one_of(
        st.builds(_cut, spots),
        st.builds(_flip, spots, st.integers(0, 7)),
        st.builds(_insert, spots, st.binary(min_size=1, max_size=8)),
        st.builds(_overwrite, spots, st.binary(min_size=1, max_size=16) | st.builds(bytes, sizes)),
        st.builds(_repeat, spots, sizes),
    )


def config_changes(keys: list[str], outer: str, inner: list[str]) -> st.SearchStrategy[list[Change]]:
    """One to four changes of a JSON object: keys set or dropped, at the end maybe something nested, or bytes damaged.

    `inner` are keys of the object that lies at the key `outer`.
    """
    key = st.sampled_from(keys) | st.text(max_size=5)
    whole = st.one_of(
        st.builds(_set, key, VALUES),
        st.builds(_set, key, SIZES),
        st.builds(_set_inside, st.just(outer), st.sampled_from(inner), VALUES),
        st.builds(_drop, key),
    )
    last = st.lists(
        st.builds(_nest, st.just("deep"), st.sampled_from([1, 63, 64, 900, 100_000])) | damage(), max_size=1
    )
    return st.builds(list.__add__, st.lists(whole, min_size=1, max_size=3), last)


def _with_header(edit: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    def change(raw: bytes) -> bytes:
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.dumps(edit(json.loads(raw[8 : 8 + size]))).encode()
        return struct.pack("<Q", len(header)) + header + raw[8 + size :]

    return change


def _edit_entry(index: int, key: str, value: Any) -> Change:
    def edit(header: dict[str, Any]) -> dict[str, Any]:
        name = sorted(header)[index % len(header)]
        return {**header, name: {**header[name], key: value} if isinstance(header[name], dict) else value}

    return _with_header(edit)


def _replace_entry(index: int, value: Any) -> Change:
    return _with_header(lambda header: {**header, sorted(header)[index % len(header)]: value})


def _claim_size(size: int) -> Change:
    return lambda raw: struct.pack("<Q", size) + raw[8:]


def _with_tensors(edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    return lambda raw: save({name: tensor.contiguous() for name, tensor in edit(load(raw)).items()})


def _change_tensor(index: int, how: str) -> Change:
    hows: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "flat": lambda x: x.reshape(-1),
        "transposed": lambda x: x.t() if x.ndim == 2 else x,
        "wrapped": lambda x: x[None],
        "empty": lambda x: x[:0],
        "scalar": lambda x: x.sum(),
        "doubled": lambda x: torch.cat([x, x]),
        "nan": lambda x: x * torch.nan,
        "huge": lambda x: (x * 0 + 1).double() * 1e300,
        "large": lambda x: x * 0 + 3e38,
        **{
            str(dtype): lambda x, dtype=dtype: x.to(dtype)
            for dtype in (torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64)
        },
    }

    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = sorted(tensors)[index % len(tensors)]
        return {**tensors, name: hows[how](tensors[name])}

    return _with_tensors(edit)


def _rename_tensor(index: int, to: str) -> Change:
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = sorted(tensors)[index % len(tensors)]
        return {(to if key == name else key): tensor for key, tensor in tensors.items()}

    return _with_tensors(edit)


def weights_change() -> st.SearchStrategy[Change]:
    """One change of a safetensors file: bytes, header, or tensors."""
    index = st.integers(0, 50)
    kinds = ["flat", "transposed", "wrapped", "empty", "scalar", "doubled", "nan", "huge", "large"]
    kinds += [f"torch.{name}" for name in ("int64", "bool", "float16", "bfloat16", "float8_e4m3fn", "float64")]
    return st.one_of(
        damage(),
        st.builds(_claim_size, st.integers(0, 2**64 - 1) | st.integers(0, 2000)),
        st.builds(_edit_entry, index, st.sampled_from(["shape", "data_offsets"]), st.lists(SIZES, max_size=3)),
        st.builds(_edit_entry, index, st.sampled_from(["shape", "dtype", "data_offsets", "more"]), VALUES),
        st.builds(_replace_entry, index, VALUES),
        st.builds(_change_tensor, index, st.sampled_from(kinds)),
        st.builds(
            _rename_tensor, index, st.text(max_size=5) | st.sampled_from(["W_dec", "b_enc", "scaling_factor", "../x"])
        ),
    )


def apply(raw: bytes, changes: list[Change]) -> bytes:
    """The changed file; a change that no longer applies, since an earlier one broke the file, is left out."""
    for change in changes:
        try:
            raw = change(raw)
        except _BROKEN:
            continue
    return raw
