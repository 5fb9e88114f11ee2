"""Which commits a run has read: of models, adapters, SAEs and data, of branches that move, and in the reports."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ModelFactory
from hub_server import HubServer
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from sae_files import make_sae
from sae_reference import config, train

from resa_hf.arguments import ModelArguments, SourceArguments
from resa_hf.evaluation.benchmarks import task_revisions
from resa_hf.experiment.loading import answering_revisions
from resa_hf.experiment.settings import RunArguments
from resa_hf.models import load_causal_lm
from resa_hf.provenance import (
    base_revisions,
    commit_of,
    data_revisions,
    merge_revisions,
    model_revisions,
    sae_metadata,
    sae_revision,
    source_revisions,
)
from resa_hf.sae.checkpoint import load_sae, save_sae
from resa_hf.sae.trainer import SAETrainer


@pytest.fixture
def base(hub: HubServer, make_model: ModelFactory, tmp_path: Path) -> str:
    """The first commit of me/base."""
    make_model("qwen2").save_pretrained(tmp_path / "base")
    return hub.create_repo("me/base", folder=tmp_path / "base")


def put_adapter(hub: HubServer, make_model: ModelFactory, folder: Path, base: str, inside: str = "") -> str:
    """The commit of me/adapter, an adapter of `base`."""
    model = get_peft_model(make_model("qwen2"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(folder / "adapter" / inside))
    return hub.create_repo("me/adapter", folder=folder / "adapter")


def test_the_commit_is_that_of_the_last_loading_wherever_the_branch_is_now(
    hub: HubServer, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert commit_of("me/base") is None  # not loaded yet
    load_causal_lm("me/base")
    moved = hub.commit("me/base", {"note.txt": "later"})
    asked = len(hub.requests)
    assert moved != base == commit_of("me/base") == commit_of("me/base", revision=base)
    assert commit_of("me/base", revision=moved) is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert commit_of("me/base") == base
    assert len(hub.requests) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    load_causal_lm("me/base", revision=base)
    assert commit_of("me/base", revision=base) == base
    load_causal_lm("me/base")
    assert commit_of("me/base") == moved


def test_branches_have_commits_of_their_own(hub: HubServer, base: str) -> None:
    from huggingface_hub import create_branch

    create_branch("me/base", branch="next/try")
    other = hub.commit("me/base", {"note.txt": "branch"}, branch="next/try")
    load_causal_lm("me/base", revision="next/try")
    assert commit_of("me/base", revision="next/try") == other
    assert commit_of("me/base") is None


@pytest.mark.usefixtures("hub")
def test_what_is_not_on_the_hub_has_no_commit(tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_text("{}")
    for name in (str(tmp_path), str(tmp_path / "file.jsonl"), "resa_hf/tiny/base", "nobody/nothing", "a name", "/no"):
        assert commit_of(name) is None
    assert model_revisions("base", "resa_hf/tiny/base") == {"base": {"name": "resa_hf/tiny/base", "commit": None}}


@pytest.mark.usefixtures("hub")
def test_what_lies_here_is_never_named_like_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("models/base", "data/mine", "saes/one", "tiny-reasoner"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    here = {name: {"name": str(tmp_path / name), "commit": None} for name in ("models/base", "data/mine", "saes/one")}
    assert model_revisions("base", "models/base") == {"base": here["models/base"]}
    assert sae_revision("sae", "saes/one", None) == {"sae": here["saes/one"]}
    # Offline, a folder is read in the repository's place.
    assert data_revisions({"dataset": "data/mine", "dataset_repo": "data/mine"}) == {"dataset": here["data/mine"]}
    read = {"name": "data/mine", "commit": "c" * 40}
    told = {"dataset": "data/mine", "dataset_repo": "data/mine", "dataset_commit": "c" * 40}
    assert data_revisions(told) == {"dataset": read}
    shipped = {"name": "tiny-reasoner", "commit": None}
    assert data_revisions({"dataset": "tiny-reasoner"}) == {"dataset": shipped}


def test_an_adapter_stands_beside_its_base(
    hub: HubServer, base: str, make_model: ModelFactory, tmp_path: Path
) -> None:
    adapter = put_adapter(hub, make_model, tmp_path, "me/base", inside="checkpoint-5")
    place = f"me/adapter@{adapter}/checkpoint-5"
    read = {"name": "me/adapter", "commit": adapter, "subfolder": "checkpoint-5"}
    load_causal_lm("me/base", place)
    target = ModelArguments(model_name_or_path="me/base", model_adapter=place)
    assert base_revisions(target) == {"base": {"name": "me/base", "commit": base}, "base_adapter": read}
    # Named in its base's place, it tells the base itself.
    load_causal_lm(place)
    source = SourceArguments(source_model=place)
    expected = {"source": {"name": "me/base", "commit": base}, "source_adapter": read}
    assert source_revisions(target, source) == expected
    assert source_revisions(target, SourceArguments()) == {}
    assert sae_metadata(expected, {"name": "me/data", "commit": "d" * 40}) == {
        "model_name": "me/base",
        "model_revision": base,
        "model_adapter": read,
        "dataset_path": "me/data",
        "dataset_revision": "d" * 40,
    }


def test_the_model_that_answers_is_the_sibling_where_there_is_one(base: str) -> None:
    load_causal_lm("me/base", revision=base)
    run = RunArguments(model_name_or_path="me/base", model_revision=base, dataset="d")
    read = {"name": "me/base", "commit": base}
    assert answering_revisions(run) == {"base": read}
    moved = replace(run, evaluate_on="me/base", evaluate_on_revision=base)
    assert answering_revisions(moved) == {"evaluate_on": read}


def test_an_sae_is_found_whichever_folder_it_lies_in(hub: HubServer, make_model: ModelFactory, tmp_path: Path) -> None:
    save_sae(make_sae(), tmp_path / "saes" / "some" / "where")
    commit = hub.create_repo("me/saes", folder=tmp_path / "saes")
    load_sae("me/saes")
    hub.commit("me/saes", {"README.md": "later"})
    assert sae_revision("initial_sae", "me/saes", None) == {"initial_sae": {"name": "me/saes", "commit": commit}}
    placed = {"name": "me/saes", "commit": commit, "subfolder": "some/where"}
    assert sae_revision("sae", f"me/saes@{commit}/some/where", None) == {"sae": placed}
    assert sae_revision("sae", None, None) == {}
    narrow = make_model("qwen2", hidden_size=8, num_attention_heads=2, num_key_value_heads=1)
    trainer = SAETrainer(
        narrow, config(tmp_path, num_latents=None, k=None, initial_sae=f"me/saes@{commit}/some/where")
    )
    assert trainer.saes["layers.1"].metadata["initial_sae"] == {**placed, "revision": commit, "id": None}


def test_what_the_caller_knows_is_saved_with_every_sae(make_model: ModelFactory, tmp_path: Path) -> None:
    known = {"model_name": "me/base", "dataset_path": "me/data"}
    trainer = train(make_model("qwen2"), config(tmp_path, save_strategy="steps", save_steps=3), metadata=known)
    trainer.save_model(str(tmp_path / "out"))
    for folder in (tmp_path / "checkpoint-3" / "layers.1", tmp_path / "out" / "layers.1"):
        assert json.loads((folder / "cfg.json").read_text())["metadata"].items() >= known.items()


def test_data_are_told_as_they_were_read() -> None:
    old = {"dataset": "still", "trigger_dataset": None, "fingerprint": "f"}
    assert data_revisions(old) == {"dataset": {"name": "still", "commit": None}}
    new = {**old, "trigger_dataset": "a.jsonl", "dataset_repo": "owner/still", "dataset_commit": "c" * 40}
    assert data_revisions({**new, "trigger_dataset_repo": None, "trigger_dataset_commit": None}) == {
        "dataset": {"name": "owner/still", "commit": "c" * 40},
        "trigger_dataset": {"name": "a.jsonl", "commit": None},
    }


def test_no_commit_is_claimed_where_a_branch_moved_between_two_stages() -> None:
    def one(**roles: str) -> dict[str, Any]:
        return {role: {"name": "me/base", "commit": commit} for role, commit in roles.items()}

    merged = merge_revisions(
        [one(base="a"), {}, one(base="a", sae="s"), one(source="b"), one(source="c"), one(source="b")]
    )
    assert {role: found["commit"] for role, found in merged.items()} == {"base": "a", "sae": "s", "source": None}


def test_benchmarks_are_told_by_their_pinned_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESA_DATA_DIR", raising=False)
    tasks = task_revisions(["resa:aime24", "resa:amc23", "held_out", "resa:mine"])
    assert tasks == {
        "resa:aime24": {"name": "HuggingFaceH4/aime_2024", "commit": "2fe88a2f1091d5048c0f36abc874fb997b3dd99a"},
        "resa:amc23": {"name": "knoveleng/AMC-23", "commit": None},
    }
    monkeypatch.setenv("RESA_DATA_DIR", "somewhere")
    assert task_revisions(["resa:aime24"]) == {}
