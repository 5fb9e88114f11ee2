"""4-bit models: what is quantised, that training on them is right, and what is refused."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from resa_hf.arguments import ModelArguments
from resa_hf.commands.recipe import parse_run
from resa_hf.errors import IncompatibleAdapterError
from resa_hf.evaluation.adapter_check import check_adapter
from resa_hf.hookpoints import capture, decoder_layers
from resa_hf.models import load_causal_lm
from resa_hf.quantization import NF4_BYTES, adapter_in_float32, is_in_4bit
from resa_hf.tiny.tokenizer import build_tokenizer
from resa_hf.tuning.loss import frozen_head

bnb = pytest.importorskip("bitsandbytes")

IDS = torch.arange(3, 43).reshape(2, 20)


def saved(path, kind="qwen2", **overrides):
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        sizes = {"vocab_size": 64, "n_embd": 64, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes | overrides)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
def test_linear_layers_alone_are_quantised(kind, tied, tmp_path):
    name = saved(tmp_path, kind, tie_word_embeddings=tied)
    whole, model = load_causal_lm(name), load_causal_lm(name, load_in_4bit=True)
    assert is_in_4bit(model) and not is_in_4bit(whole)
    for path, module in model.named_modules():
        linear = isinstance(whole.get_submodule(path), nn.Linear | Conv1D)
        quantised = isinstance(module, bnb.nn.Linear4bit)
        assert quantised == (linear and path != "lm_head")
        if quantised:
            assert module.weight.quant_state.quant_type == "nf4" and not module.support_avx512bf16_for_cpu
            weight = module.weight.quant_state
            held = module.weight.numel() + weight.absmax.numel() * weight.absmax.itemsize
            assert held == NF4_BYTES * whole.get_submodule(path).weight.numel()
    for path, parameter in model.named_parameters():
        if parameter.dtype != torch.uint8:
            assert torch.equal(parameter, whole.get_parameter(path))
    frozen_head(model.requires_grad_(False))


def dequantised(model):
    """The same model with plain float32 weights."""
    plain = copy.deepcopy(model)
    for path, module in list(plain.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight, linear.bias = nn.Parameter(weight.float()), module.bias
            plain.set_submodule(path, linear)
    return plain


def adapted(model):
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, lora)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_gradients_after_an_evaluation_are_those_of_the_weights_in_float32(kind, tmp_path):
    # bitsandbytes would repack the weights in that evaluation on a CPU with AVX512-BF16.
    quantised = load_causal_lm(saved(tmp_path, kind), load_in_4bit=True)
    gradients = []
    for base in (dequantised(quantised), quantised):
        model = adapted(base)
        with torch.no_grad():
            model.eval()(input_ids=IDS)
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    expected, found = gradients
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-9)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_cut_and_quantised_gives_the_whole_models_activations(kind, tmp_path):
    name = saved(tmp_path, kind)
    found = []
    for hookpoints in ([1], None):
        model = load_causal_lm(name, load_in_4bit=True, hookpoints=hookpoints).eval()
        with torch.no_grad(), capture(model, [1], stop_after_last=True) as activations:
            model(input_ids=IDS)
            (x,) = activations.values()
        found.append((x, len(decoder_layers(model)[1])))
    (cut, layers), (whole, all_layers) = found
    assert torch.equal(cut, whole) and (layers, all_layers) == (2, 3)


def test_adapters_are_not_merged_into_4_bits(tmp_path):
    name = saved(tmp_path / "base")
    adapted(load_causal_lm(name)).save_pretrained(tmp_path / "adapter")
    for names in ((name, str(tmp_path / "adapter")), (str(tmp_path / "adapter"),)):
        with pytest.raises(ValueError, match=r"adapter'?.* merged into 4-bit weights"):
            load_causal_lm(*names, load_in_4bit=True)
    with pytest.raises(ValueError, match="model_adapter 'a' cannot be merged into 4-bit"):
        ModelArguments(model_name_or_path="m", model_adapter="a", load_in_4bit=True)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("source_adapter: a", "source_adapter 'a' cannot be merged into 4-bit"),
        ("arms: {a: {known: weight_noise}}", "Arm 'a': weight_noise is made from the weights themselves"),
    ],
)
def test_what_a_run_cannot_do_in_4_bits_is_refused_at_once(recipe, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model_name_or_path: m\ndataset: d\nload_in_4bit: true\nstage1: {{hookpoints: [1]}}\n{recipe}\n")
    with pytest.raises(ValueError, match=message):
        parse_run(["--config", str(path)], "test", "")


def test_the_adapter_check_sees_an_adapter_on_a_4_bit_model(tmp_path, monkeypatch):
    model = adapted(load_causal_lm(saved(tmp_path), load_in_4bit=True)).eval()
    before = model(input_ids=IDS).logits
    seen = check_adapter(model, build_tokenizer(), ["1+1="])
    assert seen.change > 1e-3 and seen.merge_error < 1e-3 * seen.change
    assert torch.equal(model(input_ids=IDS).logits, before)
    # An adapter that acts twice as strongly as its weights say.
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    inner = layer.lora_B["default"].forward
    monkeypatch.setattr(layer.lora_B["default"], "forward", lambda x: 2 * inner(x))
    with pytest.raises(IncompatibleAdapterError, match="does not act as its weights say"):
        check_adapter(model, build_tokenizer(), ["1+1="])


def test_the_adapter_is_trained_in_float32(tmp_path):
    model = adapted(load_causal_lm(saved(tmp_path), load_in_4bit=True))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()  # as TRL does
    frozen = {name: p.dtype for name, p in model.named_parameters() if not p.requires_grad}
    adapter_in_float32(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else frozen[name])
