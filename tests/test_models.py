"""Loading models by name and folder, with an adapter beside them or in their place."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken
from transformers import AriaConfig, DogeConfig, DogeForCausalLM, Qwen2Config, Qwen2Tokenizer

from resa_hf.models import check_same_vocabulary, layer_counts, load_causal_lm, load_config, load_tokenizer
from resa_hf.precision import runnable_precision
from resa_hf.tiny import load_tiny_base, load_tiny_source, tiny_path
from resa_hf.tiny.tokenizer import build_tokenizer

IDS = torch.arange(3, 23).reshape(2, 10)


@pytest.fixture
def folders(tmp_path, make_model):
    """A base, an adapter on it, and the logits of both together."""
    base = make_model("qwen2")
    base.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    torch.manual_seed(1)
    peft = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    peft.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", peft(IDS).logits


def test_an_adapter_beside_its_base_and_in_its_place_is_merged(folders):
    base, adapter, expected = folders
    for model in (load_causal_lm(str(base), str(adapter)), load_causal_lm(str(adapter))):
        assert not isinstance(model, PeftModel)
        torch.testing.assert_close(model.eval()(IDS).logits, expected)
        # What is trained on it must not claim to fit the bare base.
        assert model.name_or_path != str(base)
    plain = load_causal_lm(str(base))
    assert not torch.allclose(plain.eval()(IDS).logits, expected)
    assert load_causal_lm(str(base), str(adapter)).name_or_path == f"{base}+{adapter}"
    assert load_tokenizer(str(adapter)).get_vocab() == load_tokenizer(str(base)).get_vocab()


def test_the_shipped_models_by_name():
    ids = torch.arange(7, 27).reshape(2, 10)
    for name, expected in (("resa_hf/tiny/base", load_tiny_base()), ("resa_hf/tiny/source", load_tiny_source())):
        assert torch.equal(load_causal_lm(name, dtype="float32").eval()(ids).logits, expected.eval()(ids).logits)
        assert load_tokenizer(name).get_vocab() == build_tokenizer().get_vocab()
    assert load_causal_lm("resa_hf/tiny/base").dtype == torch.bfloat16
    # An adapter trained on it must name a base that PEFT finds without us.
    assert load_causal_lm("resa_hf/tiny/base").name_or_path == str(tiny_path("base"))


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match="Model 'nobody/nothing' cannot be loaded"):
        load_causal_lm("nobody/nothing")
    with pytest.raises(OSError, match="The tokenizer of 'nobody/nothing' cannot be loaded"):
        load_tokenizer("nobody/nothing")


def test_without_bitsandbytes_4_bits_say_how_to_install_it(monkeypatch):
    monkeypatch.setattr("resa_hf.quantization.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"load_in_4bit needs bitsandbytes: pip install 'resa-hf\[quant\]'"):
        load_causal_lm("resa_hf/tiny/base", load_in_4bit=True)


def test_pickled_weights_are_not_read(folders):
    base, _, _ = folders
    (base / "model.safetensors").unlink()
    torch.save({}, base / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_causal_lm(str(base))


def test_no_remote_code_runs(folders, tmp_path):
    base, _, _ = folders
    config = json.loads((base / "config.json").read_text())
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises((OSError, ValueError), match=r"trust_remote_code|model type"):
        load_causal_lm(str(base))
    assert not (tmp_path / "ran").exists()


def test_tokenizers_that_differ_name_the_first_token():
    one, other = build_tokenizer(), build_tokenizer()
    check_same_vocabulary(one, other)
    other.add_tokens([AddedToken("<extra>")])
    with pytest.raises(ValueError, match=r"'<extra>' is missing in .* and 56 in .*: both models must share one"):
        check_same_vocabulary(one, other)
    check_same_vocabulary(one, other, added=False)
    shifted = Qwen2Tokenizer(vocab={"0": 0, "1": 1}, merges=[])
    with pytest.raises(ValueError, match=r"'0' is 7 in .* and 0 in"):
        check_same_vocabulary(one, shifted, added=False)


@pytest.mark.parametrize("asked", [None, False, True])
def test_precision_without_an_accelerator(monkeypatch, asked):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert runnable_precision(asked, False, False) == {"bf16": bool(asked), "use_cpu": True}


def test_precision_with_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr("resa_hf.precision.is_torch_bf16_gpu_available", lambda: True)
    assert runnable_precision(None, False, False) == {"bf16": True, "use_cpu": False}
    assert runnable_precision(None, True, False) == {"bf16": False, "use_cpu": False}
    assert runnable_precision(None, False, True) == {"bf16": False, "use_cpu": True}


def test_a_model_of_too_many_layers_is_refused(tmp_path):
    Qwen2Config(num_hidden_layers=16_385, layer_types=None).save_pretrained(tmp_path / "deep")
    with pytest.raises(ValueError, match="it has 16,385 layers or experts; at most 16,384 can be"):
        load_config(str(tmp_path / "deep"))
    # A dense one; its configuration says 16,384 experts all the same.
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    doge = DogeForCausalLM(DogeConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    doge.save_pretrained(tmp_path / "doge")
    assert load_causal_lm(str(tmp_path / "doge")).config.model_type == "doge"
    assert 28 not in list(layer_counts(AriaConfig().to_dict())), "its keys are not all text"
