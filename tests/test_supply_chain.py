"""What resa-hf is made of and sends: lower bounds that are tried, imports offline, telemetry off, workflows, docs."""

import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import resa_hf

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
]
# Ends the process at its first word to the network, whoever swallows exceptions on the way.
OFFLINE = """
import os, sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"):
        os.write(2, f"network: {event} {arguments[1:]}".encode())
        os._exit(9)
sys.addaudithook(refuse)
"""


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs code as a user would: without what conftest.py sets."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": os.environ["PATH"], **env}
    )


def pins(name: str) -> dict[str, str]:
    lines = [line.partition("==") for line in (ROOT / name).read_text().splitlines() if "==" in line]
    return {canonicalize_name(distribution): version for distribution, _, version in lines}


def test_oldest_versions_are_the_lower_bounds() -> None:
    oldest = pins("constraints-oldest.txt")
    for requirement in REQUIREMENTS:
        version = oldest[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version)
        bounds = [Version(bound.version) for bound in requirement.specifier if bound.operator == ">="]
        exact = any(bound.operator == "==" for bound in requirement.specifier)
        assert exact or bounds == [Version(version)], f"{requirement}, but {version}: make constraints-oldest"


def test_tested_versions_are_allowed() -> None:
    tested = pins("constraints.txt")
    for requirement in REQUIREMENTS:
        assert requirement.specifier.contains(tested[canonicalize_name(requirement.name)]), requirement


def test_the_guard_sees_what_is_caught() -> None:
    result = python(
        OFFLINE + "import socket\ntry: socket.create_connection(('localhost', 1))\nexcept BaseException: pass"
    )
    assert result.returncode == 9 and "socket.getaddrinfo" in result.stderr


@pytest.mark.long
def test_no_module_needs_the_network_to_be_imported() -> None:
    code = (
        "import importlib, pkgutil, resa_hf\n"
        "names = [m.name for m in pkgutil.walk_packages(resa_hf.__path__, 'resa_hf.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(len(names))"
    )
    result = python(OFFLINE + code)
    assert result.returncode == 0, result.stderr[-2000:]
    files = [path for path in (ROOT / "src" / "resa_hf").rglob("*.py") if path.parent.name != "resa_hf"]
    assert int(result.stdout.split()[-1]) >= len(files)


@pytest.mark.long
def test_our_commands_switch_telemetry_off() -> None:
    # Each library is asked itself, after a command has run.
    code = (
        "from resa_hf.cli import main\n"
        "try:\n    main(['features', '--help'])\nexcept SystemExit: pass\n"
        "import datasets.config, gradio.analytics, huggingface_hub.constants, wandb.env\n"
        "print(huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS,\n"
        "      gradio.analytics.analytics_enabled(), wandb.env.error_reporting_enabled())"
    )
    # What the user has set stays.
    for env, gradio in (({}, "False"), ({"GRADIO_ANALYTICS_ENABLED": "True"}, "True")):
        result = python(code, **env)
        assert result.stdout.split()[-4:] == ["True", "False", gradio, "False"], result.stderr[-2000:]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflows_call_what_is_there(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), "pinned by its commit"
                continue
            for command in step["run"].splitlines():
                if not command.startswith("make "):
                    assert os.access(ROOT / command, os.X_OK), command
                    continue
                commands = {command}
                for name, values in matrix.items():
                    place = "${{ matrix." + name + " }}"
                    commands = {one.replace(place, value) for one in commands for value in values}
                assert {word for one in commands for word in one.split()[1:]} <= targets, command


def documented(value: object) -> set[str]:
    """The names before the types in the section Args."""
    section = (inspect.getdoc(value) or "").partition("Args:\n")[2].partition("\n\n")[0]
    entries = [line for line in section.splitlines() if re.match(r" {4}\w", line)]
    return {name for line in entries for name in re.findall(r"(?:^ {4}|, )(\w+)(?= \(|, \w+ \()", line)}


@pytest.mark.parametrize("name", resa_hf.__all__)
def test_public_docstrings_name_the_arguments(name: str) -> None:
    value = getattr(resa_hf, name)
    assert len(inspect.getdoc(value).split()) > 5  # type: ignore[union-attr]
    if isinstance(value, type) and issubclass(value, ValueError):
        return
    taken = set(inspect.signature(value).parameters)
    # What a class has from one of transformers or TRL need not be told again.
    theirs = [] if inspect.isfunction(value) else [c for c in value.__mro__ if not c.__module__.startswith("resa_hf")]
    told_there = set(inspect.signature(theirs[0]).parameters) if theirs else set()
    assert taken - told_there <= documented(value) <= taken


@pytest.mark.long
def test_docs_build_without_warnings(tmp_path: Path) -> None:
    modules = re.findall(r"\bresa_hf\S*", (ROOT / "Makefile").read_text().partition("-m pdoc")[2].partition("\n\n")[0])
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "-o", str(tmp_path), *modules]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert result.returncode == 0 and "Warning:" not in result.stderr, result.stderr[-2000:]
    page = (tmp_path / "resa_hf.html").read_text()
    assert all(f'<section id="{name}"' in page for name in resa_hf.__all__)
