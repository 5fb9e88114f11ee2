"""The files that a licence demands go up with what is made from a base."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import constants
from sae_files import make_sae

from resa_hf.cli import main
from resa_hf.errors import PublishError
from resa_hf.hub.licence_files import add_licence_files
from resa_hf.hub.licences import Licence
from resa_hf.hub.sae_repo import push_sae_to_hub

pytest_plugins = ("publishable",)

# As the licences have it (github.com/meta-llama/llama-models, models/*/LICENSE, section 1.b.iii).
NOTICE_3 = (
    "Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta Platforms, Inc. All Rights "
    "Reserved.\n"
)
NOTICE_32 = (
    "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta Platforms, Inc. All Rights "
    "Reserved.\n"
)
CARD = "---\nlicense: llama3.2\n---\n"


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        (Licence("llama3"), NOTICE_3),
        (Licence("llama3.2"), NOTICE_32),
        (Licence("other", "llama-3.3-community"), NOTICE_32.replace("3.2", "3.3")),
        (Licence("llama4"), NOTICE_32.replace("3.2", "4")),
        (Licence("mit"), None),
    ],
)
def test_the_notice(licence: Licence, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "stage").mkdir()
    for _ in range(2):  # the second card of a repository finds it there
        told = add_licence_files(tmp_path / "stage", str(tmp_path / "base"), licence)
        assert files(tmp_path / "stage") == ({} if expected is None else {"NOTICE": expected})
    assert told.lacks == ([] if expected is None else ["a copy of itself"])


def test_those_of_a_folder(tmp_path: Path) -> None:
    base, stage = tmp_path / "base", tmp_path / "stage"
    (base / "LICENSES").mkdir(parents=True)
    stage.mkdir()
    kept = {"LICENSE": "all of it", "LICENSE-CODE.md": "of the code", "NOTICE": "of the base\n"}
    for name, text in {**kept, "LICENSE.bin": "x", "README.md": "x", "LICENSES/MIT": "x"}.items():
        (base / name).write_text(text)
    told = add_licence_files(stage, str(base), Licence("llama3.2"))
    assert files(stage) == {**kept, "NOTICE": f"of the base\n{NOTICE_32}"}
    assert told.files == sorted(kept) and told.lacks == []
    (tmp_path / "secret").write_text("x")
    (base / "NOTICE.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(PublishError, match="NOTICE.txt is a link that leads out"):
        add_licence_files(stage, str(base), Licence())


def test_an_adapter_and_an_sae_carry_those_of_their_base_s_commit(
    hub: HubServer, adapter: Callable[..., Path]
) -> None:
    first = hub.create_repo("you/base", files={"README.md": CARD, "LICENSE.txt": "first", "big.safetensors": b"0"})
    assert main(["publish", "--folder", str(adapter(revision=first)), "--repo_id", "me/Llama-a"]) == 0
    hub.commit("you/base", {"LICENSE.txt": "second"})
    assert main(["publish", "--folder", str(adapter(revision=first)), "--repo_id", "me/Llama-b"]) == 0
    sae = make_sae("layers.1")
    sae.metadata = {"model_name": "you/base"}
    push_sae_to_hub(sae, "me/Llama-sae")
    for name, text in (("me/Llama-a", b"first"), ("me/Llama-b", b"first"), ("me/Llama-sae", b"second")):
        published = hub.files(name)
        assert (published["LICENSE.txt"], published["NOTICE"].decode()) == (text, NOTICE_32)
        assert b"could not add" not in published["README.md"] and b"LICENSE.txt" in published["published.json"]
    assert not [path for _, path in hub.requests if "big.safetensors" in path]


def test_what_cannot_be_read_is_left_out_and_told(
    hub: HubServer, adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create_repo("you/base", files={"README.md": CARD, "LICENSE": "x"}, gated=True)
    hub.create_repo("you/bare", files={"config.json": "{}"})
    monkeypatch.setenv("HF_TOKEN", hub.stranger)
    for base in ("you/base", "you/bare", "you/none", "resa_hf/tiny/base"):
        assert add_licence_files(tmp_path, base, Licence("mit")).files == []
    assert add_licence_files(tmp_path, "you/base", Licence("llama3.2")).lacks == ["a copy of itself"]
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.fail("HEAD", "LICENSE", 403, times=20)
    assert main(["publish", "--folder", str(adapter()), "--repo_id", "me/Llama-a"]) == 0
    assert b"could not add: a copy of itself." in hub.files("me/Llama-a")["README.md"]


def test_offline_those_of_the_cache(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("one", "two"):
        (tmp_path / stage).mkdir()
    hub.create_repo("you/base", files={"LICENSE": "x", "config.json": "{}"})
    add_licence_files(tmp_path / "one", "you/base", Licence())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert add_licence_files(tmp_path / "two", "you/base", Licence()).files == ["LICENSE"]
    assert add_licence_files(tmp_path / "two", "you/other", Licence()).files == ["LICENSE"]  # as it was
