"""Stage II with the SAE in bfloat16, and what an SAE takes while it is loaded."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_files import write_sparsify
from safetensors.torch import save_file
from tuning_reference import (
    batch_of,
    dense_sae,
    make_trainer,
    moved_adapter,
    naive_gradients,
    tiny_model,
    tiny_sae,
    trainer_gradients,
)

from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.checkpoint import load_sae, save_sae
from resa_hf.tuning.config import SAETuningConfig
from resa_hf.untrusted import all_finite


def fvu(x, y):
    return float((x - y).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize("gradient", ["flow", "stop"])
def test_stage_2_with_the_sae_in_bfloat16_is_near_float32(tmp_path, gradient):
    sae, batch = tiny_sae(torch.float32), batch_of()
    save_sae(sae, tmp_path / "sae")
    peft = moved_adapter(tiny_model(dtype=torch.float32))
    settings = {"sae_gradient": gradient}
    expected, expected_gradients = naive_gradients(peft, sae=sae, batch=batch, **settings)
    trainer = make_trainer(peft, tmp_path / "out", args_sae=str(tmp_path / "sae"), sae_dtype="bfloat16", **settings)
    held = [tensor for tensor in trainer._insertion.parameters() if tensor.numel() >= sae.d_in]
    assert {tensor.dtype for tensor in held} == {torch.bfloat16}
    loss, found = trainer_gradients(trainer, batch)
    assert abs(loss - expected) / expected < 0.02
    error = sum((found[name] - g).square().sum() for name, g in expected_gradients.items() if name in found).sqrt()
    size = sum(g.square().sum() for g in expected_gradients.values()).sqrt()
    assert 0 < error / size < 0.2
    stored = load_sae(tmp_path / "sae")
    assert all(torch.equal(tensor, sae.state_dict()[name]) for name, tensor in stored.state_dict().items())


def test_in_bfloat16_the_sae_leaves_as_much_unexplained(tmp_path):
    # Of latents that are as large but for rounding another one may be chosen: a reconstruction as good, not the same.
    torch.manual_seed(0)
    sae = TopKSAE(128, 2048, 32, hookpoint="layers.1")
    save_sae(sae, tmp_path)
    x = torch.randn(1000, 128)
    with torch.no_grad():
        expected, found = dense_sae(sae, x), load_sae(tmp_path, dtype=torch.bfloat16)(x)
    assert abs(fvu(x, found) / fvu(x, expected) - 1) < 0.01
    assert fvu(expected, found) < 0.01
    assert not torch.equal(expected, found)


def test_what_the_trainer_is_given_stays_as_it_is(tmp_path):
    sae = tiny_sae(torch.float32)
    trainer = make_trainer(moved_adapter(tiny_model(dtype=torch.float32)), tmp_path, sae=sae, sae_dtype="bfloat16")
    assert trainer._placed.module is sae and sae.W_enc.dtype == torch.float32


def test_only_what_is_offered():
    with pytest.raises(ValueError, match="sae_dtype is 'float8'; it must be one of auto, bfloat16"):
        SAETuningConfig(output_dir="x", sae_dtype="float8")


LOAD = """
import sys, torch
from pathlib import Path
from resa_hf.sae.checkpoint import load_sae
def kilobytes(name):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name)))
load_sae(sys.argv[1])  # what is imported on first use
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
sae = load_sae(sys.argv[2], dtype=None if sys.argv[3] == "auto" else torch.bfloat16)
print("peak", kilobytes("VmHWM") - before)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
@pytest.mark.parametrize(
    ("layout", "dtype", "times"),
    [
        ("sparsify", "auto", 1.0),
        pytest.param("sparsify", "bfloat16", 1.5, marks=pytest.mark.long),
        pytest.param("sae-lens", "auto", 1.5, marks=pytest.mark.long),
    ],
)
def test_a_file_is_mapped_and_not_held_twice(layout, dtype, times, tmp_path):
    """sae-lens' files hold the encoder transposed: that half is copied."""
    sae = TopKSAE(1024, 16384, 32, hookpoint="layers.1")
    save_sae(TopKSAE(8, 16, 4, hookpoint="layers.1"), tmp_path / "small")
    place = tmp_path / "large" / "layers.1"
    if layout == "sae-lens":
        save_sae(sae, place)
    else:
        write_sparsify(place, {"d_in": 1024, "num_latents": 16384, "k": 32})
        tensors = {"encoder.weight": sae.W_enc.t(), "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, place / "sae.safetensors")
    size = sum(path.stat().st_size for path in place.glob("*.safetensors"))
    command = [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large"), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = 1024 * int(re.search(r"peak (\d+)", done.stdout)[1])
    assert peak < 1.1 * times * size
    assert peak > 0.9 * size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_finite_without_a_copy(dtype):
    ones = torch.ones(3, 4, dtype=dtype)
    assert all_finite(ones) and all_finite(ones[:0])
    for value in (float("nan"), float("inf"), -float("inf")):
        broken = ones.clone()
        broken[1, 2] = value
        assert not all_finite(broken)
    assert not all_finite(torch.tensor([1e300], dtype=torch.float64))
