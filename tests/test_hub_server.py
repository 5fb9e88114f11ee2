"""The local Hub of the tests, seen by the real clients, none of them changed."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

WEIGHTS = bytes(range(256)) * 400
CARD = "---\nlicense: mit\nbase_model: me/base\n---\n# A card\n"


def additions(**files: bytes | str) -> list[CommitOperationAdd]:
    """`README_md="..."` adds README.md; content is bytes or text."""
    contents = {path.replace("_", "."): data for path, data in files.items()}
    return [CommitOperationAdd(p, data.encode() if isinstance(data, str) else data) for p, data in contents.items()]


def test_a_commit_holds_large_and_regular_files(hub: HubServer) -> None:
    HfApi().create_repo("me/model")
    first = HfApi().model_info("me/model").sha
    commit = HfApi().create_commit(
        "me/model", additions(README_md=CARD, model_safetensors=WEIGHTS), commit_message="one", parent_commit=first
    )
    assert hub.files("me/model") | {".gitattributes": b""} == {
        ".gitattributes": b"",
        "README.md": CARD.encode(),
        "model.safetensors": WEIGHTS,
    }
    assert hub.commits("me/model") == [commit.oid, first]
    assert ("PUT", f"/storage/upload/{hashlib.sha256(WEIGHTS).hexdigest()}") in hub.requests
    assert [entry.commit_id for entry in HfApi().list_repo_commits("me/model")] == [commit.oid, first]


def test_an_unchanged_file_makes_no_commit(hub: HubServer) -> None:
    hub.create_repo("me/model", files={"README.md": CARD, "model.safetensors": WEIGHTS})
    HfApi().create_commit("me/model", additions(README_md=CARD, model_safetensors=WEIGHTS), commit_message="again")
    assert len(hub.commits("me/model")) == 1


def test_a_large_file_is_seen_only_after_its_commit(hub: HubServer) -> None:
    hub.create_repo("me/model", files={"README.md": CARD})
    HfApi().preupload_lfs_files("me/model", additions(model_safetensors=WEIGHTS))
    assert any(method == "PUT" for method, _ in hub.requests)
    assert HfApi().list_repo_files("me/model") == ["README.md"]
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/model", "model.safetensors")


def test_a_commit_needs_its_large_files(hub: HubServer) -> None:
    hub.create_repo("me/model", files={"README.md": CARD})
    pointer = {"path": "model.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 3}
    lines = [{"key": "header", "value": {"summary": "bad"}}, {"key": "lfsFile", "value": pointer}]
    reply = httpx.post(
        f"{hub.endpoint}/api/models/me/model/commit/main",
        content="\n".join(map(json.dumps, lines)),
        headers={"Authorization": f"Bearer {hub.token}"},
    )
    assert reply.status_code == 400 and "LFS pointer pointed to a file that does not exist" in reply.json()["error"]
    assert len(hub.commits("me/model")) == 1


def test_a_moved_parent_is_refused_and_nothing_changes(hub: HubServer) -> None:
    first = hub.create_repo("me/model", files={"README.md": CARD})
    hub.commit("me/model", {"other.txt": "theirs"})
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        HfApi().create_commit("me/model", additions(mine_txt="x"), commit_message="late", parent_commit=first)
    assert error.value.response.status_code == 412
    assert hub.files("me/model") == {"README.md": CARD.encode(), "other.txt": b"theirs"}


def test_what_exists_is_not_made_again(hub: HubServer) -> None:
    HfApi().create_repo("me/model")
    HfApi().create_branch("me/model", branch="seed-1")
    for again in (lambda: HfApi().create_repo("me/model"), lambda: HfApi().create_branch("me/model", branch="seed-1")):
        with pytest.raises(HfHubHTTPError) as error:
            again()
        assert error.value.response.status_code == 409
    assert HfApi().create_repo("me/model", exist_ok=True).repo_id == "me/model"
    HfApi().create_branch("me/model", branch="seed-1", exist_ok=True)
    assert {ref.name for ref in HfApi().list_repo_refs("me/model").branches} == {"main", "seed-1"}


def test_branches_and_pinned_commits_keep_their_files(hub: HubServer) -> None:
    pinned = hub.create_repo("me/model", files={"config.json": "1"}, commit="c0ffee" + "0" * 34)
    HfApi().create_branch("me/model", branch="feature/x")
    HfApi().create_commit("me/model", additions(config_json="2"), commit_message="x", revision="feature/x")
    hub.commit("me/model", {"config.json": "3"})
    found = {
        rev: Path(hf_hub_download("me/model", "config.json", revision=rev)) for rev in ("main", "feature/x", pinned)
    }
    assert {rev: path.read_text() for rev, path in found.items()} == {"main": "3", "feature/x": "2", pinned: "1"}
    assert pinned == "c0ffee" + "0" * 34 and pinned in str(found[pinned])


def test_etags_are_gits_and_sha256(hub: HubServer) -> None:
    hub.create_repo("me/model", files={"README.md": CARD, "model.safetensors": WEIGHTS})
    text, large = (sibling for sibling in HfApi().model_info("me/model", files_metadata=True).siblings or [])
    git = subprocess.run(["git", "hash-object", "--stdin"], input=CARD.encode(), capture_output=True, check=True)
    assert text.blob_id == git.stdout.decode().strip() and text.lfs is None
    assert (
        large.lfs is not None
        and large.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
        and large.size == len(WEIGHTS)
    )
    for name, etag in (("README.md", text.blob_id), ("model.safetensors", large.lfs.sha256)):
        url = f"{hub.endpoint}/me/model/resolve/main/{name}"
        head = httpx.head(url)
        assert (head.headers.get("X-Linked-ETag") or head.headers["ETag"]) == f'"{etag}"'
        assert head.headers["X-Repo-Commit"] == hub.commits("me/model")[0]
    # The file that the cache names by its etag.
    assert Path(hf_hub_download("me/model", "model.safetensors")).resolve().name == large.lfs.sha256


@pytest.mark.parametrize(
    ("asked", "part"),
    [("bytes=10-19", WEIGHTS[10:20]), ("bytes=-7", WEIGHTS[-7:]), ("bytes=102000-", WEIGHTS[102000:])],
)
def test_ranges(hub: HubServer, asked: str, part: bytes) -> None:
    hub.create_repo("me/model", files={"model.safetensors": WEIGHTS})
    url = f"{hub.endpoint}/me/model/resolve/main/model.safetensors"
    reply = httpx.get(url, headers={"Range": asked}, follow_redirects=True)
    assert reply.status_code == 206 and reply.content == part
    first = WEIGHTS.rindex(part) if asked.startswith("bytes=-") else int(asked[6:].split("-")[0])
    assert reply.headers["Content-Range"] == f"bytes {first}-{first + len(part) - 1}/{len(WEIGHTS)}"


def test_a_range_past_the_end_is_refused(hub: HubServer) -> None:
    hub.create_repo("me/model", files={"a.txt": "abc"})
    url = f"{hub.endpoint}/me/model/resolve/main/a.txt"
    reply = httpx.get(url, headers={"Range": "bytes=3-"}, follow_redirects=True)
    assert (reply.status_code, reply.headers["Content-Range"]) == (416, "bytes */3")


def test_the_storage_refuses_a_token(hub: HubServer) -> None:
    hub.create_repo("me/model", files={"model.safetensors": WEIGHTS})
    with_token = {"Authorization": f"Bearer {hub.token}"}
    reply = httpx.get(f"{hub.endpoint}/me/model/resolve/main/model.safetensors", headers=with_token)
    assert reply.status_code == 302 and httpx.get(reply.headers["Location"]).content == WEIGHTS
    assert httpx.get(reply.headers["Location"], headers=with_token).status_code == 400


def test_a_small_file_is_redirected_to_its_commit(hub: HubServer) -> None:
    """So that a branch that moves after the HEAD request does not give a file of another commit than told."""
    old = hub.create_repo("me/model", files={"a.txt": "old"})
    hub.fail("GET", "a.txt", lambda: hub.commit("me/model", {"a.txt": "new"}))
    path = Path(hf_hub_download("me/model", "a.txt"))
    assert path.read_text() == "old" and old in str(path)


def test_trees_and_snapshots(hub: HubServer) -> None:
    files = {"README.md": CARD, "layers.1/cfg.json": "{}", "layers.1/deep/er.txt": "x", "layers.12/cfg.json": "[]"}
    hub.create_repo("me/sae", files=files)
    top = {entry.path: type(entry).__name__ for entry in HfApi().list_repo_tree("me/sae")}
    assert top == {"README.md": "RepoFile", "layers.1": "RepoFolder", "layers.12": "RepoFolder"}
    below = {entry.path for entry in HfApi().list_repo_tree("me/sae", "layers.1", recursive=True)}
    assert below == {"layers.1/cfg.json", "layers.1/deep", "layers.1/deep/er.txt"}
    with pytest.raises(EntryNotFoundError):
        list(HfApi().list_repo_tree("me/sae", "layers.2"))
    folder = Path(snapshot_download("me/sae", allow_patterns="layers.1/*"))
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {
        "layers.1/cfg.json",
        "layers.1/deep/er.txt",
    }


def test_repo_info_has_the_card(hub: HubServer) -> None:
    card = "---\nlibrary_name: peft\ntags: [resa]\nbase_model: me/base\nbase_model_relation: adapter\n---\n"
    commit = hub.create_repo("me/adapter", files={"README.md": card, "a/b.txt": ""}, gated=True)
    info = HfApi().model_info("me/adapter")
    assert info.sha == commit and info.gated and not info.private
    assert info.card_data is not None and info.card_data.base_model == "me/base" and info.library_name == "peft"
    assert {"peft", "resa", "base_model:adapter:me/base"} <= set(info.tags or [])
    assert [sibling.rfilename for sibling in info.siblings or []] == ["README.md", "a/b.txt"]


def test_what_is_missing_is_named(hub: HubServer) -> None:
    hub.create_repo("me/model", files={"config.json": "{}"})
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("me/nothing", "config.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("me/model", "config.json", revision="nowhere")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/model", "other.json")
    # The commit is told as well, so that clients remember, also offline, what it lacks.
    assert not isinstance(try_to_load_from_cache("me/model", "other.json"), str | None)
    with pytest.raises(RepositoryNotFoundError):
        HfApi().dataset_info("me/model")


@pytest.mark.parametrize(("token", "status"), [(False, 401), (HubServer.stranger, 403)])
def test_gated_repos(hub: HubServer, token: Any, status: int) -> None:
    hub.create_repo("meta-llama/Llama-3.2-1B", files={"config.json": "{}"}, gated=True)
    with pytest.raises(GatedRepoError, match="Access to model meta-llama/Llama-3.2-1B is restricted") as error:
        hf_hub_download("meta-llama/Llama-3.2-1B", "config.json", token=token)
    assert error.value.response.status_code == status
    assert HfApi(token=token).model_info("meta-llama/Llama-3.2-1B").gated
    assert Path(hf_hub_download("meta-llama/Llama-3.2-1B", "config.json")).read_text() == "{}"


@pytest.mark.parametrize(("token", "status"), [(False, 401), (HubServer.stranger, 404)])
def test_private_repos(hub: HubServer, token: Any, status: int) -> None:
    HfApi().create_repo("me/secret", private=True)
    with pytest.raises(RepositoryNotFoundError) as error:
        HfApi(token=token).model_info("me/secret")
    assert error.value.response.status_code == status
    assert HfApi().model_info("me/secret").private


def test_tokens(hub: HubServer) -> None:
    assert HfApi().whoami()["name"] == "me"
    hub.create_repo("me/model", files={"config.json": "{}"})
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as error:
        HfApi(token="hf_wrong").model_info("me/model")
    assert error.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError) as error:
        HfApi(token=hub.stranger).create_commit("me/model", additions(a_txt="x"), commit_message="x")
    assert error.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError) as error:
        HfApi(token=False).create_repo("me/another")
    assert error.value.response.status_code == 401
    assert hub.files("me/model") == {"config.json": b"{}"}


def test_a_dropped_download_goes_on_where_it_stopped(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # The client keeps whole chunks, of 10 MB by default.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.create_repo("me/model", files={"model.safetensors": WEIGHTS})
    hub.fail("GET", r"model\.safetensors", "drop_body")
    assert Path(hf_hub_download("me/model", "model.safetensors")).read_bytes() == WEIGHTS
    assert [method for method, _ in hub.requests] == ["HEAD", "GET", "GET"]
    assert len(WEIGHTS) <= hub.bytes_sent < len(WEIGHTS) + 1024


def test_a_slow_body_runs_into_the_clients_timeout(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.pause = 0.4
    hub.create_repo("me/model", files={"model.safetensors": WEIGHTS})
    hub.fail("GET", r"model\.safetensors", "slow")
    assert Path(hf_hub_download("me/model", "model.safetensors")).read_bytes() == WEIGHTS
    assert sum(method == "GET" for method, _ in hub.requests) == 2


def test_too_many_requests_are_waited_out(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    hub.create_repo("me/model", files={})
    hub.fail("POST", "/preupload/", 429, headers={"Retry-After": "30"})
    hub.fail("PUT", "/storage/upload/", 500, times=2)
    HfApi().create_commit("me/model", additions(model_safetensors=WEIGHTS), commit_message="x")
    # huggingface_hub adds a second to what it is told, and starts at one second where it is told nothing.
    assert [wait for wait in waits if wait >= 1] == [31.0, 1, 2]
    assert hub.files("me/model") == {"model.safetensors": WEIGHTS}


@pytest.mark.parametrize(("fault", "published"), [("drop", False), ("drop_body", False), ("drop_reply", True)])
def test_a_dropped_commit_is_made_whole_or_not_at_all(hub: HubServer, fault: Any, published: bool) -> None:
    hub.create_repo("me/model", files={"old.txt": "old"})
    hub.fail("POST", "/commit/main", fault)
    with pytest.raises(httpx.TransportError):
        HfApi().create_commit("me/model", additions(new_txt="new", model_safetensors=WEIGHTS), commit_message="x")
    new = {"new.txt": b"new", "model.safetensors": WEIGHTS} if published else {}
    assert hub.files("me/model") == {"old.txt": b"old", **new}


def test_fresh_processes_use_it_too(hub: HubServer, tmp_path: Path) -> None:
    hub.create_repo("me/secret", files={"model.safetensors": WEIGHTS}, private=True)
    code = "from huggingface_hub import hf_hub_download as h; print(h('me/secret', 'model.safetensors'))"
    home = tmp_path / "fresh"
    done = subprocess.run([sys.executable, "-c", code], env=hub.env(home), capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    assert path.read_bytes() == WEIGHTS and path.is_relative_to(home)
