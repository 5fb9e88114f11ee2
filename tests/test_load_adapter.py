"""`load_reasoning_adapter` against the update added by hand, on siblings; several, scaled, switched and removed."""

import copy
import json
import math

import pytest
import torch
from adapter_files import logits, save_adapter
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from resa_hf.adapters import load_reasoning_adapter
from resa_hf.errors import IncompatibleAdapterError

KINDS = ["qwen2", "qwen3", "llama", "gpt2"]
FILE = "adapter_model.safetensors"


def sibling(make_model, kind):
    """Other weights, another RoPE base, a head of its own, other special tokens."""
    rope = {} if kind == "gpt2" else {"rope_theta": 500.0}
    return make_model(kind, seed=7, tie_word_embeddings=False, bos_token_id=9, eos_token_id=10, **rope)


def by_hand(model, *scaled):
    """The float64 model with W + scale * alpha / r * B @ A in place of W, from the adapters' files alone."""
    model = copy.deepcopy(model).double()
    weights = model.state_dict()
    for folder, scale in scaled:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = {name: tensor.double() for name, tensor in load_file(folder / FILE).items()}
        root = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
        for name in [name for name in tensors if "lora_A" in name]:
            update = tensors[name.replace("lora_A", "lora_B")] @ tensors[name] * config["lora_alpha"] / root
            weight = weights[name.removeprefix("base_model.model.").replace(".lora_A", "")]
            # GPT-2 keeps its weights transposed.
            weight += scale * (update if weight.shape == update.shape and not transposed(model, name) else update.T)
    return model


def transposed(model, name):
    path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    return type(model.get_submodule(path)).__name__ == "Conv1D"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, -0.5, 3])
def test_on_a_sibling_it_equals_the_update_added_by_hand(make_model, tmp_path, kind, scale):
    folder = save_adapter(tmp_path / "adapter", make_model(kind, tie_word_embeddings=True))
    model = sibling(make_model, kind).double()
    expected = logits(by_hand(model, (folder, scale)))
    assert not torch.allclose(expected, logits(model), atol=1e-2)
    adapted = load_reasoning_adapter(model, folder, scale=scale)
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_scale_0_is_the_base_and_unloading_gives_it_back_to_the_bit(make_model, tmp_path, kind):
    folder = save_adapter(tmp_path / "adapter", make_model(kind))
    model = sibling(make_model, kind)
    before, base = {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits(model)
    adapted = load_reasoning_adapter(model, folder, scale=0)
    assert torch.equal(logits(adapted), base)
    load_reasoning_adapter(adapted, folder, name="whole")
    assert not torch.equal(logits(adapted), base)
    restored = adapted.unload()
    assert restored is model and torch.equal(logits(restored), base)
    after = restored.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in before.items())


def test_on_its_own_base_it_is_what_peft_loads(make_model, tmp_path):
    folder = save_adapter(tmp_path, make_model("qwen2"))
    theirs = PeftModel.from_pretrained(make_model("qwen2"), folder)
    ours = load_reasoning_adapter(make_model("qwen2"), folder)
    assert torch.equal(logits(ours), logits(theirs))
    assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())


def test_several_act_together_are_switched_and_removed(make_model, tmp_path):
    base = make_model("llama")
    one, other = (save_adapter(tmp_path / name, base, seed) for seed, name in enumerate(["v1.5", "other"]))
    model = sibling(make_model, "llama").double()
    plain, sum_ = logits(model), logits(by_hand(model, (one, 1), (other, -2)))
    alone = {name: logits(by_hand(model, scaled)) for name, scaled in (("a", (one, 1)), ("b", (other, -2)))}
    adapted = load_reasoning_adapter(model, one)
    assert load_reasoning_adapter(adapted, other, scale=-2) is adapted
    assert adapted.active_adapters == ["default", "other"]
    torch.testing.assert_close(logits(adapted), sum_, rtol=0, atol=1e-10)
    adapted.set_adapter("other", inference_mode=True)
    torch.testing.assert_close(logits(adapted), alone["b"], rtol=0, atol=1e-10)
    adapted.base_model.set_adapter(["other", "default"], inference_mode=True)
    torch.testing.assert_close(logits(adapted), sum_, rtol=0, atol=1e-10)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), plain)
    adapted.delete_adapter("other")
    assert adapted.active_adapters == ["default"]
    torch.testing.assert_close(logits(adapted), alone["a"], rtol=0, atol=1e-10)
    load_reasoning_adapter(adapted, one, scale=-1)
    assert adapted.active_adapters == ["default", "v1-5"]
    torch.testing.assert_close(logits(adapted), plain, rtol=0, atol=1e-10)
    assert torch.equal(logits(adapted.unload()), plain)


def test_a_training_adapter_goes_on_training_beside_a_loaded_one(make_model, tmp_path):
    folder = save_adapter(tmp_path, make_model("qwen2"))
    model = get_peft_model(make_model("qwen2"), LoraConfig(target_modules=["q_proj"])).train()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    load_reasoning_adapter(model, folder, name="loaded")
    assert model.training and trainable
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"target_modules": r".*layers\.[01]\.(self_attn\.[qv]_proj|mlp\.up_proj)"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["v_proj"], "layers_to_transform": [0, 2]},
    ],
)
def test_other_plain_loras(make_model, tmp_path, settings):
    folder = save_adapter(tmp_path, make_model("qwen2"), **settings)
    model = sibling(make_model, "qwen2").double()
    expected = logits(by_hand(model, (folder, 0.5)))
    torch.testing.assert_close(logits(load_reasoning_adapter(model, folder, scale=0.5)), expected, rtol=0, atol=1e-10)


def test_ranks_and_alphas_by_module_scale_too(make_model, tmp_path):
    patterns = {
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"^model.layers.0.mlp.up_proj": 1.5},
    }
    folder = save_adapter(tmp_path, make_model("qwen2"), **patterns)
    model, tensors = make_model("qwen2", seed=7).double(), load_file(tmp_path / FILE)
    adapted = load_reasoning_adapter(copy.deepcopy(model), folder, scale=3).merge_and_unload()
    for name, scaling in (("layers.1.self_attn.q_proj", 10 / 2), ("layers.0.mlp.up_proj", 1.5 / 4)):
        A, B = (tensors[f"base_model.model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        expected = model.get_submodule(f"model.{name}").weight + 3 * scaling * B @ A
        torch.testing.assert_close(adapted.get_submodule(f"model.{name}").weight, expected, rtol=0, atol=1e-12)


def test_an_adapter_saved_again_keeps_its_scale(make_model, tmp_path):
    folder = save_adapter(tmp_path / "a", make_model("qwen2"))
    adapted = load_reasoning_adapter(make_model("qwen2"), folder, scale=0.25)
    adapted.save_pretrained(tmp_path / "b")
    again = PeftModel.from_pretrained(make_model("qwen2"), tmp_path / "b")
    torch.testing.assert_close(logits(again), logits(adapted))


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scales_that_are_no_numbers(make_model, tmp_path, scale):
    with pytest.raises(ValueError, match="scale is -?(nan|inf); it must be a finite number"):
        load_reasoning_adapter(make_model("qwen2"), tmp_path, scale=scale)


@pytest.mark.parametrize("name", ["default", "half", "a.b", "lora_", "a"])
def test_names_that_cannot_be(make_model, tmp_path, name):
    folder = save_adapter(tmp_path, make_model("qwen2"))
    model = load_reasoning_adapter(make_model("qwen2"), folder)
    with pytest.raises(ValueError, match=f"cannot be called '{name}' here. .* taken: default is"):
        load_reasoning_adapter(model, folder, name=name)


def test_models_that_take_no_adapter(make_model, tmp_path):
    folder = save_adapter(tmp_path, make_model("qwen2"))
    ia3 = get_peft_model(make_model("qwen2"), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="no LoRA of a PeftModel"):
        load_reasoning_adapter(ia3, folder)
    with pytest.raises(TypeError, match="causal LM of transformers, not on a Linear"):
        load_reasoning_adapter(torch.nn.Linear(2, 2), folder)


def test_the_first_tensor_that_differs_is_named_and_the_model_untouched(make_model, tiny_base, tmp_path):
    wide = make_model("qwen2", hidden_size=64, num_hidden_layers=4)
    folder = save_adapter(tmp_path, wide, r=2, target_modules=["q_proj", "up_proj"])
    before = [name for name, _ in tiny_base.named_modules()]
    first = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    with pytest.raises(IncompatibleAdapterError, match=rf"{first} is \[2, 64\] in the adapter and \[2, 128\]"):
        load_reasoning_adapter(tiny_base, folder)
    assert [name for name, _ in tiny_base.named_modules()] == before


def test_an_adapter_of_a_deeper_model(make_model, tmp_path):
    folder = save_adapter(tmp_path, make_model("qwen2", num_hidden_layers=5), target_modules=["q_proj"])
    with pytest.raises(
        IncompatibleAdapterError, match=r"layers.3.self_attn.q_proj.lora_A.weight is .* and missing for"
    ):
        load_reasoning_adapter(make_model("qwen2"), folder)


def test_an_adapter_with_a_tensor_too_few_or_for_other_modules(make_model, tmp_path):
    folder = save_adapter(tmp_path, make_model("qwen2"))
    tensors = load_file(folder / FILE)
    lost = "base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight"
    del tensors[lost]
    save_file(tensors, folder / FILE)
    # PEFT would leave it at zero.
    with pytest.raises(IncompatibleAdapterError, match=rf"{lost} is missing in the adapter"):
        load_reasoning_adapter(make_model("qwen2"), folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"target_modules": ["c_attn"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(IncompatibleAdapterError, match="does not fit .*c_attn"):
        load_reasoning_adapter(make_model("qwen2"), folder)


def test_another_base_is_told(make_model, tmp_path):
    base, model = make_model("qwen2"), make_model("qwen2", seed=3)
    base.name_or_path, model.name_or_path = "someone/trained-on", "someone/else"
    folder = save_adapter(tmp_path / "a", base)
    with pytest.warns(UserWarning, match="was trained on 'someone/trained-on', and is put on 'someone/else'.$"):
        load_reasoning_adapter(model, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["auto_mapping"]["base_model_class"] = "LlamaForCausalLM"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="no siblings: LlamaForCausalLM there, Qwen2ForCausalLM here"):
        load_reasoning_adapter(make_model("qwen2"), folder)


def test_nothing_is_drawn_from_the_random_numbers_of_a_run(make_model, tmp_path):
    folder = save_adapter(tmp_path, make_model("qwen2"))
    model = make_model("qwen2")
    state = torch.get_rng_state()
    load_reasoning_adapter(model, folder)
    assert torch.equal(torch.get_rng_state(), state)
