"""What is installed: quick to import, typed, complete, and with every dependency declared."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import resa_hf

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "resa_hf"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Distributions whose module has another name.
MODULES = {"pyyaml": "yaml", "markdown-it-py": "markdown_it", "huggingface-hub": "huggingface_hub"}


# Other people's code relies on these.
PUBLIC = """
    SAETrainingConfig SAETrainer SAETuningConfig SAETuningTrainer load_sae save_sae push_sae_to_hub
    load_reasoning_adapter resolve_hookpoint capture splice
    HookpointError IncompatibleSAEError IncompatibleAdapterError
""".split()  # noqa: SIM905


def names(requirements: list[str]) -> set[str]:
    distributions = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in requirements}  # type: ignore[index]
    return {MODULES.get(name, name.replace("-", "_")) for name in distributions}


def test_import_is_quick_and_light() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import resa_hf; seconds = time.perf_counter() - start\n"
        "heavy = {'torch', 'transformers', 'datasets', 'trl', 'peft', 'sae_lens', 'matplotlib', 'numpy'}\n"
        "print(seconds, *heavy & set(sys.modules))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(3)
    ]
    assert [run[1:] for run in runs] == [[], [], []]
    assert min(float(run[0]) for run in runs) < 0.3


def test_public_names_are_there() -> None:
    for name in PUBLIC:
        assert name in dir(resa_hf)
        assert callable(getattr(resa_hf, name))
    for name in ("HookpointError", "IncompatibleSAEError", "IncompatibleAdapterError"):
        assert issubclass(getattr(resa_hf, name), ValueError)
    with pytest.raises(AttributeError, match="no_such_name"):
        resa_hf.no_such_name  # noqa: B018


def test_what_is_imported_is_declared() -> None:
    # What an extra brings is imported where it is used, and may be missing. These files are lighteval's own business,
    # and nothing imports them before it is needed.
    with_lighteval = {"tasks.py", "pipeline.py", "lighteval_model.py"}
    allowed = names(PROJECT["dependencies"]) | set(sys.stdlib_module_names) | {"resa_hf"}
    extras = names([line for lines in PROJECT["optional-dependencies"].values() for line in lines])
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            found: list[str] = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found = [node.module]
            for module in {name.partition(".")[0] for name in found}:
                at_top = node in tree.body
                extra = module in extras and (not at_top or path.name in with_lighteval)
                assert module in allowed or extra, f"{path.name} imports {module}"


def test_imports_point_one_way() -> None:
    parts = ["sae", "tuning", "evaluation", "features", "experiment", "rl", "hub", "explore", "commands"]
    for path in SOURCE.rglob("*.py"):
        package = path.relative_to(SOURCE).parts[:-1]
        here = parts.index(package[0]) if package and package[0] in parts else -1
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.level and path.name != "cli.py":
                there = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")][0]
                assert there not in parts or parts.index(there) <= here, f"{path.name} imports {node.module}"


def test_versions_that_are_tested_cover_what_is_declared() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if line and not line.startswith("#")}
    declared = [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
    assert names(declared) <= names(sorted(pinned))
    assert len(pinned) == len([line for line in lines if "==" in line])


@pytest.mark.slow
def test_wheel_holds_all_that_the_source_tree_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("resa_hf/")}
        metadata = archive.read(f"resa_hf-{resa_hf.__version__}.dist-info/METADATA").decode()
    there = {
        path.relative_to(SOURCE.parent).as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    there |= {
        f"resa_hf/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "recipes").rglob("*") if path.is_file()
    }
    assert packed == {*there, "resa_hf/explorer/app.py"}
    assert "resa_hf/py.typed" in packed
    weights = {
        name.split("/")[3] for name in packed if name.startswith("resa_hf/tiny/weights/") and "safetens" in name
    }
    assert weights == {"base", "source"}
    assert "License-Expression: Apache-2.0" in metadata
    assert wheel.stat().st_size < 8e6
