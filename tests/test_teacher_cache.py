"""The teacher's states on the disk: the same training without it, and what becomes of files that do not fit."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from tuning_reference import make_trainer, moved_adapter, ragged_dataset, tiny_model, tiny_sae

from resa_hf.hookpoints import decoder_layers
from resa_hf.tuning.config import SAETuningConfig
from resa_hf.tuning.teacher_cache import TeacherCache, row_key, teacher_fingerprint

SETTINGS = [{"sae_gradient": "flow"}, {"sae_gradient": "stop"}, {"kl_reference": "source", "kl_beta": 1.0}]


def trained(folder, cache=None, dtype=torch.float64, seed=0, epochs=3, **settings):
    """A trainer after its run, and how often layer 0 ran of teacher and student, by epoch."""
    source = tiny_model(seed=7, dtype=dtype) if settings.get("kl_reference") == "source" else None
    model = moved_adapter(tiny_model(seed=seed, dtype=dtype), moved=False)
    trainer = make_trainer(
        model, folder, sae=tiny_sae(dtype), source_model=source, dataset=ragged_dataset(), num_train_epochs=epochs,
        teacher_cache=None if cache is None else str(cache), per_device_train_batch_size=2, **settings,
    )  # fmt: skip
    runs = []
    for one in (model, source):
        if one is not None:
            _, layers = decoder_layers(one)
            layers[-1].register_forward_hook(lambda *_: runs.append(trainer.state.epoch or 0.0))
    trainer.train()
    steps = len(ragged_dataset()) // 2
    return trainer, [sum(epoch <= at < epoch + 1 for at in runs) / steps for epoch in range(epochs)]


def adapter(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if "lora" in name}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0)])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_trains_as_without_it(tmp_path, settings, dtype, tolerance):
    plain, plain_runs = trained(tmp_path / "plain", dtype=dtype, **settings)
    cached, runs = trained(tmp_path / "cached", tmp_path / "states", dtype=dtype, **settings)
    expected, ours = adapter(plain), adapter(cached)
    assert all(value.abs().max() > 0 for name, value in expected.items() if "lora_B" in name and "layers.3" in name)
    if dtype != torch.bfloat16:
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance * value.abs().max().item())
    losses = [
        torch.tensor([row["loss"] for row in t.state.log_history if "loss" in row], dtype=torch.float64)
        for t in (plain, cached)
    ]
    torch.testing.assert_close(
        losses[1], losses[0], rtol=max(tolerance, 0.02 if dtype == torch.bfloat16 else 0), atol=0
    )
    # Teacher and student in the first epoch, the student alone afterwards.
    assert plain_runs[1:] == [2, 2] and runs[0] >= 2 and runs[1:] == [1, 1]


def test_is_read_by_other_runs_of_the_same_teacher_only(tmp_path):
    states = tmp_path / "states"
    trained(tmp_path / "1", states, epochs=1, sae_gradient="stop")
    (path,) = states.iterdir()
    _, runs = trained(tmp_path / "2", states, epochs=1, sae_gradient="stop", learning_rate=1e-2)
    assert list(states.iterdir()) == [path]
    first_batch_and_check_of_the_prefix = 4 / 4
    assert runs[0] <= 1 + first_batch_and_check_of_the_prefix
    _, runs = trained(tmp_path / "3", states, epochs=1, sae_gradient="stop", seed=5)  # another model
    assert len(list(states.iterdir())) == 2 and runs[0] >= 2
    trained(tmp_path / "4", states, epochs=1, sae_gradient="flow")  # other states of the same teacher
    assert len(list(states.iterdir())) == 3


def test_what_is_read_is_what_was_written_and_zero_behind_a_rows_end(tmp_path):
    rows = [[1, 2, 3], [4, 5], [1, 2, 3]]
    states = [torch.randn(2, 3, 5), torch.randn(2, 3, 2).bfloat16()]
    cache = TeacherCache(tmp_path, "x", rows, states)
    keys = [row_key(row) for row in rows[:2]]
    assert cache.read(keys, 3) is None and not cache.complete
    cache.write(keys, states)
    for _ in range(2):
        found = cache.read(keys, 4)
        assert cache.complete
        for stored, given in zip(found, states, strict=True):
            assert torch.equal(stored[0, :3], given[0]) and torch.equal(stored[1, :2], given[1, :2])
            assert not stored[0, 3:].any() and not stored[1, 2:].any()
        cache = TeacherCache(tmp_path, "x", rows, states)  # as another process finds it
    assert cache.read([row_key([9])], 1) is None
    cache.write([row_key([9])], [state[:1, :1] for state in states])  # of no row here: passed over


def test_a_file_that_was_cut_is_made_anew(tmp_path):
    state = torch.randn(1, 3, 5)
    cache = TeacherCache(tmp_path, "x", [[1, 2, 3]], [state])
    cache.write([row_key([1, 2, 3])], [state])
    cache.path.write_bytes(cache.path.read_bytes()[:-7])
    assert not TeacherCache(tmp_path, "x", [[1, 2, 3]], [state]).complete


def test_too_little_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000))
    with pytest.raises(OSError, match=r"needs 0\.04 GB in .*, which has 0\.01 GB free"):
        TeacherCache(tmp_path, "x", [range(1000)], [torch.zeros(1, 1000, 10_000)])
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_is_of_what_does_not_train(tmp_path):
    model = moved_adapter(tiny_model())
    before = teacher_fingerprint(model, precision="no")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert teacher_fingerprint(model, precision="no") == before
    assert teacher_fingerprint(model, precision="bf16") != before
    with torch.no_grad():
        next(p for p in model.parameters() if not p.requires_grad).view(-1)[3] += 1e-9
    assert teacher_fingerprint(model, precision="no") != before


@pytest.mark.parametrize(
    "settings",
    [{"kl_reference": "adapted"}, {"sae_in": "teacher"}, {"kl_weight": 0.0, "sft_weight": 1.0},
     {"packing": True, "packing_strategy": "bfd"}],
    ids=str,
)  # fmt: skip
def test_a_teacher_that_changes_is_refused(tmp_path, settings):
    with pytest.raises(ValueError, match="teacher_cache needs"):
        SAETuningConfig(output_dir=str(tmp_path), teacher_cache="x", use_cpu=True, **settings)
