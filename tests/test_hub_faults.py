"""Faults of the connection, the Hub, the disk and other people while something is published."""

import threading
from pathlib import Path
from typing import Any

import pytest
from hub_client import full_disk
from hub_server import HubServer
from huggingface_hub import HfApi, constants
from sae_files import make_sae

from resa_hf.errors import PublishError
from resa_hf.hub.sae_repo import push_sae_to_hub
from resa_hf.hub.upload import MANIFEST, upload

ALL = (".*", ".*")
THEIRS = {"notes.txt": b"not ours"}


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited in all; nothing really waits."""
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


def write(folder: Path, version: int) -> dict[str, bytes]:
    """Files of a version of an artifact: changed, unchanged, new and gone ones, large and regular."""
    files = {
        "README.md": f"---\nlicense: mit\n---\n# Version {version}\n".encode(),
        "layers.1/sae_weights.safetensors": bytes([version]) * 3000,
        "layers.1/cfg.json": b"{}",
        f"only-in-{version}.json": b"[]",
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return files


def push(folder: Path, repo: str) -> str:
    return upload(folder, repo, message="Upload").oid


def visible(hub: HubServer, repo: str, revision: str = "main") -> dict[str, bytes]:
    """What the repository shows, without the lists that the Hub and the upload add themselves."""
    files = hub.files(repo, revision)
    return {name: data for name, data in files.items() if name not in (".gitattributes", MANIFEST)}


class Update:
    """A repository with version `n` of an artifact and a file of somebody else's, and version `n + 1` to be published.

    Each has large files of its own: one that the Hub has already is not sent again.
    """

    def __init__(self, hub: HubServer, folder: Path, n: int) -> None:
        self.hub, self.repo = hub, f"me/artifact-{n}"
        self.old = {**write(folder / f"{n}-old", n), **THEIRS}
        push(folder / f"{n}-old", self.repo)
        hub.commit(self.repo, THEIRS)
        self.before = hub.commits(self.repo)
        self.folder = folder / f"{n}-new"
        self.new = {**write(self.folder, n + 1), **THEIRS}
        assert visible(hub, self.repo) == self.old
        hub.requests.clear()

    def check(self, *, published: bool) -> None:
        """All of the new version in one commit, or all of the old one; the old commit as it was in any case."""
        assert visible(self.hub, self.repo) == (self.new if published else self.old)
        commits = self.hub.commits(self.repo)
        assert commits[-len(self.before) :] == self.before and len(commits) == len(self.before) + published
        assert visible(self.hub, self.repo, self.before[0]) == self.old


@pytest.fixture
def stages(hub: HubServer, tmp_path: Path) -> list[tuple[str, str]]:
    """All requests of an undisturbed upload, in their order."""
    update = Update(hub, tmp_path, 0)
    push(update.folder, update.repo)
    update.check(published=True)
    told = [(method, path.rpartition(update.repo)[2] or path) for method, path in hub.requests]
    assert {"POST", "PUT", "GET"} <= {method for method, _ in told} and len(told) >= 8
    return told


def possible(fault: Any, stages: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A HEAD request has no body that could be cut off, neither its own nor its reply's."""
    return [stage for stage in stages if fault != "drop_body" or stage[0] != "HEAD"]


@pytest.mark.parametrize("fault", ["drop", "drop_body", "drop_reply", 429, 500])
def test_one_fault_at_each_stage_of_an_upload_is_lived_through(
    hub: HubServer, tmp_path: Path, stages: list[tuple[str, str]], fault: Any
) -> None:
    for n in range(len(possible(fault, stages))):
        update = Update(hub, tmp_path, n + 1)
        hub.fail(*ALL, fault, skip=n)
        push(update.folder, update.repo)
        assert hub.heal() == 0
        update.check(published=True)


@pytest.mark.parametrize("fault", ["drop", "drop_body", "drop_reply", 500])
def test_an_outage_at_each_stage_of_an_upload_leaves_all_or_nothing(
    hub: HubServer, tmp_path: Path, stages: list[tuple[str, str]], fault: Any
) -> None:
    for n, stage in enumerate(possible(fault, stages)):
        update = Update(hub, tmp_path, n + 1)
        hub.fail(*ALL, fault, skip=n, times=1000)
        with pytest.raises(PublishError, match=f"{update.repo} was not published") as error:
            push(update.folder, update.repo)
        assert hub.token not in str(error.value) and error.value.__cause__ is None
        # Where only the answer was lost, the commit is there.
        update.check(published=fault == "drop_reply" and stage[1].endswith("/commit/main"))
        hub.heal()
        push(update.folder, update.repo)
        update.check(published=True)


def test_an_outage_at_each_stage_of_publishing_an_sae(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    """The whole of `push_sae_to_hub`, which also asks for the licence of the model that the SAE reads."""
    hub.create_repo("me/base", files={"README.md": "---\nlicense: apache-2.0\n---\n"})
    sae = make_sae()
    sae.metadata["model_name"] = "me/base"
    push_sae_to_hub(sae, "me/sae")
    expected = visible(hub, "me/sae")
    assert {"README.md", "layers.1/cfg.json", "layers.1/sae_weights.safetensors"} <= expected.keys()
    for n in range(len(hub.requests)):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache-{n}"))
        hub.large_files.clear()
        repo = f"me/sae-{n}"
        hub.fail(*ALL, "drop", skip=n, times=1000)
        with pytest.raises(PublishError) as error:
            push_sae_to_hub(sae, repo)
        assert hub.token not in str(error.value) and "http" not in str(error.value)
        assert ("model", repo) not in hub.repos or visible(hub, repo) == {}
        hub.heal()
        push_sae_to_hub(sae, repo)
        same = {name: data.replace(f"sae-{n}".encode(), b"sae") for name, data in visible(hub, repo).items()}
        assert same == expected and len(hub.commits(repo)) == 2
    fault("Hub gone at each request of a push", told=error.value, kept="the old version, whole; the same call ends")


def test_files_that_arrived_are_not_sent_again(hub: HubServer, tmp_path: Path, fault: Any) -> None:
    update = Update(hub, tmp_path, 1)
    hub.fail("POST", "/commit/", 403)
    with pytest.raises(PublishError, match="The Hub answered 403") as error:
        push(update.folder, update.repo)
    fault("a token without the right, in mid-push", told=error.value, kept="files that arrived; the same call ends")
    assert sum(method == "PUT" for method, _ in hub.requests) == 1
    push(update.folder, update.repo)
    assert sum(method == "PUT" for method, _ in hub.requests) == 1
    update.check(published=True)


def test_retry_after_is_honoured(hub: HubServer, tmp_path: Path, waits: list[float]) -> None:
    update = Update(hub, tmp_path, 1)
    hub.fail("POST", "/commit/", 429, headers={"Retry-After": "37"})
    push(update.folder, update.repo)
    assert 37 <= max(waits) < 40
    update.check(published=True)


def test_a_long_retry_after_is_for_the_user_to_decide(hub: HubServer, tmp_path: Path, waits: list[float]) -> None:
    update = Update(hub, tmp_path, 1)
    hub.fail("POST", "/commit/", 429, headers={"Retry-After": "3600"})
    with pytest.raises(PublishError, match="429.*Wait, then run the same command again"):
        push(update.folder, update.repo)
    assert max(waits, default=0) < 3600
    update.check(published=False)


def test_a_branch_that_moved_is_not_overwritten(hub: HubServer, tmp_path: Path, fault: Any) -> None:
    update = Update(hub, tmp_path, 1)
    hub.fail("POST", "/commit/", lambda: hub.commit(update.repo, {"README.md": "theirs now"}))
    with pytest.raises(PublishError, match="[Ss]omebody else has committed meanwhile") as error:
        push(update.folder, update.repo)
    fault("somebody else's commit in mid-push", told=error.value, kept="theirs; pushed again, both")
    assert visible(hub, update.repo) == {**update.old, "README.md": b"theirs now"}
    push(update.folder, update.repo)
    assert visible(hub, update.repo) == update.new


@pytest.mark.parametrize("same", [True, False])
def test_two_publishers_at_once(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool) -> None:
    """Both read the same head before either commits."""
    hub.create_repo("me/artifact", files=THEIRS)
    contents = [write(tmp_path / str(n), 1 if same else n) for n in (1, 2)]
    both_ready, create_commit = threading.Barrier(2, timeout=20), HfApi.create_commit
    waiting = [1, 2]

    def together(self: HfApi, *args: Any, **kwargs: Any) -> Any:
        if waiting:
            waiting.pop()
            both_ready.wait()
        return create_commit(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", together)
    results: dict[int, object] = {}

    def run(n: int) -> None:
        try:
            results[n] = push(tmp_path / str(n), "me/artifact")
        except PublishError as error:
            results[n] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hub.commits("me/artifact")) == 2
    failed = [n for n, result in results.items() if isinstance(result, PublishError)]
    if same:
        assert failed == [] and visible(hub, "me/artifact") == {**contents[0], **THEIRS}
        return
    [loser] = failed
    assert "ebody else has committed meanwhile" in str(results[loser])
    assert visible(hub, "me/artifact") == {**contents[2 - loser], **THEIRS}
    push(tmp_path / str(loser), "me/artifact")
    assert visible(hub, "me/artifact") == {**contents[loser - 1], **THEIRS}


def test_a_full_disk(hub: HubServer, tmp_path: Path) -> None:
    update = Update(hub, tmp_path, 1)
    with full_disk(MANIFEST), pytest.raises(PublishError, match="The disk is full.*Make room"):
        push(update.folder, update.repo)
    update.check(published=False)
    push(update.folder, update.repo)
    update.check(published=True)
