"""Wheel and sdist as a user gets them: in an empty environment, away from the repository, without a network."""

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from resa_hf import __version__

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.long

# Every Python process started with this folder in PYTHONPATH can reach its own machine only.
OFFLINE = """
import sys
def refuse(event, arguments):
    if event == "socket.getaddrinfo" and arguments[0] not in ("localhost", "127.0.0.1", "::1", None):
        raise OSError(f"no network: {arguments[0]}")
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in ("127.0.0.1", "::1"):
        raise OSError(f"no network: {arguments[1]}")
sys.addaudithook(refuse)
"""
# What a user's checker sees: the wrong call must be an error, the right ones must not.
USER = """
from resa_hf import SAETuningConfig, load_sae, resolve_hookpoint

config = SAETuningConfig(output_dir="out", sae="owner/sae", hookpoint="layers.12")
name: str = resolve_hookpoint(object(), 12)
load_sae(12, sea_id="layers.12")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheel and sdist of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    hatch(ROOT, folder)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def hatch(source: Path, folder: Path, *targets: str) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), *targets]
    subprocess.run(command, cwd=source, check=True, capture_output=True)


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel and what it needs; no extras."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    constraints = ["-c", str(ROOT / "constraints.txt")]
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *constraints, built[0]], cwd=folder, check=True)
    return folder / "bin"


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Another directory, and an environment for processes that have no network and no home with caches."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "offline").mkdir()
    (tmp_path / "offline" / "sitecustomize.py").write_text(OFFLINE)
    paths = {"PYTHONPATH": str(tmp_path / "offline"), "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    return {**paths, "OMP_NUM_THREADS": "1"}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_sdist_makes_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    hatch(tmp_path / f"resa_hf-{__version__}", tmp_path / "dist", "-t", "wheel")
    (again,) = (tmp_path / "dist").glob("*.whl")
    assert contents(again) == contents(built[0])


def test_demo_without_repository_and_network(installed: Path, away: dict[str, str]) -> None:
    probe = "import urllib.request; urllib.request.urlopen('https://huggingface.co', timeout=9)"
    stopped = subprocess.run([installed / "python", "-c", probe], env=away, capture_output=True, text=True)
    assert "no network: huggingface.co" in stopped.stderr
    subprocess.run([installed / "resa-hf", "demo", "--output_dir", "demo"], env=away, check=True)
    report = json.loads(Path("demo/report.json").read_text())
    arms = {arm["name"]: arm for arm in report["arms"]}
    assert len(arms) == 13
    assert arms["zero adapter (known - no change)"]["by_seed"] == arms["base"]["by_seed"]
    # The demo's finding, which does not hang on the last bits: what is known to help is seen to help, and to harm.
    assert arms["source minus base as LoRA (known - gain)"]["difference"]["low"] > 0
    assert arms["noise on the weights (known - loss)"]["difference"]["high"] < 0


def test_types_reach_the_user(installed: Path, away: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", installed / "python", "user.py"]
    result = subprocess.run(command, capture_output=True, text=True, env={**away, "PYTHONPATH": ""})
    errors = [line for line in result.stdout.splitlines() if ": error:" in line]
    assert "py.typed" not in result.stdout
    assert {line.split(":")[1] for line in errors} == {"5", "6"}, result.stdout


def test_sbom_names_every_dependency() -> None:
    subprocess.run(["make", "sbom"], cwd=ROOT, check=True, capture_output=True)
    bill = json.loads((ROOT / "dist" / "sbom.json").read_text())
    assert bill["bomFormat"] == "CycloneDX" and bill["metadata"]["component"]["name"] == "resa-hf"
    named = {component["name"].lower().replace("_", "-") for component in bill["components"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][name] for name in ("dev", "eval", "space", "quant")]
    wanted = [re.match(r"[\w-]+", line)[0] for lines in (project["dependencies"], *extras) for line in lines]  # type: ignore[index]
    assert {name.lower().replace("_", "-") for name in wanted} <= named
