"""The two readers of SAEs on thousands of broken files: an SAE that works, or our own error, in little memory."""

from pathlib import Path

import pytest
import torch
from bombs import little_memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import Change, apply, config_changes, weights_change
from sae_files import make_sae, write_sparsify

from resa_hf.errors import IncompatibleSAEError
from resa_hf.sae.checkpoint import load_sae, save_sae

LAYOUTS = ["sae-lens", "sparsify"]
WEIGHTS = {"sae-lens": "sae_weights.safetensors", "sparsify": "sae.safetensors"}
KEYS = [
    *("d_in", "d_sae", "k", "architecture", "dtype", "device", "metadata", "apply_b_dec_to_input", "d_out"),
    *("normalize_activations", "reshape_activations", "rescale_acts_by_decoder_norm", "activation_fn"),
    *("activation_fn_kwargs", "hook_point", "num_latents", "expansion_factor", "activation", "signed", "transcode"),
]
FUZZ = settings(max_examples=600, deadline=20_000, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """An SAE in each layout, to be spoilt again and again."""
    root = tmp_path_factory.mktemp("saes")
    save_sae(make_sae(), root / "sae-lens" / "layers.1")
    write_sparsify(root / "sparsify" / "layers.1")
    return {layout: root / layout / "layers.1" for layout in LAYOUTS}


def check(file: Path, changes: list[Change]) -> None:
    """Reads the SAE with one file changed; puts the file back."""
    whole, refusal = file.read_bytes(), None
    try:
        file.write_bytes(apply(whole, changes))
        with little_memory():
            sae = load_sae(file.parent, ".")
            assert sae(torch.ones(2, sae.d_in, dtype=next(sae.parameters()).dtype)).shape == (2, sae.d_in)
            assert all(torch.isfinite(parameter).all() for parameter in sae.parameters())
    except IncompatibleSAEError as error:
        refusal = str(error)
    finally:
        file.write_bytes(whole)
    assert refusal is None or 20 < len(refusal) < 2000


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
@FUZZ
@given(changes=config_changes(KEYS, "metadata", ["hookpoint", "hook_name", "sae_lens_version", "self", "x"]))
def test_changed_configurations(folders, layout, changes):
    check(folders[layout] / "cfg.json", changes)


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
@FUZZ
@given(changes=st.lists(weights_change(), min_size=1, max_size=2))
def test_changed_weights(folders, layout, changes):
    check(folders[layout] / WEIGHTS[layout], changes)
