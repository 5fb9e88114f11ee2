"""Adapters and SAEs made to do harm: each is refused with its reason, before it has done or taken anything."""

import json
import os
import pickle
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bombs import Bomb, little_memory
from peft import LoraConfig, get_peft_model
from sae_files import D_IN, LATENTS, edit, make_sae
from safetensors.torch import load_file, save_file

from resa_hf.adapters import load_reasoning_adapter
from resa_hf.errors import IncompatibleAdapterError, IncompatibleSAEError
from resa_hf.models import load_causal_lm
from resa_hf.sae.checkpoint import load_sae, save_sae

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
EXPLODING = "(([a-z.0-9]+)+)+!"


@pytest.fixture
def adapter(make_model, tmp_path) -> Path:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(make_model("qwen2"), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def sae(tmp_path) -> Path:
    save_sae(make_sae(), tmp_path / "saes" / "layers.1")
    return tmp_path / "saes" / "layers.1"


@pytest.fixture(autouse=True)
def little_memory_and_time() -> Iterator[None]:
    """A gigabyte more than now, and ten seconds."""
    start = time.monotonic()
    with little_memory():
        yield
    assert time.monotonic() - start < 10


def refused(make_model, folder, message, **kwargs):
    """The adapter is refused, and the model as it was."""
    model = make_model("qwen2")
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(IncompatibleAdapterError, match=message) as error:
        load_reasoning_adapter(model, folder, **kwargs)
    assert [name for name, _ in model.named_modules()] == before
    assert len(str(error.value)) < 2000


def write_safetensors(path: Path, header: dict[str, Any] | bytes, body: bytes = b"", size: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if size is None else size) + raw + body)


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "only LoRA"),
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"peft_type": ["LORA"]}, "only LoRA"),
        ({"peft_type": None}, "only LoRA"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"use_dora": True}, "DoRA rescales"),
        ({"modules_to_save": ["lm_head"]}, "replaces whole modules"),
        ({"trainable_token_indices": [1, 2]}, "replaces embeddings"),
        ({"bias": "all"}, "biases of its base"),
        ({"lora_bias": True}, "trains biases"),
        ({"init_lora_weights": "pissa_niter_4"}, "cut out of its base's weights"),
        ({"init_lora_weights": {"olora": 1}}, "cut out of its base's weights"),
        ({"layer_replication": [[0, 4]]}, "no setting of plain LoRA"),
        ({"target_parameters": ["weight"]}, "no setting of plain LoRA"),
        ({"trust_remote_code": True}, "'trust_remote_code' is True: that is no setting"),
        ({"auto_map": {"AutoModel": "me/evil--modeling.Evil"}}, "'auto_map' is"),
        ({"custom_modules": {"Linear": "evil.Linear"}}, "'custom_modules' is"),
        ({"auto_mapping": {"base_model_class": "system", "parent_library": "os"}}, "auto_mapping is"),
        (
            {"auto_mapping": {"base_model_class": "A", "parent_library": "transformers.a", "code": "x"}},
            "auto_mapping is",
        ),
        ({"auto_mapping": "os"}, "auto_mapping is 'os'"),
        ({"r": "32"}, "r is '32'"),
        ({"r": -4}, "r is -4"),
        ({"r": 0}, "r is 0"),
        ({"r": 4.0}, "r is 4.0"),
        ({"r": True}, "r is True"),
        ({"r": [4]}, r"r is \[4\]"),
        ({"r": 10**9}, rf"{FIRST} is \[4, 32\] in the adapter and \[1000000000, 32\]"),
        ({"r": 10**30}, "r is 10000000"),
        ({"rank_pattern": {"q_proj": 10**12}}, "rank_pattern is"),
        ({"rank_pattern": {EXPLODING: 4}}, "rank_pattern is"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern is"),
        ({"alpha_pattern": {EXPLODING: 8}}, "alpha_pattern is"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_dropout": 2}, "lora_dropout is 2"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out is 1"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"target_modules": [EXPLODING]}, "target_modules is"),
        ({"target_modules": [["q_proj"]]}, "target_modules is"),
        ({"target_modules": [f"m{i}" for i in range(5000)]}, "target_modules is"),
        ({"target_modules": ["nothing"]}, "does not fit .*nothing"),
        ({"target_modules": []}, "does not fit"),
        ({"target_modules": ["layers.0"]}, "does not fit .*Target module Qwen2DecoderLayer"),
        ({"exclude_modules": {"q_proj": 1}}, "exclude_modules is"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is"),
        ({"layers_to_transform": [0], "layers_pattern": EXPLODING}, "layers_pattern is"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5"),
        ({"revision": ["main"]}, "revision is"),
    ],
)
def test_settings_that_no_plain_lora_has(make_model, adapter, changes, message):
    path = adapter / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    refused(make_model, adapter, message)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_an_expression_is_never_run(make_model, adapter, key):
    expected = load_reasoning_adapter(make_model("qwen2"), adapter)
    edit(adapter / CONFIG, **{key: EXPLODING})
    loaded = load_reasoning_adapter(make_model("qwen2"), adapter)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"r": ' * 500 + "1" + "}" * 500, "nested deeper than 64"),
        ('{"a": "%s"}' % ("x" * 2**21), "larger than 1048576 bytes"),
        ('{"r": 4, "r": 8}', "the key 'r' occurs twice"),
        ('{"r": NaN}', "NaN is no JSON"),
        ('{"r": %s}' % ("9" * 10_000), "not valid JSON"),
        ("[]", "JSON object, not a list"),
        ("\xff", "only LoRA|not valid JSON"),
    ],
)
@pytest.mark.parametrize("kind", ["adapter", "sae"])
def test_json_that_is_none_or_too_much(make_model, adapter, sae, kind, text, message):
    if kind == "adapter":
        (adapter / CONFIG).write_bytes(text.encode("latin-1"))
        refused(make_model, adapter, message)
    else:
        (sae / "cfg.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(IncompatibleSAEError, match=message):
            load_sae(sae, ".")


def spoil_weights(path: Path, case: str, tmp_path: Path) -> None:
    header, body = read_safetensors(path)
    name = next(name for name in sorted(header) if name != "__metadata__")
    if case == "pickle":
        path.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    elif case == "torch file":
        torch.save({"a": torch.zeros(2)}, path)
    elif case == "oversized header":
        write_safetensors(path, header, body, size=2**62)
    elif case == "large header":
        write_safetensors(path, json.dumps(header).encode().ljust(2**24 + 1), body)
    elif case == "offsets":
        header[name]["data_offsets"] = [0, 2**50]
        write_safetensors(path, header, body)
    elif case == "overlap":
        for entry in header.values():
            if "data_offsets" in entry:
                entry["data_offsets"] = [0, entry["data_offsets"][1] - entry["data_offsets"][0]]
        write_safetensors(path, header, body)
    elif case == "shape":
        header[name]["shape"] = [2**40, 2**40]
        write_safetensors(path, header, body)
    elif case == "empty shape":
        # Zero bytes, and a shape that takes none.
        header = {"x": {"dtype": "F32", "shape": [10**15, 0], "data_offsets": [0, 0]}}
        write_safetensors(path, header)
    elif case == "dtype":
        save_file({name: torch.zeros(3, dtype=torch.int64)}, path)
    elif case in ("nan", "inf"):
        tensors = load_file(path)
        tensors[name].view(-1)[1] = float(case)
        save_file(tensors, path)
    elif case == "too large for float32":
        tensors = load_file(path)
        save_file({**tensors, name: torch.full_like(tensors[name], 1e300, dtype=torch.float64)}, path)


SPOILT = {
    "pickle": "is a pickle under another name",
    "torch file": "is a pickle under another name",
    "oversized header": "its header would take 4611686018427387904 bytes",
    "large header": "its header would take 16777217 bytes",
    "offsets": "corrupt or cut short",
    "overlap": "corrupt or cut short",
    "shape": "corrupt or cut short",
    "empty shape": "x is|lacks the tensor|missing in the adapter",
    "dtype": "has dtype I64",
    "nan": "has 1 entries that are NaN or infinite",
    "inf": "has 1 entries that are NaN or infinite",
    "too large for float32": "entries that are NaN or infinite",
}


@pytest.mark.parametrize("case", SPOILT)
@pytest.mark.parametrize("kind", ["adapter", "sae"])
def test_weights_that_are_none(make_model, adapter, sae, tmp_path, kind, case):
    if kind == "adapter":
        spoil_weights(adapter / WEIGHTS, case, tmp_path)
        refused(make_model, adapter, SPOILT[case])
    else:
        spoil_weights(sae / "sae_weights.safetensors", case, tmp_path)
        with pytest.raises(IncompatibleSAEError, match=SPOILT[case]):
            load_sae(sae, ".")
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_in_place_of_safetensors_is_never_read(make_model, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    (adapter / WEIGHTS).unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    refused(make_model, adapter, "holds no adapter_model.safetensors. Other weights are not read: a pickle")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_in": 10**12, "d_sae": 10**12}, rf"W_dec has shape \[{LATENTS}, {D_IN}\]"),
        ({"d_in": 10**30}, "W_dec has shape"),
        ({"d_sae": 2**63}, "W_dec has shape"),
        ({"k": 10**30}, "more than the 24 latents"),
        ({"k": True}, "k must be a positive whole number"),
        ({"architecture": "temporal", "n_attn_layers": 10**9}, "unknown architecture 'temporal'"),
        ({"architecture": ["topk"]}, "unknown architecture"),
        ({"dtype": "system"}, "not a configuration that sae-lens reads"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input must be true or false"),
        ({"metadata": {"self": 1, "sae_lens_version": "6.54.0"}}, "not a configuration that sae-lens reads"),
        ({"metadata": {"sae_lens_version": [6]}}, "not a configuration that sae-lens reads"),
    ],
)
def test_sae_settings_that_cannot_be(sae, changes, message):
    edit(sae / "cfg.json", **changes)
    with pytest.raises(IncompatibleSAEError, match=message):
        load_sae(sae, ".")


@pytest.mark.parametrize(
    "hookpoint", ["../../evil", "/etc/passwd", "layers.1/x", "C:\\x", "a\0b", ".", "..", 3, ["a"]]
)
def test_hookpoints_that_are_paths(sae, hookpoint):
    edit(sae / "cfg.json", metadata={"hookpoint": hookpoint, "sae_lens_version": "6.54.0"})
    with pytest.raises(IncompatibleSAEError, match="is no name of a module"):
        load_sae(sae, ".")


@pytest.mark.parametrize("path", ["../saes", "/etc", "a/../../b", "a\\b", "C:x", "a\0b"])
def test_paths_that_lead_out(make_model, adapter, sae, path):
    refused(make_model, adapter, "must lie inside", subfolder=path)
    refused(make_model, "someone/adapter", "must lie inside", revision=path)
    refused(make_model, f"someone/adapter@{path}", "must lie inside|is no folder here")
    for place in ({"sae_id": path}, {"revision": path}):
        with pytest.raises(IncompatibleSAEError, match="must lie inside"):
            load_sae("someone/saes", **place)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_links_out_of_an_adapter(make_model, adapter, tmp_path, name):
    (adapter / name).rename(tmp_path / "elsewhere")
    (adapter / name).symlink_to(tmp_path / "elsewhere")
    refused(make_model, adapter, "is a link that leads out of")
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    refused(make_model, adapter, f"holds no {name}")


def test_links_out_of_a_folder_of_saes(sae, tmp_path):
    sae.rename(tmp_path / "elsewhere")
    sae.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IncompatibleSAEError, match="is a link that leads out of"):
        load_sae(sae.parent, "layers.1")


def test_links_of_the_hubs_own_cache_are_followed(make_model, adapter, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1" / "sub"
    adapter.rename(blobs.parent.mkdir() or blobs)
    snapshot.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (snapshot / name).symlink_to(blobs / name)
    assert load_reasoning_adapter(make_model("qwen2"), snapshot).active_adapters == ["default"]


def test_the_base_that_an_adapter_names_is_not_looked_at(make_model, adapter, tmp_path, monkeypatch):
    edit(adapter / CONFIG, base_model_name_or_path=str(tmp_path / "trap"))
    (tmp_path / "trap").mkdir()
    os.mkfifo(tmp_path / "trap" / "config.json")  # reading it would hang
    model = make_model("qwen2")
    model.name_or_path = "someone/else"
    with pytest.warns(UserWarning, match="was trained on"):
        load_reasoning_adapter(model, adapter)


def test_an_adapter_that_is_its_own_base(adapter):
    edit(adapter / CONFIG, base_model_name_or_path=str(adapter))
    with pytest.raises(IncompatibleAdapterError, match="is its own base"):
        load_causal_lm(str(adapter))
    edit(adapter / CONFIG, base_model_name_or_path="../no/such/folder")
    with pytest.raises(IncompatibleAdapterError, match="names no base that can be read"):
        load_causal_lm(str(adapter), revision="x")
