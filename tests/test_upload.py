"""One commit, whole or not at all, on the local Hub with huggingface_hub's own client."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, RepoUrl

from resa_hf.errors import PublishError
from resa_hf.hub import retries
from resa_hf.hub.upload import MANIFEST, publishable, upload

README = "---\nlicense: mit\n---\n# hello\n"
WHOLE = {"README.md", "weights.safetensors", "layers.1/cfg.json", MANIFEST}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited, without waiting."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A staged repository: a card, a large file, a file in a folder."""
    root = tmp_path / "staged"
    (root / "layers.1").mkdir(parents=True)
    (root / "README.md").write_text(README)
    (root / "weights.safetensors").write_bytes(bytes(range(256)) * 8)
    (root / "layers.1" / "cfg.json").write_text("{}")
    return root


def ours(hub: HubServer, repo: str = "me/new", branch: str = "main") -> set[str]:
    return set(hub.files(repo, branch)) - {".gitattributes"}


def commits(hub: HubServer, repo: str = "me/new", branch: str = "main") -> int:
    return sum(path.startswith(f"/api/models/{repo}/commit/") for _, path in hub.requests)


def test_a_new_repository_gets_everything_in_one_commit(hub: HubServer, folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    commit = upload(folder, "me/new", message="Upload")
    assert str(commit) == commit.commit_url == f"{hub.endpoint}/me/new/commit/{hub.commits('me/new')[0]}"
    assert ours(hub) == WHOLE and commits(hub) == 1
    assert all(hub.files("me/new")[path.relative_to(folder).as_posix()] == data for path, data in before.items())
    assert not hub.repos["model", "me/new"].private


def test_nothing_is_done_twice(hub: HubServer, folder: Path) -> None:
    first = upload(folder, "me/new", message="Upload")
    sent = len(hub.requests)
    assert upload(folder, "me/new", message="Upload").commit_url == first.commit_url
    assert len(hub.commits("me/new")) == 2  # the Hub's own first one, and ours
    assert not [path for method, path in hub.requests[sent:] if method in ("POST", "PUT")]


def test_large_files_that_arrived_are_not_sent_again(hub: HubServer, folder: Path, waits: list[float]) -> None:
    hub.fail("POST", "/commit/", 403)
    with pytest.raises(PublishError, match="403.*write access"):
        upload(folder, "me/new", message="Upload")
    assert ours(hub) == set()  # nothing is to be seen
    puts = [path for method, path in hub.requests if method == "PUT"]
    assert len(puts) == 1
    upload(folder, "me/new", message="Upload")
    assert ours(hub) == WHOLE and [path for method, path in hub.requests if method == "PUT"] == puts


@pytest.mark.parametrize("what", [500, 429, "drop", "drop_reply"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "^/api/models/me/new"),
        ("POST", "^/api/repos/create"),
        ("POST", "validate-yaml"),
        ("POST", "/preupload/"),
        ("POST", "info/lfs/objects/batch"),
        ("PUT", "."),
        ("POST", "/commit/"),
    ],
)
def test_a_broken_connection_does_not_matter(
    hub: HubServer, folder: Path, waits: list[float], what: int | str, method: str, path: str
) -> None:
    hub.fail(method, path, what)  # type: ignore[arg-type]
    commit = upload(folder, "me/new", message="Upload")
    assert hub._faults[0].times == 0, "the fault has not happened"
    assert ours(hub) == WHOLE
    assert len(hub.commits("me/new")) == 2 and commit.oid == hub.commits("me/new")[0]


def test_retry_after_is_waited_for(hub: HubServer, folder: Path, waits: list[float]) -> None:
    hub.fail("POST", "/commit/", 429, headers={"Retry-After": "17"})
    upload(folder, "me/new", message="Upload")
    assert waits == [17]


def test_a_long_retry_after_is_left_to_the_user(hub: HubServer, folder: Path, waits: list[float]) -> None:
    hub.fail("POST", "/commit/", 429, headers={"Retry-After": "3000"})
    with pytest.raises(PublishError, match="429.*Wait"):
        upload(folder, "me/new", message="Upload")
    assert waits == [] and ours(hub) == set()


def test_a_hub_that_stays_down(hub: HubServer, folder: Path, waits: list[float]) -> None:
    hub.fail("POST", "/commit/", 500, times=100)
    with pytest.raises(PublishError, match="me/new was not published. The Hub answered 500.*again later"):
        upload(folder, "me/new", message="Upload")
    assert waits == [1, 2, 4] and ours(hub) == set()


def test_somebody_else_commits_meanwhile(hub: HubServer, folder: Path, waits: list[float]) -> None:
    upload(folder, "me/new", message="Upload")
    (folder / "README.md").write_text(README + "more")
    hub.fail("POST", "/preupload/", lambda: hub.commit("me/new", {"theirs.json": "{}"}))
    with pytest.raises(PublishError, match="somebody else has committed meanwhile.*run the same command again"):
        upload(folder, "me/new", message="Upload")
    assert hub.files("me/new")["README.md"] == README.encode()
    upload(folder, "me/new", message="Upload")
    assert ours(hub) == {*WHOLE, "theirs.json"} and hub.files("me/new")["README.md"].endswith(b"more")


def test_somebody_else_commits_the_same_meanwhile(hub: HubServer, folder: Path, waits: list[float]) -> None:
    upload(folder, "me/new", message="Upload")
    (folder / "README.md").write_text(README + "more")
    hub.fail("POST", "/preupload/", lambda: hub.commit("me/new", {"README.md": README + "more"}))
    assert upload(folder, "me/new", message="Upload").oid == hub.commits("me/new")[0]
    assert len(hub.commits("me/new")) == 3


def test_private(hub: HubServer, folder: Path) -> None:
    upload(folder, "me/new", private=True, message="Upload")
    assert hub.repos["model", "me/new"].private
    upload(folder, "me/new", message="Upload")
    assert hub.repos["model", "me/new"].private  # and stays it
    hub.create_repo("me/public")
    with pytest.raises(PublishError, match="me/public is public.*nothing was uploaded"):
        upload(folder, "me/public", private=True, message="Upload")
    assert not [path for method, path in hub.requests if method in ("POST", "PUT") and "me/public" in path]


def test_the_owners_settings_decide_unless_private_is_asked_for(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, create = [], HfApi.create_repo

    def spy(api: HfApi, repo_id: str, **asked: Any) -> RepoUrl:
        sent.append(asked["private"])
        return create(api, repo_id, **asked)

    monkeypatch.setattr(HfApi, "create_repo", spy)
    upload(folder, "me/one", message="Upload")
    upload(folder, "me/two", private=True, message="Upload")
    assert sent == [None, True]  # False would make a public one, whatever the organisation's default is


def test_a_branch_is_made(hub: HubServer, folder: Path) -> None:
    hub.create_repo("me/new", files={"theirs.md": "hello"})
    upload(folder, "me/new", branch="v2", message="Upload")
    assert ours(hub) == {"theirs.md"} and ours(hub, branch="v2") == {*WHOLE, "theirs.md"}
    (folder / "README.md").write_text(README + "more")
    upload(folder, "me/new", branch="v2", message="Upload")
    assert len(hub.commits("me/new", branch="v2")) == 3


def test_only_what_an_earlier_upload_has_put_there_is_removed(hub: HubServer, folder: Path) -> None:
    upload(folder, "me/new", message="Upload")
    hub.commit("me/new", {"layers.5/cfg.json": "theirs", "notes.md": "theirs"})
    (folder / "layers.1" / "cfg.json").unlink()
    (folder / "notes.md").write_text("ours")
    upload(folder, "me/new", message="Upload")
    assert ours(hub) == WHOLE - {"layers.1/cfg.json"} | {"layers.5/cfg.json", "notes.md"}
    assert hub.files("me/new")["notes.md"] == b"ours"
    assert len(hub.commits("me/new")) == 4
    listed = json.loads(hub.files("me/new")[MANIFEST])["files"]
    assert listed == ["README.md", "notes.md", "weights.safetensors"]


def test_a_damaged_list_of_files_removes_nothing(hub: HubServer, folder: Path) -> None:
    hub.create_repo("me/new", files={MANIFEST: "[]", "theirs.md": "hello"})
    with pytest.raises(PublishError, match=f"{MANIFEST} in me/new is damaged"):
        upload(folder, "me/new", message="Upload")
    assert ours(hub) == {MANIFEST, "theirs.md"}


def test_only_known_kinds_of_files_go_up(tmp_path: Path) -> None:
    good = ["a.safetensors", "b.json", "c.jinja", "d.md", "e.png", "f.yaml", "merges.txt", "sub/g.json"]
    bad = ["training_args.bin", "optimizer.pt", "x.pkl", "y.pth", "z.npz", "code.py", ".env", ".git/h.json", "noname"]
    for name in good + bad:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "inside.json").symlink_to(tmp_path / "b.json")
    assert sorted(publishable(tmp_path)) == sorted([*good, "inside.json"])


def test_links_that_lead_out_are_refused(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (folder / "innocent.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(PublishError, match="innocent.json is a link out of"):
        upload(folder, "me/new", message="Upload")
    assert hub.requests == []


def test_a_token_in_a_file_is_refused(hub: HubServer, folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps({"settings": {"note": hub.token}}))
    with pytest.raises(PublishError, match="report.json holds what looks like an access token") as error:
        upload(folder, "me/new", message="Upload")
    assert hub.requests == [] and hub.token not in str(error.value)


@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "hf auth login"), (403, "write access"), (404, "name right"), (409, "again"), (400, "not published")],
)
def test_errors_say_what_to_do_and_never_the_token(hub: HubServer, folder: Path, status: int, advice: str) -> None:
    # A server, or a proxy, that repeats what it was sent.
    hub.fail("POST", "/commit/", status, headers={"X-Error-Message": f"Bearer {hub.token} may not"})
    with pytest.raises(PublishError, match=advice) as error:
        upload(folder, "me/new", message="Upload", token=hub.token)
    assert hub.token not in str(error.value) and "[token] may not" in str(error.value)
    assert error.value.__cause__ is None and error.value.__suppress_context__  # its headers hold the token


def test_offline_and_nameless(hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("new", "me/..", "me/a/b", "../me", "me/a b", ""):
        with pytest.raises(PublishError, match=re.escape(f"{name!r} is not the name of a repository: ")):
            upload(folder, name, message="Upload")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PublishError, match="holds nothing to publish"):
        upload(tmp_path / "empty", "me/new", message="Upload")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE is set"):
        upload(folder, "me/new", message="Upload")


def test_invalid_metadata_is_refused_before_files_are_sent(hub: HubServer, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: 3\nmodel-index: 7\n---\n")
    with pytest.raises(PublishError, match="Invalid metadata in README.md"):
        upload(folder, "me/new", message="Upload")
    assert ours(hub) == set() and "PUT" not in {method for method, _ in hub.requests}


def test_a_full_disk(folder: Path, hub: HubServer) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (folder / MANIFEST).symlink_to("/dev/full")
    with pytest.raises(PublishError, match="The disk is full.*Make room"):
        upload(folder, "me/new", message="Upload")
    assert hub.requests == []


def test_the_manifest_does_not_depend_on_its_folder(hub: HubServer, folder: Path) -> None:
    upload(folder, "me/new", message="Upload")
    manifest = (folder / MANIFEST).read_bytes()
    assert hashlib.sha256(hub.files("me/new")[MANIFEST]).digest() == hashlib.sha256(manifest).digest()
    assert os.fspath(folder).encode() not in manifest


def test_patience_ends() -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise RuntimeError("not of the connection")

    with pytest.raises(RuntimeError, match="not of the connection"):
        retries.patiently(call)
    assert len(calls) == 1
