"""The Space: its card, and what push.py uploads, against a local Hub."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hub_cards import card_errors, card_metadata
from hub_server import HubServer

from resa_hf.errors import PublishError

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "spaces" / "resa-explorer"
ARM = "arms/mine/1e-03/seed-0/adapter"
KEPT = {
    "report.json", "report.md", "report.png", f"{ARM}/adapter_config.json", f"{ARM}/adapter_model.safetensors",
    "sae/source/seed-0/layers.2/cfg.json", "sae/source/seed-0/layers.2/sae_weights.safetensors",
}  # fmt: skip
LEFT = {
    "log.txt", "settings.json", "data/questions.json", f"{ARM}/training_args.bin", f"{ARM}/optimizer.pt",
    f"{ARM}/tokenizer.json", f"{ARM}/checkpoint-1/adapter_model.safetensors",
    "arms/mine/1e-03/seed-0/held_out.jsonl", "sae/source/seed-1/layers.2/sae_weights.safetensors",
    ARM.replace("seed-0", "seed-1") + "/adapter_model.safetensors",
}  # fmt: skip


@pytest.fixture(scope="module")
def space() -> ModuleType:
    """push.py, as a module."""
    spec = importlib.util.spec_from_file_location("push", SPACE / "push.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run, with files that the Space needs and others, all of them full of this machine's paths."""
    folder = tmp_path / "runs" / "mine"
    arm = {"name": "mine", "sae_from": "source", "tuning": {}}
    candidate = {"rate": 1e-3, "step": None}
    report = {
        "arms": [{"name": "base", "candidate": None}, {"name": "mine", "candidate": candidate}],
        "settings": {"run": {"seeds": [0, 1], "output_dir": str(folder)}, "arms": [arm]},
    }
    for name in KEPT | LEFT:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"from": str(folder)}) if path.suffix == ".json" else "content")
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "report.md").write_text(f"# mine\n\nFrom {folder}.\n")
    return folder


def quick_wheel(space: ModuleType, monkeypatch: pytest.MonkeyPatch, version: str = "9.9.9") -> str:
    """Lets push.py upload a stand-in for the wheel; returns its name."""
    name = f"resa_hf-{version}-py3-none-any.whl"

    def build(target: Path) -> Path:
        (target / name).write_bytes(b"a wheel")
        return target / name

    monkeypatch.setattr(space, "build_wheel", build)
    return name


def test_the_card_is_one_of_a_gradio_space_of_the_tested_version() -> None:
    text = (SPACE / "README.md").read_text()
    card = card_metadata(text)
    assert card is not None and card_errors(text) == []
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert (card["sdk"], card["sdk_version"]) == ("gradio", pins["gradio"])
    assert card["python_version"] == "3.11" and (SPACE / card["app_file"]).is_file()
    # https://huggingface.co/docs/hub/spaces-config-reference
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {card["colorFrom"], card["colorTo"]} <= colours and len(card["short_description"]) <= 60


def test_a_push_by_its_command(hub: HubServer, run: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SPACE / "push.py"), "--repo_id", "me/explorer", "--results", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = hub.files("me/explorer", repo_type="space")
    (wheel,) = (name for name in files if name.endswith(".whl"))
    own = {".gitattributes", "published.json", "app.py", "README.md", "requirements.txt", wheel}
    assert files.keys() == own | {f"results/mine/{name}" for name in KEPT}
    assert len(hub.commits("me/explorer", "space")) == 2, "the empty Space, and one commit"
    assert all(str(tmp_path).encode() not in content for content in files.values())
    assert all(f"{len(files[name]):,}  {name}" in done.stdout for name in (wheel, "app.py", "results/mine/report.md"))

    # The Hub has no other file when it installs these.
    (tmp_path / "requirements.txt").write_bytes(files["requirements.txt"])
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    lines = [line for line in files["requirements.txt"].decode().splitlines() if line.startswith("resa-hf ")]
    subprocess.run([*pip, *lines], check=True, cwd=tmp_path)
    assert (target / "resa_hf" / "explore" / "results.py").is_file()
    shown = subprocess.run(
        [sys.executable, "-c", "import resa_hf; print(resa_hf.__file__)"],
        env={"PYTHONPATH": str(target)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.startswith(str(target))


def test_what_the_space_no_longer_needs_goes_in_the_same_commit(
    hub: HubServer, space: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = quick_wheel(space, monkeypatch, "0.0.1")
    space.push("me/explorer", [run], "cpu-basic")
    hub.commit("me/explorer", {"notes.md": "somebody else's"}, repo_type="space")
    before = hub.commits("me/explorer", "space")
    new = quick_wheel(space, monkeypatch, "0.0.2")
    for _ in range(2):
        commit = space.push("me/explorer", [], "cpu-basic")
        assert hub.commits("me/explorer", "space") == [commit.oid, *before], "the second time there is nothing to do"
        assert f"/spaces/me/explorer/commit/{commit.oid}" in commit.commit_url
    files = hub.files("me/explorer", repo_type="space")
    assert new in files and old not in files and "notes.md" in files
    assert not any(name.startswith("results/") for name in files)


def test_requirements(hub: HubServer, space: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "resa_hf-1.0-py3-none-any.whl"
    wheel.write_bytes(b"a wheel")
    text = space.requirements(wheel, "me/explorer", on_cpu=True)
    # sha256sum of the 7 bytes
    digest = "69f51477f05c46bfa5ff0027a1fcde274695311a38adfb85611ffeb93c8b146b"
    assert f"resa-hf @ {hub.endpoint}/spaces/me/explorer/resolve/main/{wheel.name}#sha256={digest}" in text
    assert "\n--extra-index-url https://download.pytorch.org/whl/cpu\n" in text
    lines = text.splitlines()
    tested = (ROOT / "constraints.txt").read_text().splitlines()
    assert {line for line in lines if "==" in line} <= set(tested)
    assert [line.partition("=")[0] for line in lines if line.startswith(("torch=", "gradio=", "huggingface"))] == [
        "torch", "huggingface-hub",
    ]  # fmt: skip
    assert "download.pytorch.org" not in space.requirements(wheel, "me/explorer", on_cpu=False)


def test_a_dry_run_asks_nothing_of_the_hub(
    hub: HubServer, space: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = quick_wheel(space, monkeypatch)
    assert space.main(["--repo_id", "me/explorer", "--results", str(run), "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert f"7  {wheel}" in told and "results/mine/report.json" in told and told.endswith("Nothing was uploaded.\n")
    assert hub.requests == []


def test_a_space_that_is_there_keeps_its_hardware(
    hub: HubServer, space: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch for its CPU came to a Space with a GPU, where the push after the first did not name it."""
    quick_wheel(space, monkeypatch)
    for hardware in ("zero-a10g", "cpu-basic"):
        space.push("me/explorer", [], hardware)
        text = hub.files("me/explorer", repo_type="space")["requirements.txt"].decode()
        assert "download.pytorch.org/whl/cpu" not in text


def test_what_cannot_be_pushed(
    hub: HubServer, space: ModuleType, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_wheel(space, monkeypatch)
    with pytest.raises(PublishError, match="'explorer' is not the name of a repository: owner/name"):
        space.push("explorer", [], "cpu-basic")
    with pytest.raises(PublishError, match="There is no report.json of resa-hf in .*/nothing"):
        space.push("me/explorer", [tmp_path / "nothing"], "cpu-basic")
    with pytest.raises(PublishError, match="Two results are named mine; rename"):
        space.push("me/explorer", [run, run.parent], "cpu-basic")
    (run / "report.md").write_text(f"The token is {hub.token}.")
    with pytest.raises(PublishError, match="holds what looks like an access token"):
        space.push("me/explorer", [run], "cpu-basic")
    hub.create_repo("me/hidden", "space", private=True)
    with pytest.raises(PublishError, match="me/hidden is private, and the Hub could not install the wheel from there"):
        space.push("me/hidden", [], "cpu-basic")
    monkeypatch.setenv("HF_TOKEN", hub.stranger)
    with pytest.raises(PublishError, match="me/explorer was not published. The Hub answered 403"):
        space.push("me/explorer", [], "cpu-basic")
    assert not any("/commit/" in path for _, path in hub.requests)


def test_a_wheel_that_cannot_be_built(
    space: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(space, "ROOT", tmp_path)
    assert space.main(["--repo_id", "me/explorer"]) == 2
    told = capsys.readouterr().err
    assert "push.py: The wheel could not be built: " in told and "pip install 'hatchling>=1.27'" in told
