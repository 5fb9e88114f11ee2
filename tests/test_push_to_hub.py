"""`push_to_hub` of both trainers: what a user of the Trainer expects, without its pickles and second commits."""

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelFactory
from datasets import Dataset
from hub_server import HubServer
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.trainer_utils import HubStrategy

from resa_hf.errors import PublishError
from resa_hf.hub.trainer_push import found_of
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.checkpoint import load_sae, save_sae
from resa_hf.sae.config import SAETrainingConfig
from resa_hf.sae.trainer import SAETrainer
from resa_hf.tiny import tiny_path
from resa_hf.tuning.config import SAETuningConfig
from resa_hf.tuning.trainer import SAETuningTrainer

Fault = Callable[..., None]
ROWS = Dataset.from_dict({"input_ids": [[1, 5, 9, 3, 7, 2, 4, 8]] * 4})


@pytest.fixture
def base(hub: HubServer) -> str:
    """The tiny base under a name on the local Hub."""
    hub.create_repo("you/base", folder=tiny_path("base"), files={"README.md": "---\nlicense: mit\n---\n"})
    return "you/base"


def tuner(base: str, folder: Path, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> SAETuningTrainer:
    quiet = {"max_steps": 2, "report_to": "none", "packing": False, "disable_tqdm": True, "learning_rate": 1e-2}
    save_sae(TopKSAE(128, 256, 8, hookpoint="layers.1"), folder.parent / "sae")
    args = SAETuningConfig(output_dir=str(folder), sae=str(folder.parent / "sae"), **{**quiet, **settings})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return SAETuningTrainer(model, args, ROWS, processing_class=tokenizer)


def stage1(model: Any, folder: Path, **settings: Any) -> SAETrainer:
    quiet = {"max_steps": 2, "report_to": "none", "disable_tqdm": True, "max_length": 8, "num_latents": 64, "k": 4}
    args = SAETrainingConfig(output_dir=str(folder), hookpoints=["layers.1"], **{**quiet, **settings})
    return SAETrainer(model, args, ROWS, ROWS)


def published(hub: HubServer, repo: str, branch: str = "main") -> set[str]:
    return set(hub.files(repo, branch)) - {".gitattributes"}


def test_an_adapter(hub: HubServer, base: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    settings = {"hub_model_id": "me/tuned", "hub_private_repo": True, "hub_token": hub.token, "seed": 5}
    trainer = tuner(base, tmp_path / "out", tiny_tokenizer, save_strategy="steps", save_steps=1, **settings)
    (read,) = hub.commits(base)
    hub.commit(base, {"note.txt": "after it was loaded"})
    trainer.train()
    assert (tmp_path / "out" / "checkpoint-1" / "optimizer.pt").is_file()
    commit = trainer.push_to_hub("My message", revision="dev")
    assert commit.commit_message == "My message" and commit.oid == hub.commits("me/tuned", branch="dev")[0]
    assert hub.repos["model", "me/tuned"].private and published(hub, "me/tuned") == set()
    assert published(hub, "me/tuned", "dev") == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "report.json", "recipe.yaml"),
        *("published.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    files = hub.files("me/tuned", "dev")
    assert hub.token.encode() not in b"".join(files.values())
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("you/base", "mit") and "SAE-Tuning" in card.content
    report = json.loads(files["report.json"])
    assert report["settings"]["max_steps"] == 2 and report["settings"]["seed"] == 5 and report["log"]
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == (base, read)
    loaded = AutoPeftModelForCausalLM.from_pretrained("me/tuned", revision="dev", dtype=torch.float32)
    ids = torch.tensor([ROWS[0]["input_ids"]])
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        assert torch.equal(loaded.eval()(input_ids=ids).logits, expected)
    # Again: nothing to do.
    assert trainer.push_to_hub("Again", revision="dev").oid == commit.oid


def test_saes(hub: HubServer, base: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer = stage1(model, tmp_path / "my-saes", eval_strategy="steps", eval_steps=2)
    trainer.train()
    commit = trainer.push_to_hub()
    assert commit.commit_message == "End of training"
    # The user's own, named as the folder.
    assert published(hub, "me/my-saes") == {
        *("README.md", "layers.1/cfg.json", "layers.1/sae_weights.safetensors"),
        *("report.json", "recipe.yaml", "published.json"),
    }
    card = ModelCard(hub.files("me/my-saes")["README.md"].decode())
    assert card.data.library_name == "saelens" and card.data.base_model == base
    metadata = json.loads(hub.files("me/my-saes")["layers.1/cfg.json"])["metadata"]
    assert (metadata["model_name"], metadata["model_revision"]) == (base, hub.commits(base)[0])
    measured = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert f"{measured['eval_fvu/layers.1']:.4g}" in card.content
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(load_sae("me/my-saes")(x), trainer.saes["layers.1"](x))


def test_push_to_hub_in_the_settings_pushes_once_and_no_checkpoint(
    hub: HubServer, base: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = {"push_to_hub": True, "hub_model_id": "me/tuned", "hub_strategy": "all_checkpoints"}
    trainer = tuner(base, tmp_path / "out", tiny_tokenizer, save_strategy="steps", save_steps=1, **settings)
    assert trainer.args.hub_strategy == HubStrategy.END
    trainer.train()
    assert published(hub, "me/tuned") == set()
    trainer.save_model()
    assert "adapter_model.safetensors" in published(hub, "me/tuned")
    assert not [name for name in published(hub, "me/tuned") if "checkpoint" in name or name.endswith((".bin", ".pt"))]
    assert len(hub.commits("me/tuned")) == 2  # the Hub's own first one, and ours
    trainer.push_to_hub()
    assert len(hub.commits("me/tuned")) == 2


def test_the_hub_is_gone_before_the_training(
    hub: HubServer, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    hub.fail(".*", ".*", "drop", times=1000)
    with pytest.raises(PublishError, match="me/saes") as at:
        stage1(model, tmp_path / "out", hub_model_id="me/saes", push_to_hub=True)
    hub.heal()
    stage1(model, tmp_path / "out", hub_model_id="me/saes", push_to_hub=True).train()
    fault("Hub gone when a Trainer with push_to_hub is made", told=at.value, kept="everything: nothing was begun")


def test_the_hub_is_gone_while_a_trainer_that_pushes_trains(
    hub: HubServer, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings: dict[str, Any] = {"hub_model_id": "me/saes", "push_to_hub": True}
    trainer = stage1(model, tmp_path / "out", save_strategy="steps", save_steps=1, **settings)
    hub.fail(".*", ".*", "drop", times=1000)
    trainer.train()
    with pytest.raises(PublishError, match="the Hub does not answer") as at:
        trainer.save_model()
    kept, trained = load_sae(tmp_path / "out" / "layers.1"), trainer.saes["layers.1"]
    assert all(torch.equal(kept.get_parameter(name), value) for name, value in trained.named_parameters())
    hub.heal()
    trainer.save_model()
    assert "layers.1/sae_weights.safetensors" in published(hub, "me/saes")
    fault("Hub gone while a Trainer with push_to_hub trains", told=at.value, kept="all; saved again, it is published")


def test_not_blocking(hub: HubServer, base: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer = stage1(model, tmp_path / "saes", hub_model_id="me/s")
    future = trainer.push_to_hub(blocking=False)
    assert isinstance(future, Future) and future.result(60).oid == hub.commits("me/s")[0]


def test_a_public_repository_is_not_pushed_to_as_a_private_one(hub: HubServer, base: str, tmp_path: Path) -> None:
    hub.create_repo("me/s")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with pytest.raises(PublishError, match="me/s is public"):
        stage1(model, tmp_path / "saes", hub_model_id="me/s").push_to_hub(private=True)
    assert published(hub, "me/s") == set()


def test_a_base_that_only_lies_here(
    hub: HubServer, make_model: ModelFactory, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = tuner(str(tiny_path("base")), tmp_path / "out", tiny_tokenizer, hub_model_id="me/tuned")
    with pytest.raises(PublishError, match="nobody else can load.*--base owner/name"):
        trainer.push_to_hub()
    assert ("model", "me/tuned") not in hub.repos


def test_the_draft_of_the_card_is_ours(
    base: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase, hub: HubServer
) -> None:
    trainer = tuner(base, tmp_path / "out", tiny_tokenizer, hub_model_id="me/tuned")
    sent = len(hub.requests)
    trainer.create_model_card(model_name="x", tags="y")
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.base_model == base and "me/tuned" in card.content and len(hub.requests) == sent
    saes = stage1(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "saes")
    saes.create_model_card()
    assert ModelCard((tmp_path / "saes" / "README.md").read_text()).data.library_name == "saelens"


def test_the_source_is_told(
    hub: HubServer, base: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    hub.create_repo("you/source", folder=tiny_path("base"))
    save_sae(TopKSAE(128, 256, 8, hookpoint="layers.1"), tmp_path / "sae")
    settings: dict[str, Any] = {"packing": False, "report_to": "none", "kl_reference": "source"}
    args = SAETuningConfig(output_dir=str(tmp_path / "out"), sae=str(tmp_path / "sae"), max_steps=1, **settings)
    model, source = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (base, "you/source"))
    trainer = SAETuningTrainer(model, args, ROWS, processing_class=tiny_tokenizer, source_model=source)
    read = found_of(trainer).record.revisions
    assert read["base"] == {"name": base, "commit": hub.commits(base)[0]}
    assert read["source"] == {"name": "you/source", "commit": hub.commits("you/source")[0]}
