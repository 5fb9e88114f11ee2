"""What the README says runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

from resa_hf.cli import main
from resa_hf.tiny import load_tiny_source, tiny_path

pytest_plugins = ("publishable",)

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_python_example_runs_and_leaves_an_adapter(tmp_path):
    code = CODE[0]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.long
def test_the_loading_example_runs_on_what_a_run_has_published(hub: HubServer, run: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    load_tiny_source().save_pretrained(source)
    hub.create_repo("me/base", folder=tiny_path("base"))
    hub.create_repo("me/sibling", folder=source)
    places = ["--base", "me/base", "--repo_id", "me/mine", "--sae_repo_id", "me/mine-sae"]
    assert main(["publish", "--folder", str(run), *places]) == 0
    check = f"""
import torch
untouched = AutoModelForCausalLM.from_pretrained({str(source)!r}).state_dict()
assert all(torch.equal(untouched[name], tensor) for name, tensor in sibling.state_dict().items())
"""
    home = tmp_path / "home"
    subprocess.run([sys.executable, "-c", CODE[1] + check], env={**os.environ, **hub.env(home)}, check=True)


@pytest.mark.long
def test_the_features_example_runs_on_the_saes_of_its_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train-sae", "--config", str(ROOT / "recipes/tiny-reasoner/sae/layers.yaml")]) == 0
    check = "\nassert found.latents and 0 < answer.shape[1] - prompt['input_ids'].shape[1] <= 64\n"
    subprocess.run([sys.executable, "-c", CODE[2] + check], check=True)


def test_what_it_links_to_is_there():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_its_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
