"""What a step of Stage II costs beside its matrix products: waits for the device, and memory."""

import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tuning_reference import make_trainer, moved_adapter, tiny_model, tiny_sae

from resa_hf.tuning import loss
from resa_hf.tuning.loss import LMHead, tile_tokens, token_divergence

# What reads a value on the host, or makes a shape that depends on values: on an accelerator, a wait.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")


class NoWait(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        masks = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if (name in WAITS or masks) and not in_transformers_masks():
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


def in_transformers_masks():
    """Transformers asks once a forward whether anything is padded or packed; that is not ours to leave out."""
    return any(frame.filename.endswith("masking_utils.py") for frame in traceback.extract_stack())


@pytest.mark.parametrize(
    "settings", [{}, {"sae_gradient": "stop"}, {"sft_weight": 0.5}, {"exclude_special_tokens": True}], ids=str
)
def test_a_step_never_waits_for_the_device(tmp_path, settings):
    trainer = make_trainer(
        moved_adapter(tiny_model(), moved=False), tmp_path, sae=tiny_sae(), max_steps=4,
        per_device_train_batch_size=1, logging_steps=100, **settings,
    )  # fmt: skip
    step, steps = trainer.training_step, []

    def watched(*args, **kwargs):
        steps.append(trainer.state.global_step)
        if len(steps) == 1:  # where the shared prefix is tried out
            return step(*args, **kwargs)
        with NoWait():
            return step(*args, **kwargs)

    trainer.training_step = watched
    trainer.train()
    assert steps == [0, 1, 2, 3]
    with pytest.raises(AssertionError, match="waits"), NoWait():
        torch.ones(3)[torch.ones(3) > 0]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_divergence_takes_less_than_a_gigabyte_at_real_size(monkeypatch, device):
    tokens, vocabulary = 2048, 151_936
    monkeypatch.setattr(loss, "tile_tokens", lambda v, _: tile_tokens(v, torch.device(device)))  # its tiles, here
    student, teacher = torch.randn(tokens, 4, requires_grad=True), torch.randn(tokens, 4)
    head = LMHead(torch.randn(vocabulary, 4))
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    token_divergence(student, teacher, head, head).sum().backward()
    assert memory("VmHWM") - before < 2**30
    assert tokens * vocabulary * 4 > 2**30  # what one tensor of logits would take


def memory(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))
