"""Strategies for hypothesis: changes anywhere in a JSON, JSONL or YAML file, whatever it holds."""

import json
from collections.abc import Callable
from typing import Any

import yaml
from hypothesis import strategies as st
from mutations import VALUES, Change, damage

Edit = Callable[[Any, Any], None]

# What json.dumps does not write: numbers past every type, constants, tags, references, what no text file can hold.
_RAW_JSON = ["1e999", "-1e999", "NaN", "-Infinity", "-0", "1E-999", '"\\ud800"', "\x00", "0x1F", "[" * 9]
_RAW_JSON += [
    '{"a": 1, "a": {}}',
    '"\\u0000"',
    "1.5",
    "2024-01-01",
    "''",
    "long",
    "deep",
    "deeper",
    "objects",
    "digits",
]
# By name: hypothesis prints what it draws.
_LARGE = {
    "long": '"' + "x" * 100_000 + '"',
    "deep": "[" * 900 + "]" * 900,
    "deeper": "[" * 100_000 + "]" * 100_000,
    "objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "digits": "9" * 5000,
}
_RAW_YAML = ["!!timestamp x", "!!int ''", '!!float ""', "!!binary x", "!!set {}", "!!python/name:os.system ''"]
_RAW_YAML += ["2001-99-99", "1:60:61", "&a [*a]", "*nowhere", "{[]: 1}", "{? {} : 1}", "{<<: 5}", "!x y", "0b", ".inf"]
_RAW_YAML += [
    "!!omap [a]",
    "!!pairs 5",
    "- - -",
    "\t",
    "%YAML 9.9",
    "---\n...",
    "0o7_",
    "=",
    "<<",
    "~",
    "on",
    "\ufeff",
]
_MARK = "here-be-dragons"


def _spots(tree: Any) -> list[tuple[Any, Any]]:
    """Every place in it: a container and a key of it."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    found = []
    for key in keys:
        found += [(tree, key), *_spots(tree[key])]
    return found


def _edited(index: int, edit: Edit) -> Change:
    def change(raw: bytes) -> bytes:
        tree = [json.loads(raw)]
        spots = _spots(tree)
        edit(*spots[index % len(spots)])
        return json.dumps(tree[0]).encode()

    return change


def _set(index: int, value: Any) -> Change:
    def edit(container: Any, key: Any) -> None:
        container[key] = value

    return _edited(index, edit)


def _write(index: int, token: str) -> Change:
    place = _set(index, _MARK)
    return lambda raw: place(raw).replace(f'"{_MARK}"'.encode(), _LARGE.get(token, token).encode(), 1)


def _delete(index: int) -> Change:
    return _edited(index, lambda container, key: container.pop(key))


def _rename(index: int, name: str) -> Change:
    def edit(container: Any, key: Any) -> None:
        value = container.pop(key)
        container.update({name: value}) if isinstance(container, dict) else container.append(value)

    return _edited(index, edit)


def _wrap(index: int, in_list: bool) -> Change:
    def edit(container: Any, key: Any) -> None:
        container[key] = [container[key]] if in_list else {"value": container[key]}

    return _edited(index, edit)


def _copy(index: int, other: int) -> Change:
    """What stands in one place also in another."""

    def change(raw: bytes) -> bytes:
        tree = [json.loads(raw)]
        spots = _spots(tree)
        (here, key), (there, name) = spots[index % len(spots)], spots[other % len(spots)]
        here[key] = there[name]
        return json.dumps(tree[0]).encode()  # what would hold itself is refused, and the change left out

    return change


def _times(index: int, factor: float) -> Change:
    def edit(container: Any, key: Any) -> None:
        container[key] = container[key] * factor

    return _edited(index, edit)


def tree_change(tokens: list[str] = _RAW_JSON) -> st.SearchStrategy[Change]:
    """One change of a JSON file in some place of it."""
    spots = st.integers(0, 2**12)
    return st.one_of(
        st.builds(_set, spots, VALUES),
        st.builds(_write, spots, st.sampled_from(tokens)),
        st.builds(_delete, spots),
        st.builds(_rename, spots, st.text(max_size=5)),
        st.builds(_wrap, spots, st.booleans()),
        st.builds(_copy, spots, spots),
        st.builds(_times, spots, st.sampled_from([-1, 0, 3, 1e300, -1e-300])),
    )


def _some(structure: st.SearchStrategy[Change]) -> st.SearchStrategy[list[Change]]:
    """Structure and then bytes: damage first would leave no structure to change."""
    both = st.builds(list.__add__, st.lists(structure, min_size=1, max_size=3), st.lists(damage(), max_size=1))
    return both | st.lists(damage(), min_size=1, max_size=2)


def json_changes() -> st.SearchStrategy[list[Change]]:
    """Changes of a JSON file."""
    return _some(tree_change())


def _in_line(index: int, change: Change) -> Change:
    def changed(raw: bytes) -> bytes:
        lines = raw.splitlines()
        at = index % len(lines)
        return b"\n".join([*lines[:at], change(lines[at]), *lines[at + 1 :]]) + b"\n"

    return changed


def _line_moved(index: int, to: int) -> Change:
    def changed(raw: bytes) -> bytes:
        lines = raw.splitlines()
        lines.insert(to % len(lines), lines[index % len(lines)])
        return b"\n".join(lines) + b"\n"

    return changed


def line_changes() -> st.SearchStrategy[list[Change]]:
    """Changes of a JSONL file."""
    index = st.integers(0, 2**8)
    return _some(st.builds(_in_line, index, tree_change()) | st.builds(_line_moved, index, index))


def _of_yaml(change: Change) -> Change:
    # JSON is YAML, and is changed without losing what YAML would not write again.
    return lambda raw: change(json.dumps(yaml.safe_load(raw)).encode())


def _insert_text(at: int, text: str) -> Change:
    return lambda raw: raw[: at % (len(raw) + 1)] + text.encode() + raw[at % (len(raw) + 1) :]


def yaml_changes() -> st.SearchStrategy[list[Change]]:
    """Changes of a YAML file."""
    written = st.builds(_insert_text, st.integers(0, 2**12), st.sampled_from(_RAW_YAML))
    return st.lists(written, min_size=1, max_size=2) | _some(
        st.builds(_of_yaml, tree_change(_RAW_JSON + _RAW_YAML)) | st.builds(_of_yaml, tree_change())
    )


def _of_front_matter(change: Change) -> Change:
    def changed(raw: bytes) -> bytes:
        before, front, rest = raw.split(b"---\n", 2)
        return before + b"---\n" + change(front) + b"\n---\n" + rest

    return changed


def card_changes() -> st.SearchStrategy[list[Change]]:
    """Changes of a Markdown file with YAML before it."""
    return st.lists(damage(), min_size=1, max_size=2) | yaml_changes().map(
        lambda them: list(map(_of_front_matter, them))
    )


def byte_changes() -> st.SearchStrategy[list[Change]]:
    """Changes of a file that is no text, or has no structure; at times another file altogether."""
    other = st.builds(lambda raw: lambda _: raw, st.binary(max_size=64))
    return st.lists(damage(), min_size=1, max_size=4) | st.lists(other, min_size=1, max_size=1)
