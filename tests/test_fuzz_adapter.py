"""The reader of adapters on hundreds of broken files: an adapter that works, or our own error, in little memory."""

import warnings
from pathlib import Path

import pytest
import torch
from bombs import little_memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import Change, apply, config_changes, weights_change
from peft import LoraConfig, get_peft_model

from resa_hf.adapters import load_reasoning_adapter
from resa_hf.errors import IncompatibleAdapterError

KEYS = [
    *("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "bias"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "use_rslora", "use_dora"),
    *("init_lora_weights", "fan_in_fan_out", "modules_to_save", "auto_mapping", "base_model_name_or_path", "revision"),
    *("loftq_config", "eva_config", "corda_config", "runtime_config", "peft_version", "inference_mode"),
]
FUZZ = settings(
    max_examples=300,
    deadline=20_000,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, rank_pattern={"layers.1": 4})
    get_peft_model(make_model("qwen2", num_hidden_layers=1), config).save_pretrained(place)
    return place


def check(make_model, file: Path, changes: list[Change]) -> None:
    """Loads the adapter with one file changed; puts the file back."""
    model, whole, refusal = make_model("qwen2", num_hidden_layers=1), file.read_bytes(), None
    try:
        file.write_bytes(apply(whole, changes))
        with little_memory(), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            adapted = load_reasoning_adapter(model, file.parent)
            assert adapted(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, 64)
    except IncompatibleAdapterError as error:
        refusal = str(error)
        assert not any("lora" in name for name, _ in model.named_modules())
    finally:
        file.write_bytes(whole)
    assert refusal is None or 20 < len(refusal) < 2000


@pytest.mark.long
@FUZZ
@given(changes=config_changes(KEYS, "rank_pattern", ["q_proj", "^model", "(a+)+$"]))
def test_changed_settings(make_model, folder, changes):
    check(make_model, folder / "adapter_config.json", changes)


@pytest.mark.long
@FUZZ
@given(changes=st.lists(weights_change(), min_size=1, max_size=2))
def test_changed_weights(make_model, folder, changes):
    check(make_model, folder / "adapter_model.safetensors", changes)
