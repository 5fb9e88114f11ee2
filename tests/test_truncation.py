"""Stage I's source: only what the hookpoints need is loaded, and it gives the whole model's activations."""

import logging

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sae_reference import config, rows
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from resa_hf.errors import HookpointError
from resa_hf.hookpoints import capture, decoder_layers
from resa_hf.models import load_causal_lm
from resa_hf.sae.metadata import ce_recovered, training_metadata
from resa_hf.sae.trainer import SAETrainer

IDS = torch.arange(3, 43).reshape(2, 20)
KINDS = ("qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi3")


@pytest.fixture
def reports(caplog):
    """What transformers reports of loading; sae-lens turns it off."""
    logger, before = logging.getLogger("transformers"), transformers.logging.get_verbosity()
    logger.addHandler(caplog.handler)
    transformers.logging.set_verbosity_warning()
    yield caplog
    transformers.logging.set_verbosity(before)
    logger.removeHandler(caplog.handler)


def build(kind, tied):
    """A random causal LM of 6 layers; those with a sliding window have both kinds of layer."""
    sizes = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": tied}
    if kind == "gpt2":
        sizes |= {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 128}
    else:
        sizes |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8}
    if kind == "qwen2":
        sizes |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    if kind.startswith("gemma"):
        sizes |= {"sliding_window": 8, "query_pre_attn_scalar": 8}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32).eval()


def activations(model, hookpoints):
    with torch.no_grad(), capture(model, hookpoints, stop_after_last=True) as captured:
        model(input_ids=IDS)
        return dict(captured)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_models_activations_to_the_bit(kind, tied, tmp_path, reports):
    build(kind, tied).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    wanted = [1, "layers.3.mlp"] if kind in ("qwen2", "gemma3_text") else [1, 3]
    cut = load_causal_lm(str(tmp_path), hookpoints=wanted)
    assert reports.text == ""
    found, expected = (activations(model, wanted) for model in (cut, whole))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(decoder_layers(cut)[1]) == 4
    path, _ = decoder_layers(whole)
    assert whole.state_dict().keys() - cut.state_dict().keys() == {
        name
        for name in whole.state_dict()
        if name.startswith("lm_head") or any(f"{path}.{layer}." in name for layer in (4, 5))
    }
    with pytest.raises(RuntimeError, match="without the layers above it and the LM head"):
        cut(input_ids=IDS)


def test_what_is_missing_is_still_reported(tmp_path, reports):
    build("qwen2", False).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.stray"] = torch.zeros(1)
    save_file(tensors, path, metadata={"format": "pt"})
    load_causal_lm(str(tmp_path), hookpoints=[3])
    assert "model.layers.2.mlp.stray" in reports.text
    assert "layers.4" not in reports.text and "lm_head" not in reports.text


def test_a_merged_adapter_is_in_the_layers_that_are_left(tmp_path):
    base = build("qwen2", True)
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    names = str(tmp_path / "base"), str(tmp_path / "adapter")
    cut, whole = load_causal_lm(*names, hookpoints=[2]).eval(), load_causal_lm(*names).eval()
    assert torch.equal(activations(cut, [2])["layers.2"], activations(whole, [2])["layers.2"])
    assert len(decoder_layers(cut)[1]) == 3
    assert not torch.equal(activations(whole, [2])["layers.2"], activations(build("qwen2", True), [2])["layers.2"])


def test_an_unknown_hookpoint_is_told_with_all_layers(tmp_path):
    build("llama", False).save_pretrained(tmp_path)
    with pytest.raises(HookpointError, match=r"Unknown hookpoint 'layers.9'. Valid: layers.0 to layers.5"):
        load_causal_lm(str(tmp_path), hookpoints=["layers.2", "layers.9"])


def test_stage_1_trains_the_same_sae_and_measures_cross_entropy_on_the_whole(tmp_path):
    build("qwen2", False).save_pretrained(tmp_path / "model")
    name, hookpoints = str(tmp_path / "model"), ["layers.1", "layers.2"]
    found = []
    for cut in (hookpoints, None):
        args = config(tmp_path / str(cut is None), hookpoints=hookpoints, max_steps=3)
        trainer = SAETrainer(load_causal_lm(name, hookpoints=cut), args, rows(24), eval_dataset=rows(3, seed=1))
        trainer.train()
        hooks = [training_metadata(trainer, sae)["hf_hook_name"] for sae in trainer.saes.values()]
        recovered = ce_recovered(trainer, (lambda: load_causal_lm(name)) if cut else None)
        found.append(({key: sae.state_dict() for key, sae in trainer.saes.items()}, hooks, recovered))
    (saes, hooks, recovered), (whole_saes, whole_hooks, whole_recovered) = found
    assert hooks == whole_hooks == ["model.layers.1", "model.layers.2"]
    assert recovered == whole_recovered and len(recovered) == 2
    for hookpoint, state in saes.items():
        assert all(torch.equal(tensor, whole_saes[hookpoint][key]) for key, tensor in state.items())


def test_cross_entropy_on_what_is_left_is_an_error(tmp_path):
    build("qwen2", False).save_pretrained(tmp_path / "model")
    model = load_causal_lm(str(tmp_path / "model"), hookpoints=["layers.1"])
    held_out = Dataset.from_dict({"input_ids": IDS.tolist()})
    trainer = SAETrainer(model, config(tmp_path, hookpoints=["layers.1"]), rows(4), eval_dataset=held_out)
    with pytest.raises(RuntimeError, match="Load the whole model"):
        ce_recovered(trainer)
