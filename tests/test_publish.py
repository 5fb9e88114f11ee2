"""`resa-hf publish` and `push_sae_to_hub`: what is refused, and what goes up."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ModelFactory
from hub_server import HubServer
from huggingface_hub import ModelCard
from sae_files import make_sae
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from resa_hf.cli import main
from resa_hf.errors import PublishError
from resa_hf.hub.adapter_repo import with_base
from resa_hf.hub.folder_contents import find
from resa_hf.hub.record import Record
from resa_hf.hub.sae_repo import push_sae_to_hub
from resa_hf.sae.checkpoint import save_sae
from resa_hf.tiny import tiny_path

pytest_plugins = ("publishable",)


@pytest.fixture
def hub_with_base(hub: HubServer) -> HubServer:
    hub.create_repo("you/base", folder=tiny_path("base"), files={"README.md": "---\nlicense: mit\n---\n"})
    return hub


def uploads(hub: HubServer) -> list[str]:
    return [path for method, path in hub.requests if method in ("POST", "PUT") and "validate-yaml" not in path]


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("resa_hf/tiny/base", "nobody else can load"),
        ("/models/base", "nobody else can load"),
        ("tests", "nobody else can load"),  # a folder here
        ("you/base+merged adapter", r"with an adapter merged into it.*--merge"),
    ],
)
def test_a_base_that_others_cannot_load_is_refused(
    adapter: Callable[..., Path], base: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(PublishError, match=words):
        with_base(find(adapter(base=base)).record, None)


def test_a_base_with_an_adapter_is_refused() -> None:
    revisions = {
        "base": {"name": "you/base", "commit": "a" * 40},
        "base_adapter": {"name": "you/lora", "commit": None},
    }
    with pytest.raises(PublishError, match="you/base with you/lora merged into it"):
        with_base(Record(revisions=revisions), None)


def test_the_commit_of_the_base(hub_with_base: HubServer, adapter: Callable[..., Path]) -> None:
    (head,) = hub_with_base.commits("you/base")
    assert with_base(find(adapter()).record, None).revisions["base"] == {"name": "you/base", "commit": head}
    known = Record(revisions={"base": {"name": "you/base", "commit": "c" * 40}})
    assert with_base(known, None) is known
    with pytest.raises(PublishError, match="The base you/none could not be looked up on the Hub"):
        with_base(known, "you/none")


def test_dry_run_uploads_nothing(hub_with_base: HubServer, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--folder", str(run), "--repo_id", "me/a", "--sae_repo_id", "me/s", "--base", "you/base", "--dry_run"]
    before = sorted(run.rglob("*"))
    assert main(["publish", *flags]) == 0
    printed = capsys.readouterr().out
    assert sorted(run.rglob("*")) == before
    (weights,) = run.glob("arms/sae-tuning/**/adapter_model.safetensors")
    size = f"{weights.stat().st_size:,}"
    assert "me/a would hold" in printed and f"{size}  adapter_model.safetensors" in printed
    assert "layers.2/sae_weights.safetensors" in printed and "base_model: you/base" in printed
    assert "Nothing was uploaded." in printed
    assert uploads(hub_with_base) == [] and ("model", "me/a") not in hub_with_base.repos


def test_what_is_published_of_a_run(hub_with_base: HubServer, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", "--folder", str(run), "--repo_id", "me/a", "--base", "you/base"]) == 0
    assert f"{hub_with_base.endpoint}/me/a/commit/{hub_with_base.commits('me/a')[0]}" in capsys.readouterr().out
    files = hub_with_base.files("me/a")
    assert set(files) - {".gitattributes"} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "report.json", "report.png"),
        *("recipe.yaml", "stage1.json", "published.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    card = ModelCard(files["README.md"].decode()).data
    assert (card.base_model, card.license, card.library_name) == ("you/base", "mit", "peft")
    report = json.loads(files["report.json"])
    assert "hub_token" not in report["settings"]["stage2"] and b"hf_secret" not in b"".join(files.values())
    # Where it lay on this machine is nobody's business.
    assert not [name for name, content in files.items() if str(run.parent).encode() in content]
    # Again: nothing to do. Merged into the same repository: the adapter's files go.
    assert main(["publish", "--folder", str(run), "--repo_id", "me/a", "--base", "you/base"]) == 0
    assert len(hub_with_base.commits("me/a")) == 2
    assert main(["publish", "--folder", str(run), "--repo_id", "me/a", "--merge"]) == 0
    merged = hub_with_base.files("me/a")
    assert "model.safetensors" in merged and "generation_config.json" in merged
    assert "adapter_config.json" not in merged and "adapter_model.safetensors" not in merged


def test_a_merged_model_names_the_commit_that_was_merged(
    hub: HubServer,
    adapter: Callable[..., Path],
    make_model: ModelFactory,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    make_model("qwen2").save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    commit = hub.create_repo("you/base", folder=tmp_path / "base")
    assert main(["publish", "--folder", str(adapter()), "--repo_id", "me/m", "--merge"]) == 0
    card = ModelCard(hub.files("me/m")["README.md"].decode())
    assert card.data.base_model == "you/base" and f"(https://huggingface.co/you/base) | `{commit}` |" in card.text


def test_a_wrong_name_is_refused_before_anything_goes_up(hub: HubServer, adapter: Callable[..., Path]) -> None:
    hub.create_repo("you/base", files={"README.md": "---\nlicense: llama3.2\n---\n"})
    flags = ["--folder", str(adapter())]
    assert main(["publish", *flags, "--repo_id", "me/mine"]) == 2
    assert uploads(hub) == []
    assert main(["publish", *flags, "--repo_id", "me/Llama-mine"]) == 0
    assert ModelCard(hub.files("me/Llama-mine")["README.md"].decode()).data.license == "llama3.2"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "folder is not set"),
        (["--folder", "x"], "Nothing to do: set repo_id"),
        (["--folder", "x", "--repo_id", "me/a", "--sae_repo_id", "me/a"], "each needs a repository of its own"),
        (["--folder", "x", "--repo_id", "me/a", "--merge", "--base", "you/b"], "a merged model (merge) needs none"),
        (["--folder", "x", "--repo_id", "me/a", "--shiny"], "--shiny"),
    ],
)
def test_flags(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_name_that_would_lead_out_of_the_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(run.rglob("*"))
    for name in ("me/..", "me/."):
        assert main(["publish", "--folder", str(run), "--repo_id", name, "--merge"]) == 2
        assert "is not the name of a repository" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


def test_when_only_the_saes_arrive(hub_with_base: HubServer, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--folder", str(run), "--repo_id", "me/a", "--sae_repo_id", "me/s", "--base", "you/base"]
    hub_with_base.fail("POST", "/me/a/commit/", 403)
    assert main(["publish", *flags]) == 2
    told = capsys.readouterr().err
    assert "me/a was not published. The Hub answered 403" in told
    assert f"The SAEs are published: {hub_with_base.endpoint}/me/s/commit/{hub_with_base.commits('me/s')[0]}." in told
    assert main(["publish", *flags]) == 0 and len(hub_with_base.commits("me/s")) == 2
    # Asked beforehand for both.
    hub_with_base.create_repo("me/public")
    more = [
        "--folder",
        str(run),
        "--repo_id",
        "me/public",
        "--sae_repo_id",
        "me/s2",
        "--base",
        "you/base",
        "--private",
    ]
    assert main(["publish", *more]) == 2
    assert set(hub_with_base.files("me/s2")) <= {".gitattributes"}


def test_what_is_damaged_does_not_go_up(
    hub_with_base: HubServer, adapter: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter()
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = sorted(tensors)[0]
    save_file({**tensors, key: torch.full_like(tensors[key], torch.nan)}, weights)
    assert main(["publish", "--folder", str(folder), "--repo_id", "me/a"]) == 2
    assert "NaN" in capsys.readouterr().err
    weights.write_bytes(b"\x80\x04pickle")
    assert main(["publish", "--folder", str(folder), "--repo_id", "me/a"]) == 2
    assert "pickle" in capsys.readouterr().err
    weights.unlink()
    assert main(["publish", "--folder", str(folder), "--repo_id", "me/a"]) == 2
    assert "missing" in capsys.readouterr().err and uploads(hub_with_base) == []


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"r": "<script>"}, "r is '<script>'"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "evil.module"}}, "auto_mapping"),
    ],
)
def test_what_would_not_be_loaded_is_not_published(
    hub_with_base: HubServer,
    adapter: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    setting: dict[str, object],
    words: str,
) -> None:
    folder = adapter()
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **setting}))
    for more in (["--dry_run"], []):
        assert main(["publish", "--folder", str(folder), "--repo_id", "me/a", *more]) == 2
        told = capsys.readouterr()
        assert words in told.err and "<script>" not in told.out
    assert not list(folder.glob("published/a/*")) and uploads(hub_with_base) == []


def test_an_adapter_that_names_no_base(
    hub_with_base: HubServer, adapter: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter()
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    flags = ["publish", "--folder", str(folder), "--repo_id", "me/a"]
    before = len(hub_with_base.requests)
    for more in ([], ["--merge"]):
        assert main([*flags, *more]) == 2
        assert "names no base: name it by --base" in capsys.readouterr().err
    assert len(hub_with_base.requests) == before
    assert main([*flags, "--base", "you/base"]) == 0


def test_a_folder_is_not_taken_for_a_strangers_repository(hub_with_base: HubServer, run: Path) -> None:
    hub_with_base.create_repo("data/mine", "dataset", files={"README.md": "---\nlicense: cc-by-nc-4.0\n---\n"})
    path = run / "report.json"
    report = json.loads(path.read_text())
    report["revisions"]["dataset"] = {"name": "data/mine", "commit": None}
    path.write_text(json.dumps(report))
    assert main(["publish", "--folder", str(run), "--repo_id", "me/a", "--base", "you/base"]) == 0
    assert not [asked for _, asked in hub_with_base.requests if "data/mine" in asked]
    assert b"cc-by-nc" not in hub_with_base.files("me/a")["README.md"]


def test_push_sae_to_hub(hub: HubServer, tmp_path: Path) -> None:
    one, two = make_sae("layers.1"), make_sae("layers.2", seed=1)
    for sae in (one, two):
        sae.metadata = {}
    push_sae_to_hub({"layers.1": one, "layers.2": two}, "me/s", private=True, revision="dev")
    assert hub.repos["model", "me/s"].private and set(hub.files("me/s")) == {".gitattributes"}
    folders = {name.partition("/")[0] for name in hub.files("me/s", "dev") if "/" in name}
    assert folders == {"layers.1", "layers.2"} and len(hub.commits("me/s", branch="dev")) == 2
    # One of them is gone; the repository says nothing of it any more.
    push_sae_to_hub(one, "me/s", private=True, revision="dev")
    assert {name.partition("/")[0] for name in hub.files("me/s", "dev") if "/" in name} == {"layers.1"}
    assert "layers.2" not in hub.files("me/s", "dev")["README.md"].decode()
    # One folder of several, checkpoints beside them, and what was published before.
    for name in ("layers.1", "checkpoint-5/layers.1", "published/s/layers.9"):
        save_sae(one, tmp_path / "saes" / name)
    push_sae_to_hub(tmp_path / "saes", "me/t")
    assert {name.partition("/")[0] for name in hub.files("me/t") if "/" in name} == {"layers.1"}
    push_sae_to_hub(tmp_path / "saes" / "layers.1", "me/u")
    assert "layers.1/sae_weights.safetensors" in hub.files("me/u")


def test_saes_that_have_no_place(hub: HubServer) -> None:
    for sae, words in (
        (make_sae(None), "'' is not a hookpoint"),
        ({"../up": make_sae(None)}, "'../up' is not a hookpoint"),
        ({"layers.2": make_sae("layers.1")}, "says that it is one of 'layers.1'"),
    ):
        with pytest.raises(PublishError, match=words):
            push_sae_to_hub(sae, "me/s")
    assert hub.requests == []


def test_the_token_reads_the_licence_too(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.create_repo("me/secret", files={"README.md": "---\nlicense: mit\n---\n"}, private=True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    sae = make_sae("layers.1")
    sae.metadata = {"model_name": "me/secret", "dataset_path": "/home/me/data/mine.jsonl"}
    push_sae_to_hub(sae, "me/s", token=hub.token)
    assert ModelCard(hub.files("me/s")["README.md"].decode()).data.license == "mit"
    metadata = json.loads(hub.files("me/s")["layers.1/cfg.json"])["metadata"]
    assert (metadata["model_name"], metadata["dataset_path"]) == ("me/secret", None)
    known = Record(revisions={"base": {"name": "me/secret", "commit": None}})
    with_token = with_base(known, None, token=hub.token)
    assert with_token.revisions["base"]["commit"] == hub.commits("me/secret")[0]
    with pytest.raises(PublishError, match="me/secret could not be looked up"):
        with_base(known, None)
