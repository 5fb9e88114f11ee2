"""The workbench and the Hub: public repositories by name, and why others are refused."""

import errno
import json
import shutil
import time

import pytest
import torch
from adapter_files import save_adapter
from transformers import AutoModelForCausalLM

from resa_hf.errors import ExploreError
from resa_hf.explore import bench as bench_module
from resa_hf.explore import public
from resa_hf.explore.bench import Workbench
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.checkpoint import save_sae
from resa_hf.tiny import tiny_path

IDS = torch.tensor([[5, 17, 3, 41, 8, 50, 9]])
LOCAL = {"tiny": "resa_hf/tiny/base"}


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture
def bench():
    return Workbench(LOCAL, device="cpu")


@pytest.fixture
def refused(bench, tmp_path):
    """What a visitor is told; no path of this machine is in it, and no weights were downloaded."""

    def message(model, adapters=(), *, hub=None):
        with pytest.raises(ExploreError) as raised:
            bench.open(model, adapters)
        told = str(raised.value)
        assert str(tmp_path) not in told
        assert "/src/" not in told
        assert "Traceback" not in told
        if hub is not None:
            assert not [path for _, path in hub.requests if path.endswith((".safetensors", ".bin"))]
        return told

    return message


def test_model_adapter_and_sae_by_name(hub, bench, tmp_path):
    hub.create_repo("someone/model", folder=tiny_path("base"))
    hub.create_repo(
        "someone/adapters", files={f"runs/one/{p.name}": p.read_bytes() for p in tiny_path("source").iterdir()}
    )
    for hookpoint in ("layers.1", "layers.2"):
        save_sae(TopKSAE(128, 256, 8, hookpoint=hookpoint), tmp_path / "saes" / hookpoint)
    hub.create_repo("someone/saes", folder=tmp_path / "saes")
    opened = bench.open("someone/model", ["someone/adapters/runs/one"])
    assert torch.equal(
        logits(opened.base), logits(AutoModelForCausalLM.from_pretrained(tiny_path("base"), dtype="auto"))
    )
    copied = shutil.copytree(tiny_path("base"), tmp_path / "base")
    of_folder = Workbench({"m": copied, "a": tiny_path("source")}, device="cpu")
    assert torch.equal(logits(opened.tuned), logits(of_folder.open("m", ["a"]).tuned))
    assert not opened.is_tiny_reasoner
    hookpoint, sae = bench.sae("someone/saes", "layers.2")
    assert (hookpoint, sae.num_latents) == ("layers.2", 256)
    assert not [path for _, path in hub.requests if "layers.1" in path]
    with pytest.raises(ExploreError, match="It has: layers.1, layers.2"):
        bench.sae("someone/saes", "layers.3")


def test_a_folder_of_the_same_name_is_never_read(hub, bench, refused, make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "someone"
    make_model("llama").save_pretrained(here / "model")
    save_adapter(here / "adapter", AutoModelForCausalLM.from_pretrained(tiny_path("base")))
    save_sae(TopKSAE(128, 256, 8, hookpoint="layers.1"), here / "sae")
    assert "no public repository 'someone/model'" in refused("someone/model")
    assert "no public repository 'someone/adapter'" in refused("tiny", ["someone/adapter"])
    with pytest.raises(ExploreError, match="no public repository 'someone/sae'"):
        bench.sae("someone/sae")
    hub.create_repo("someone/model", folder=tiny_path("base"))
    assert bench.open("someone/model").base.config.model_type == "qwen2"


def test_the_base_that_an_adapter_names_is_not_loaded(hub, refused, tmp_path, tiny_base):
    tiny_base.config._name_or_path = tiny_base.name_or_path = str(tiny_path("base"))
    folder = save_adapter(tmp_path / "adapter", tiny_base)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_path("base")
    )
    hub.create_repo("someone/adapter", folder=folder)
    assert "'someone/adapter' is an adapter" in refused("someone/adapter", hub=hub)


def test_what_is_not_there(hub, refused):
    assert refused("someone/nothing") == "There is no public repository 'someone/nothing' on the Hub."
    hub.create_repo("someone/model", folder=tiny_path("base"))
    assert refused("someone/model@v9") == "The repository 'someone/model' has no revision 'v9'."
    assert refused("someone/model/checkpoint-5") == "The repository 'someone/model' holds no folder 'checkpoint-5'."


def test_what_only_the_servers_owner_may_read_is_refused(hub, refused):
    hub.create_repo("someone/private", folder=tiny_path("base"), private=True)
    hub.create_repo("someone/gated", folder=tiny_path("base"), gated=True)
    assert refused("someone/private", hub=hub) == "There is no public repository 'someone/private' on the Hub."
    assert "'someone/gated' is gated" in refused("someone/gated", hub=hub)
    # The owner's own names may stand for such a place.
    opened = Workbench({"mine": "someone/private"}, device="cpu").open("mine")
    assert opened.base.config.model_type == "qwen2"


def test_large_models_are_refused_before_weights_are_asked_for(hub, bench, tiny_base):
    hub.create_repo("someone/model", folder=tiny_path("base"))
    count = sum(tensor.numel() for tensor in tiny_base.parameters())
    small = Workbench(device="cpu", max_parameters=count - 1)
    with pytest.raises(
        ExploreError, match=f"has {count:,} parameters; this server takes models of up to {count - 1:,}"
    ):
        small.open("someone/model")
    assert not [path for _, path in hub.requests if path.endswith(".safetensors")]
    assert Workbench(device="cpu", max_parameters=count).open("someone/model")


def test_the_size_is_that_of_the_configuration_whatever_the_files_hold(hub, refused):
    config = json.loads((tiny_path("base") / "config.json").read_text()) | {"intermediate_size": 4_000_000}
    hub.create_repo("someone/large", files={"config.json": json.dumps(config), "model.safetensors": b"no matter"})
    assert "has 6,14" in refused(
        "someone/large", hub=hub
    )  # 4 layers of 3 matrices of 128 x 4,000,000, and little else


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"num_hidden_layers": 10**12}, "has 1,000,000,000,000 layers or experts; at most 1,000"),
        ({"text_config": {"num_experts": 10**6}}, "has 1,000,000 layers or experts"),
        ({"vocab_size": 10**12}, "this server takes models of up to"),
        ({"vocab_size": 10**30}, "cannot be loaded"),
        # Each layer has a mask of positions squared.
        (
            {"model_type": "gpt_neo", "num_hidden_layers": 24, "layer_types": None, "max_position_embeddings": 10**6},
            "has 24,000,000,0",
        ),
        ({"model_type": ["qwen2"]}, "which Transformers does not know"),
    ],
)
def test_what_a_configuration_asks_for_is_refused_at_once(hub, refused, changed, told):
    config = json.loads((tiny_path("base") / "config.json").read_text()) | changed
    hub.create_repo("someone/hostile", files={"config.json": json.dumps(config), "model.safetensors": b"no matter"})
    started = time.monotonic()
    assert told in refused("someone/hostile", hub=hub)
    assert time.monotonic() - started < 10


def test_errors_of_this_machine_tell_no_path(hub, refused, monkeypatch, tmp_path):
    hub.create_repo("someone/model", folder=tiny_path("base"))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "hub"))

    with monkeypatch.context() as patch:
        patch.setattr(public, "snapshot_download", full)
        told = "'someone/model' cannot be fetched by this server: No space left on device."
        assert refused("someone/model") == told
    monkeypatch.setattr(bench_module, "load_causal_lm", full)
    assert refused("someone/model") == "The model 'someone/model' cannot be loaded (OSError)."


def test_many_bytes_are_refused_before_they_are_asked_for(hub, tmp_path):
    hub.create_repo("someone/adapter", folder=tiny_path("source"))
    small = Workbench(LOCAL, device="cpu", max_parameters=1_000)
    with pytest.raises(ExploreError, match=r"'someone/adapter' takes 0\.\d MB"):
        small.open("tiny", ["someone/adapter"])
    assert not [path for _, path in hub.requests if path.endswith(".safetensors")]


def test_pickles_are_not_read(hub, refused):
    config = (tiny_path("base") / "config.json").read_bytes()
    hub.create_repo("someone/pickle", files={"config.json": config, "pytorch_model.bin": b"\x80\x04."})
    assert "Pickles such as pytorch_model.bin can run code" in refused("someone/pickle", hub=hub)
    adapter = (tiny_path("source") / "adapter_config.json").read_bytes()
    hub.create_repo("someone/lora", files={"adapter_config.json": adapter, "adapter_model.bin": b"\x80\x04."})
    assert "'someone/lora' holds no adapter_model.safetensors" in refused("tiny", ["someone/lora"], hub=hub)


def test_code_of_a_repository_is_not_run(hub, refused, tmp_path):
    config = {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.Odd"}}
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')"
    hub.create_repo(
        "someone/odd", files={"config.json": json.dumps(config), "odd.py": code, "model.safetensors": b"1"}
    )
    assert "'odd' model, which Transformers does not know" in refused("someone/odd", hub=hub)
    assert not ran.exists()


def test_an_adapter_for_another_model(hub, refused, make_model, tmp_path):
    hub.create_repo("someone/adapter", folder=save_adapter(tmp_path / "adapter", make_model("qwen2")))
    told = refused("tiny", ["someone/adapter"])
    assert "'someone/adapter' " in told
    assert "does not fit 'tiny'" in told


def test_damaged_files(hub, refused):
    source = {path.name: path.read_bytes() for path in tiny_path("source").iterdir()}
    hub.create_repo("someone/adapter", files=source | {"adapter_model.safetensors": b"\x80\x04 and more"})
    assert "someone/adapter/adapter_model.safetensors is a pickle" in refused("tiny", ["someone/adapter"])
    base = {path.name: path.read_bytes() for path in tiny_path("base").iterdir() if path.is_file()}
    hub.create_repo("someone/model", files=base | {"model.safetensors": base["model.safetensors"][:1000]})
    assert "someone/model" in refused("someone/model")
    hub.create_repo("someone/other", files=base | {"config.json": "[]"})
    assert "someone/other/config.json must hold a JSON object" in refused("someone/other", hub=None)
    hub.create_repo("someone/odd", files=base | {"config.json": '{"model_type": "qwen2", "hidden_size": "many"}'})
    assert "someone/odd" in refused("someone/odd")


def test_a_hub_that_does_not_answer(hub, bench):
    hub.create_repo("someone/model", folder=tiny_path("base"))
    hub.fail("GET", "/api/models/someone/model", 500, times=99)
    with pytest.raises(OSError, match="The Hub answered 500 when 'someone/model' was asked for"):
        bench.open("someone/model")
    hub.heal()
    assert bench.open("someone/model").base.config.model_type == "qwen2"


def test_an_index_of_shards_names_files_of_its_repository_alone(hub, refused, tmp_path, tiny_base):
    """Transformers loaded `../private/model.safetensors` of another repository in the cache."""
    tiny_base.save_pretrained(tmp_path / "private")
    weights = dict.fromkeys(tiny_base.state_dict(), "../private/model.safetensors")
    files = {
        "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weights}),
        "model-1.safetensors": b"",
    }
    hub.create_repo("someone/elsewhere", files={**files, "config.json": tiny_base.config.to_json_string()})
    told = "model.safetensors.index.json of 'someone/elsewhere' names files that are not there."
    assert refused("someone/elsewhere", hub=hub) == told


def test_only_so_many_models_at_once(hub, bench, tmp_path, tiny_base, tiny_tokenizer):
    """Visitors who are in the middle of something hold a model that is no longer kept."""
    tiny_base.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    for name in "abcd":
        hub.create_repo(f"me/{name}", folder=tmp_path / "model")
    held = [bench.open(f"me/{name}").base for name in "abc"]
    with pytest.raises(ExploreError, match="Other visitors use as many models as this server can hold"):
        bench.open("me/d")
    del held
    assert bench.open("me/d").model_name == "me/d"
