"""Files that are no SAE of ours, broken or hostile: every one is refused with its reason."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from bombs import Bomb
from sae_files import D_IN, LATENTS, edit, make_sae, write_sparsify
from safetensors.torch import load_file

from resa_hf.errors import IncompatibleSAEError
from resa_hf.sae.checkpoint import load_sae, save_sae


@pytest.mark.parametrize("sae_id", ["../secret", "a/../../secret", "/etc", "..", "a\\..\\b", "C:/x", "a\0b"])
def test_an_id_that_leads_out_of_the_folder_is_refused(tmp_path: Path, sae_id: str) -> None:
    save_sae(make_sae(), tmp_path / "secret")
    (tmp_path / "inside").mkdir()
    with pytest.raises(IncompatibleSAEError, match="sae_id"):
        load_sae(tmp_path / "inside", sae_id)


def corrupt(folder: Path, layout: str, case: str) -> None:
    weights = folder / ("sae_weights.safetensors" if layout == "sae-lens" else "sae.safetensors")
    encoder = "W_enc" if layout == "sae-lens" else "encoder.weight"
    tensors = load_file(weights)
    if case == "truncated":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif case == "garbage":
        weights.write_bytes(b"not a safetensors file at all")
    elif case == "empty":
        weights.write_bytes(b"")
    elif case == "nan":
        tensors[encoder][3, 2] = torch.nan
        edit(weights, **{encoder: tensors[encoder]})
    elif case == "inf":
        edit(weights, b_dec=tensors["b_dec"] / 0)
    elif case == "shape":
        edit(weights, W_dec=tensors["W_dec"].t().contiguous())
    elif case == "dtype":
        edit(weights, b_dec=tensors["b_dec"].to(torch.int32))
    elif case == "missing tensor":
        edit(weights, W_dec=None)
    elif case == "extra tensor":
        edit(weights, W_skip=torch.zeros(D_IN, D_IN))
    elif case == "no weights":
        weights.unlink()
    elif case == "no config":
        (folder / "cfg.json").unlink()
    elif case == "bad json":
        (folder / "cfg.json").write_text("{'d_in': 8")
    elif case == "list":
        (folder / "cfg.json").write_text("[1]")
    elif case == "k":
        edit(folder / "cfg.json", k=LATENTS + 1)
    elif case == "k zero":
        edit(folder / "cfg.json", k=0)
    elif case == "d_in":
        edit(folder / "cfg.json", d_in="8")
    elif case == "other width":
        edit(folder / "cfg.json", d_in=D_IN + 1)


CASES = {
    "truncated": "corrupt or cut short",
    "garbage": "corrupt or cut short",
    "empty": "corrupt or cut short",
    "nan": r"(W_enc|encoder\.weight) has 1 entries that are NaN",
    "inf": "b_dec has 8 entries that are NaN or infinite",
    "shape": rf"W_dec has shape \[{D_IN}, {LATENTS}\].*\[{LATENTS}, {D_IN}\]",
    "dtype": "b_dec has dtype I32, not one of F64",
    "missing tensor": "lacks the tensor W_dec",
    "extra tensor": "unexpected tensor W_skip",
    "no weights": "neither",
    "no config": "cfg.json is missing",
    "bad json": "not valid JSON",
    "list": "JSON object, not a list",
    "k": r"k is 25, more than the 24 latents",
    "k zero": "k must be a positive whole number, not 0",
    "d_in": "d_in must be a positive whole number, not '8'",
    "other width": r"has shape",
}


@pytest.mark.parametrize("layout", ["sae-lens", "sparsify"])
@pytest.mark.parametrize("case", CASES)
def test_a_broken_sae_is_refused_with_its_reason(tmp_path: Path, layout: str, case: str) -> None:
    folder = tmp_path / "layers.1"
    if layout == "sae-lens":
        save_sae(make_sae(), folder)
    else:
        write_sparsify(folder)
    load_sae(folder, ".")
    corrupt(folder, layout, case)
    with pytest.raises(IncompatibleSAEError, match=CASES[case]) as error:
        load_sae(folder, ".")
    assert "layers.1" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transcode": True}, "transcoder"),
        ({"skip_connection": True}, "transcoder"),
        ({"activation": "groupmax"}, "groupmax"),
        ({"signed": True}, "signed"),
        ({"num_latents": 0, "expansion_factor": 0}, "expansion_factor"),
    ],
)
def test_other_coders_of_sparsify_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(IncompatibleSAEError, match=message):
        load_sae(write_sparsify(tmp_path / "layers.1", changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "transcoder"}, "transcoder"),
        ({"architecture": "skip_transcoder", "d_out": D_IN}, "transcoder"),
        ({"d_out": D_IN + 1}, "transcoder"),
        ({"architecture": "perceptron"}, "unknown architecture 'perceptron'"),
        ({"normalize_activations": "expected_average_only_in"}, "expected_average_only_in"),
        ({"normalize_activations": "whatever"}, "whatever"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        ({"metadata": 3}, "not a configuration"),
    ],
)
def test_other_coders_of_sae_lens_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_sae(make_sae(), tmp_path)
    edit(tmp_path / "cfg.json", **changes)
    with pytest.raises(IncompatibleSAEError, match=message):
        load_sae(tmp_path)


@pytest.mark.parametrize("name", ["sae.pt", "sae_weights.pt", "sae_weights.safetensors", "sae.safetensors"])
def test_a_pickle_is_never_read(tmp_path: Path, name: str) -> None:
    save_sae(make_sae(), tmp_path / "sae")
    (tmp_path / "sae" / "sae_weights.safetensors").unlink()
    (tmp_path / "sae" / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    for sae_id in (None, "sae"):
        with pytest.raises(IncompatibleSAEError):
            load_sae(tmp_path, sae_id)
    assert not (tmp_path / "exploded").exists()


def test_neither_folder_nor_repository(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "file", "nowhere", "a/b/c"):
        with pytest.raises(IncompatibleSAEError, match="no folder"):
            load_sae(name)
    with pytest.raises(IncompatibleSAEError, match="holds no SAE"):
        load_sae(tmp_path)
    with pytest.raises(IncompatibleSAEError, match="revision"):
        load_sae(tmp_path, revision="main")
    with pytest.raises(IncompatibleSAEError, match="not downloaded yet"):
        load_sae("nobody/nothing")
