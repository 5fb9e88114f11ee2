"""Adapters that do nothing, or something else than they say."""

import shutil

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file

from resa_hf.errors import IncompatibleAdapterError
from resa_hf.evaluation.adapter_check import check_adapter, check_served_adapter
from resa_hf.text import evaluation_prompt
from resa_hf.tiny import load_tiny_base, load_tiny_source, tiny_path
from resa_hf.tiny.task import make_rows

FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer):
    return [evaluation_prompt(r["problem"], template="chat", tokenizer=tiny_tokenizer) for r in make_rows(2, seed=4)]


@pytest.fixture
def adapter(tmp_path):
    """A copy of the source's adapter, to be spoilt."""
    return shutil.copytree(tiny_path("source"), tmp_path / "adapter")


def change_tensors(folder, change):
    save_file({name: change(name, tensor) for name, tensor in load_file(folder / FILE).items()}, folder / FILE)


def small_adapter(size, dtype):
    """The source's adapter, its B scaled to entries of at most `size`: the size of Stage II's first steps is 1e-6."""
    model = PeftModel.from_pretrained(load_tiny_base(dtype), tiny_path("source"))
    matrices = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    largest = max(float(matrix.abs().max()) for matrix in matrices)
    with torch.no_grad():
        for matrix in matrices:
            matrix.mul_(size / largest)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_good_adapter_passes_and_the_model_is_left_alone(tiny_tokenizer, prompts, dtype):
    model = PeftModel.from_pretrained(load_tiny_base(dtype), tiny_path("source"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    check = check_adapter(model, tiny_tokenizer, prompts)
    ids = [tiny_tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
    # The base is stored in bfloat16, so that its weights are the same in every type.
    base, source = load_tiny_base(torch.float64), load_tiny_source(torch.float64)
    with torch.no_grad():
        change = max(float((source(row).logits - base(row).logits).abs().max()) for row in ids)
    assert check.change == pytest.approx(change, rel=1e-3 if dtype is torch.bfloat16 else 1e-4)
    assert check.merge_error < (1e-9 if dtype is torch.float64 else 1e-3)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("size", [1e-6, 1e-4])
def test_a_small_adapter_of_a_bfloat16_model_passes(tiny_tokenizer, prompts, size):
    exact, base = small_adapter(size, torch.float64).merge_and_unload(), load_tiny_base(torch.float64)
    ids = [tiny_tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
    with torch.no_grad():
        change = max(float((exact(row).logits - base(row).logits).abs().max()) for row in ids)
    check = check_adapter(small_adapter(size, torch.bfloat16), tiny_tokenizer, prompts)
    assert check.change == pytest.approx(change, rel=0.1)


@pytest.mark.parametrize(
    ("size", "factor", "message"),
    [(1e-6, 0, "is ignored"), (1e-6, 2, "does not act as its weights"), (1e-4, 1.25, "does not act as its weights")],
)
def test_a_small_adapter_with_another_scaling_is_refused(tiny_tokenizer, prompts, monkeypatch, size, factor, message):
    model = small_adapter(size, torch.bfloat16)
    stock = Linear.forward

    def forward(self, x):
        base = self.base_layer(x)
        return base + factor * (stock(self, x) - base)

    monkeypatch.setattr(Linear, "forward", forward)
    with pytest.raises(IncompatibleAdapterError, match=message):
        check_adapter(model, tiny_tokenizer, prompts)


def test_a_file_of_zeros_is_refused_unless_it_is_meant(tiny_tokenizer, prompts, adapter):
    change_tensors(adapter, lambda name, tensor: torch.zeros_like(tensor))
    model = PeftModel.from_pretrained(load_tiny_base(), adapter)
    with pytest.raises(IncompatibleAdapterError, match=r"'default' is all zeros: .* it is the base"):
        check_adapter(model, tiny_tokenizer, prompts)
    check = check_adapter(model, tiny_tokenizer, prompts, allow_zero=True)
    assert check.change == check.merge_error == 0


def test_an_adapter_that_is_ignored_is_refused(tiny_tokenizer, prompts, monkeypatch):
    model = PeftModel.from_pretrained(load_tiny_base(), tiny_path("source"))
    # As a serving path that forgets the adapter.
    monkeypatch.setattr(Linear, "forward", lambda self, x, *args, **kwargs: self.base_layer(x))
    with pytest.raises(IncompatibleAdapterError, match="ignored, though it is not zero. On 2 prompts .* by 0 at most"):
        check_adapter(model, tiny_tokenizer, prompts)


def test_an_adapter_that_acts_otherwise_than_merged_is_refused(tiny_tokenizer, prompts, monkeypatch):
    model = PeftModel.from_pretrained(load_tiny_base(), tiny_path("source"))
    stock = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x, *args, **kwargs: stock(self, 1.02 * x, *args, **kwargs))
    with pytest.raises(IncompatibleAdapterError, match="does not act as its weights say"):
        check_adapter(model, tiny_tokenizer, prompts)


class Served:
    """What a server says under one name."""

    def __init__(self, name, *replies):
        self.name = name
        self._replies = list(replies)

    def logprobs(self, prompts, max_new_tokens):
        return self._replies


def test_a_server_that_answers_as_the_base_is_refused():
    base = Served("base", ("7", [-0.1, -2.0]), ("8", [-0.2]))
    check_served_adapter(base, Served("mine", ("7", [-0.1, -2.0]), ("9", [-0.2])), ["a", "b"])
    check_served_adapter(base, Served("mine", ("7", [-0.1, -2.1]), ("8", [-0.2])), ["a", "b"])
    with pytest.raises(IncompatibleAdapterError, match="to 2 prompts as 'mine' and as 'base', with the same log-prob"):
        check_served_adapter(base, Served("mine", ("7", [-0.1, -2.0001]), ("8", [-0.2])), ["a", "b"])
    with pytest.warns(UserWarning, match="to 1 prompts as 'mine' and as 'base'. Make sure"):
        check_served_adapter(Served("base", ("7", [])), Served("mine", ("7", [])), ["a"])
