"""Faults of the connection, the Hub, the disk and other people while an SAE or an adapter is loaded."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ModelFactory
from hub_client import full_disk
from hub_server import HubServer
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from sae_files import make_x
from torch import Tensor

from resa_hf import load_sae, save_sae
from resa_hf.adapters import load_reasoning_adapter
from resa_hf.sae.autoencoder import TopKSAE

ALL = (".*", ".*")
IDS = torch.tensor([[1, 5, 9, 3, 7]])


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Artifact(NamedTuple):
    """Something on the Hub: its files and what they compute, in two versions that cannot be mixed, and how to load."""

    repo: str
    versions: list[tuple[dict[str, bytes], Tensor]]
    load: Callable[[], Tensor]


def an_sae(folder: Path) -> Artifact:
    versions = []
    for version, (latents, k) in enumerate([(24, 4), (40, 6)]):
        sae = TopKSAE(8, latents, k, hookpoint="layers.1", seed=version)
        save_sae(sae, folder / str(version) / "layers.1")
        versions.append((files_of(folder / str(version)), sae(make_x())))
    return Artifact("me/sae", versions, lambda: load_sae("me/sae")(make_x()))


def an_adapter(folder: Path, make_model: ModelFactory) -> Artifact:
    versions = []
    for version, rank in enumerate([2, 3]):
        config = LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        adapted = get_peft_model(make_model("qwen2"), config)
        adapted.peft_config["default"].base_model_name_or_path = "tiny/base"
        adapted.save_pretrained(str(folder / str(version)))
        (folder / str(version) / "README.md").unlink()
        versions.append((files_of(folder / str(version)), adapted(IDS).logits))

    def load() -> Tensor:
        model = make_model("qwen2")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            return load_reasoning_adapter(model, "me/adapter")(IDS).logits
        except Exception:
            after = model.state_dict()
            assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
            raise

    return Artifact("me/adapter", versions, load)


@pytest.fixture(params=["sae", "adapter"])
def artifact(request: pytest.FixtureRequest, hub: HubServer, tmp_path: Path, make_model: ModelFactory) -> Artifact:
    made = an_sae(tmp_path) if request.param == "sae" else an_adapter(tmp_path, make_model)
    hub.create_repo(made.repo, files=made.versions[0][0])
    return made


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """`fresh_cache()`: from now on, an empty cache."""
    count = iter(range(1000))
    return lambda: monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache-{next(count)}"))


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited in all; nothing really waits."""
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


def stages(hub: HubServer, artifact: Artifact, fault: Any, fresh_cache: Callable[[], None]) -> Iterator[int]:
    """The number of each request of an undisturbed download that can have this fault, each time with a fresh cache."""
    fresh_cache()
    hub.requests.clear()
    assert torch.equal(artifact.load(), artifact.versions[0][1])
    methods = [method for method, _ in hub.requests]
    assert {"HEAD", "GET"} <= set(methods)
    for n in range(len(methods) - (methods.count("HEAD") if fault == "drop_body" else 0)):
        fresh_cache()
        yield n


def attempt(artifact: Artifact) -> Tensor | Exception:
    try:
        return artifact.load()
    except Exception as error:
        return error


def is_ours(error: Exception, artifact: Artifact, hub: HubServer) -> bool:
    """For people: of resa-hf or Python itself, says what was loaded, and shows no address and no token."""
    text = str(error)
    ours = type(error).__module__ in ("resa_hf.errors", "builtins") and isinstance(error, ValueError | OSError)
    return ours and artifact.repo in text and "http" not in text and hub.token not in text


@pytest.mark.parametrize("fault", ["drop", "drop_body", "drop_reply", 429, 500])
def test_one_fault_at_each_stage(
    hub: HubServer, artifact: Artifact, fresh_cache: Callable[[], None], fault: Any
) -> None:
    for n in stages(hub, artifact, fault, fresh_cache):
        hub.fail(*ALL, fault, skip=n)
        outcome = attempt(artifact)
        assert hub.heal() == 0
        assert isinstance(outcome, Tensor) or is_ours(outcome, artifact, hub), repr(outcome)
        loaded = outcome if isinstance(outcome, Tensor) else artifact.load()
        assert torch.equal(loaded, artifact.versions[0][1])


@pytest.mark.parametrize("outage", ["drop", "drop_body", 500])
def test_an_outage_at_each_stage(
    hub: HubServer, artifact: Artifact, fresh_cache: Callable[[], None], outage: Any, fault: Any
) -> None:
    for n in stages(hub, artifact, outage, fresh_cache):
        hub.fail(*ALL, outage, skip=n, times=1000)
        with pytest.raises((ValueError, OSError)) as error:
            artifact.load()
        assert is_ours(error.value, artifact, hub), repr(error.value)
        fault(f"Hub gone ({outage}) at each request of a download", told=error.value, kept="files that arrived")
        hub.heal()
        assert torch.equal(artifact.load(), artifact.versions[0][1])


def test_a_revision_that_moves_at_each_stage(
    hub: HubServer, artifact: Artifact, fresh_cache: Callable[[], None]
) -> None:
    """What is loaded is the old version or the new one, never a file of each."""
    old, new = (outputs for _, outputs in artifact.versions)
    for n in stages(hub, artifact, None, fresh_cache):
        hub.commit(artifact.repo, artifact.versions[0][0])
        hub.fail(*ALL, lambda: hub.commit(artifact.repo, artifact.versions[1][0]), skip=n)
        loaded = artifact.load()
        assert hub.heal() == 0
        assert torch.equal(loaded, old) or torch.equal(loaded, new)
        assert torch.equal(artifact.load(), new)


def test_too_many_requests(hub: HubServer, artifact: Artifact, waits: list[float]) -> None:
    """huggingface_hub itself waits where it gets a body; where it asks for metadata, the user is told."""
    hub.fail("GET", "safetensors", 429, headers={"Retry-After": "37"})
    assert torch.equal(artifact.load(), artifact.versions[0][1])
    assert 37 <= max(waits) < 40


def test_a_full_disk(hub: HubServer, artifact: Artifact) -> None:
    with full_disk(".incomplete"), pytest.raises(OSError, match="The disk is full. Make room") as error:
        artifact.load()
    assert type(error.value) is OSError and error.value.errno == 28
    assert torch.equal(artifact.load(), artifact.versions[0][1])


def test_it_is_loaded_offline_afterwards(hub: HubServer, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = artifact.load()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert torch.equal(artifact.load(), expected)
    assert hub.requests == []
