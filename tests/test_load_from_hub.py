"""SAEs, adapters and models from the local Hub: revisions, subfolders, offline, and what may not be read there."""

import time
import warnings

import pytest
import torch
from adapter_files import logits, save_adapter
from huggingface_hub import constants, get_token, hf_hub_download
from sae_files import make_sae

from resa_hf.adapters import load_reasoning_adapter
from resa_hf.errors import IncompatibleAdapterError, IncompatibleSAEError
from resa_hf.models import load_causal_lm, load_tokenizer
from resa_hf.sae.checkpoint import list_saes, load_sae, save_sae


@pytest.fixture
def base(make_model):
    return make_model("qwen2")


@pytest.fixture
def folders(base, tmp_path):
    """Two adapters and two SAEs, which differ."""
    for seed in (1, 2):
        save_adapter(tmp_path / f"adapter-{seed}", base, seed)
        save_sae(make_sae(seed=seed), tmp_path / f"saes-{seed}" / "layers.1")
    return tmp_path


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def adapted(make_model, place, **kwargs):
    return logits(load_reasoning_adapter(make_model("qwen2"), place, **kwargs))


def offline(monkeypatch, hub):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()


def test_an_adapter_by_branch_commit_and_subfolder_online_and_offline(hub, folders, make_model, monkeypatch):
    one, two = (adapted(make_model, folders / f"adapter-{seed}") for seed in (1, 2))
    assert not torch.equal(one, two)
    files = {f"check/point-2/{path.name}": path.read_bytes() for path in (folders / "adapter-2").iterdir()}
    first = hub.create_repo("me/adapter", folder=folders / "adapter-1", files=files)
    hub.commit("me/adapter", {path.name: path.read_bytes() for path in (folders / "adapter-2").iterdir()})
    cases = [
        ("me/adapter", {}, two),
        (f"me/adapter@{first}", {}, one),
        ("me/adapter", {"revision": first}, one),
        (f"me/adapter@{first}/check/point-2", {}, two),
        ("me/adapter", {"revision": "main", "subfolder": "check/point-2"}, two),
    ]
    for place, kwargs, expected in cases:
        assert torch.equal(adapted(make_model, place, **kwargs), expected), place
    assert not any("README" in path for _, path in hub.requests)
    offline(monkeypatch, hub)
    for place, kwargs, expected in cases:
        assert torch.equal(adapted(make_model, place, **kwargs), expected), place
    assert hub.requests == []
    with pytest.raises(IncompatibleAdapterError, match="me/adapter@v9 is not downloaded yet"):
        adapted(make_model, "me/adapter@v9")


def test_a_model_that_is_an_adapter_in_a_subfolder(
    hub, folders, base, make_model, tmp_path, monkeypatch, tiny_tokenizer
):
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    base.name_or_path = "me/base"
    save_adapter(tmp_path / "tina", base, seed=1)
    hub.create_repo("me/base", folder=tmp_path / "base")
    files = {f"checkpoint-2000/{path.name}": path.read_bytes() for path in (tmp_path / "tina").iterdir()}
    pinned = hub.create_repo("me/tina", files=files)
    hub.commit("me/tina", {"checkpoint-2000/adapter_config.json": b"broken later"})
    name = f"me/tina@{pinned}/checkpoint-2000"
    expected = load_reasoning_adapter(make_model("qwen2"), tmp_path / "tina").merge_and_unload()
    for merged in (
        load_causal_lm(name),
        load_causal_lm("me/base", name),
        load_causal_lm("me/tina/checkpoint-2000", revision=pinned),
    ):
        assert torch.equal(logits(merged), logits(expected))
    assert load_causal_lm(name).name_or_path == name
    assert load_tokenizer(name).get_vocab() == tiny_tokenizer.get_vocab()
    with pytest.raises(IncompatibleAdapterError, match="not valid JSON"):
        load_causal_lm("me/tina/checkpoint-2000")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (429, "Too many requests: wait a few minutes"),
        (401, "hf auth login"),
        (403, "hf auth login"),
    ],
)
def test_a_refusal_tells_what_to_do_without_url_or_token(hub, folders, make_model, no_waiting, what, message):
    hub.create_repo("me/adapter", folder=folders / "adapter-1")
    hub.create_repo("me/saes", folder=folders / "saes-1")
    hub.fail(".*", ".*", what, times=1000)
    for load in (lambda: adapted(make_model, "me/adapter"), lambda: load_sae("me/saes")):
        with pytest.raises(ConnectionError, match=message) as error:
            load()
        assert "http" not in str(error.value) and str(get_token()) not in str(error.value)
        assert error.value.__cause__ is None and error.value.__suppress_context__


def test_what_may_not_be_read_or_is_not_there(hub, folders, make_model, monkeypatch):
    hub.create_repo("me/gated", folder=folders / "adapter-1", gated=True)
    hub.create_repo("me/private", folder=folders / "adapter-1", private=True)
    hub.create_repo("me/saes", folder=folders / "saes-1")
    hub.create_repo(
        "me/pickled",
        files={"adapter_config.json": "{}", "adapter_model.bin": b"\x80", "cfg.json": "{}", "sae.pt": b"\x80"},
    )
    monkeypatch.setenv("HF_TOKEN", hub.stranger)
    for place, message in (
        ("me/gated", "'me/gated' is gated: ask for access"),
        ("me/private", "no such repository can be read on the Hub. If it is private"),
        ("me/nothing", "no such repository can be read on the Hub"),
        ("me/saes", "'me/saes' holds no adapter_config.json"),
        ("me/pickled", "holds no adapter_model.safetensors. Other weights are not read: a pickle"),
        ("me/saes@v2", "'me/saes' has no revision 'v2'"),
        ("me/saes@" + "1" * 40, "has no revision '1111"),
    ):
        with pytest.raises(IncompatibleAdapterError, match=message):
            adapted(make_model, place)
    for place, revision, message in (
        ("me/gated", None, "gated|holds no SAE"),
        ("me/private", None, "If it is private"),
        ("me/pickled", None, "Pickles are not read"),
        ("me/saes", "v2", "'me/saes' has no revision 'v2'"),
    ):
        with pytest.raises(IncompatibleSAEError, match=message):
            load_sae(place, revision=revision)
    assert not any("sae.pt" in path or ".bin" in path for _, path in hub.requests)


def test_file_names_of_a_repository_that_lead_out(hub, folders):
    files = {path.name: path.read_bytes() for path in (folders / "saes-1" / "layers.1").iterdir()}
    hub.create_repo("me/saes", files={f"../../evil/{name}": content for name, content in files.items()})
    with pytest.raises(IncompatibleSAEError, match="'../../evil' must lie inside"):
        load_sae("me/saes")


def test_an_sae_by_its_place_online_and_offline(hub, folders, monkeypatch):
    for name in ("layers.1", "run/layers.1", "run/layers.2"):
        save_sae(make_sae(seed=len(name)), folders / "several" / name)
    first = hub.create_repo("me/saes", folder=folders / "several")
    hub.commit("me/saes", {"README.md": "later"})
    for online in (True, False):
        for place, sae_id, seed in (
            (f"me/saes@{first}", "layers.1", 8),
            (f"me/saes@{first}/layers.1", None, 8),
            (f"me/saes@{first}/run", "layers.2", 12),
            (f"hf://me/saes@{first}/run/layers.1", ".", 12),
        ):
            assert load_sae(place, sae_id).metadata["seed"] == seed
            assert load_sae(place, sae_id, revision=first).metadata["seed"] == seed
        assert list_saes(f"me/saes@{first}/run") == ["layers.1", "layers.2"]
        with pytest.raises(IncompatibleSAEError, match="names the revision '.*', and 'main' is given beside it"):
            load_sae(f"me/saes@{first}", revision="main")
        with pytest.raises(IncompatibleSAEError, match="holds 2 SAEs. Choose one by sae_id: layers.1, layers.2"):
            load_sae(f"me/saes@{first}/run")
        offline(monkeypatch, hub) if online else None
    assert hub.requests == []


def test_an_sae_by_branch_and_commit_online_and_offline(hub, folders, monkeypatch):
    first = hub.create_repo("me/saes", folder=folders / "saes-1")
    hub.commit(
        "me/saes", {f"layers.1/{path.name}": path.read_bytes() for path in (folders / "saes-2" / "layers.1").iterdir()}
    )
    for online in (True, False):
        assert load_sae("me/saes", revision=first).metadata["seed"] == 1
        assert load_sae("me/saes", "layers.1").metadata["seed"] == 2
        offline(monkeypatch, hub) if online else None
    assert hub.requests == []


def test_a_base_of_another_kind_is_told_from_the_cache_alone(hub, base, make_model, tmp_path):
    base.name_or_path = "me/base"
    folder, model = save_adapter(tmp_path / "adapter", base), make_model("qwen2")
    hub.create_repo("me/base", files={"config.json": '{"model_type": "llama", "vocab_size": 99}'})
    hub.requests.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_reasoning_adapter(model, folder).unload()
    assert hub.requests == []
    hf_hub_download("me/base", "config.json")
    message = "no siblings: model_type 'llama' there, 'qwen2' here; vocab_size 99 there, 64 here"
    with pytest.warns(UserWarning, match=message):
        load_reasoning_adapter(model, folder)
