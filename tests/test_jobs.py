"""The file that runs a recipe on Hugging Face Jobs: what would be submitted, and its work against the local Hub."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from resa_hf.tiny import tiny_path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "jobs" / "run_on_hf_jobs.py"


def commands(text):
    """The commands of a README's block, or of the docstring, each as its words."""
    joined = text.replace("\\\n", " ")
    return [shlex.split(line) for line in joined.splitlines() if line.strip().startswith("hf ")]


def test_the_readme_and_the_file_give_one_command():
    readme = (ROOT / "recipes" / "jobs" / "README.md").read_text()
    (command,) = [words for words in commands(readme) if words[1] == "jobs"]
    assert commands(SCRIPT.read_text()) == [command]
    recipe = ROOT / "recipes" / command[command.index("--recipe") + 1]
    assert recipe.is_file()
    # The timeout leaves room for the hours that the recipe expects.
    hours = float(re.search(r"([\d.]+) h, \$", recipe.read_text().replace("\n# ", " "))[1])
    assert hours < int(command[command.index("--timeout") + 1].removesuffix("h"))


def test_a_dry_run_tells_the_job_and_submits_nothing(tmp_path):
    readme = (ROOT / "recipes" / "jobs" / "README.md").read_text()
    (words,) = [words for words in commands(readme) if words[1] == "jobs"]
    token = "hf_" + "secret" * 6
    done = subprocess.run(
        [str(Path(sys.executable).with_name("hf")), *words[1:4], "--dry-run", *words[4:]],
        cwd=ROOT,
        env={**os.environ, "HF_TOKEN": token, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    told = " ".join(done.stdout.split())
    assert "flavor a100-large timeout 48h" in told and "secrets HF_TOKEN=***" in told
    assert "volumes hf://buckets/me/resa-runs:/runs ./dist:/dist" in told and "env UV_FIND_LINKS=/dist" in told
    assert "args --recipe deepseek-r1-distill-qwen-1.5b/run/resa-still-v5.yaml" in told
    assert "Job not submitted" in told and token not in done.stdout + done.stderr


def test_its_dependencies_are_inline():
    header = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", SCRIPT.read_text(), re.MULTILINE)[1]
    settings = tomllib.loads(re.sub(r"^# ?", "", header, flags=re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert settings == {"requires-python": project["requires-python"], "dependencies": [f"{project['name']}[eval]"]}


@pytest.fixture
def job(hub, tmp_path, monkeypatch):
    """The arguments of a job with the tiny reasoner, whose base lies on the Hub."""
    hub.create_repo("me/tiny-base", folder=tiny_path("base"), files={"README.md": "---\nlicense: apache-2.0\n---\n"})
    recipe = {
        "model_name_or_path": "me/tiny-base",
        "dtype": "float32",
        "dataset": "tiny-reasoner",
        "limit": 120,
        "held_out": 40,
        "template": "chat",
        "pack": False,
        "stage1": {"hookpoints": ["layers.2"], "num_latents": 64, "k": 4, "max_length": 128, "max_steps": 2},
        "stage2": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
        "sampling": {"max_new_tokens": 8, "batch_size": 40},
    }
    path = tmp_path / "run" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(f"# Hardware and cost.\n\n{yaml.safe_dump(recipe)}")
    monkeypatch.chdir(tmp_path)
    place = ["--output_dir", str(tmp_path / "volume"), "--repo_id", "me/adapter", "--sae_repo_id", "me/saes"]
    return ["--recipe", str(path), *place, "--private"]


@pytest.mark.long
def test_it_runs_publishes_and_goes_on_where_it_stopped(job, hub, tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main([*job, "--price_per_gpu_hour", "2.5"]) == 0
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= hub.files("me/adapter").keys()
    assert any(path.endswith("sae_weights.safetensors") for path in hub.files("me/saes"))
    assert hub.repos["model", "me/adapter"].private and hub.repos["model", "me/saes"].private
    told = capsys.readouterr()
    assert told.out.startswith("# Hardware and cost.") and hub.token not in told.out + told.err
    report = tmp_path / "volume" / "report.json"
    assert json.loads(report.read_text())["settings"]["run"]["price_per_gpu_hour"] == 2.5
    # As after a timeout behind Stage II: what was trained is not trained again.
    (adapter,) = (tmp_path / "volume").glob("arms/sae-tuning/*/*/adapter/adapter_model.safetensors")
    trained = adapter.stat().st_mtime_ns
    report.unlink()
    assert main([*job, "--price_per_gpu_hour", "2.5"]) == 0
    assert report.is_file() and adapter.stat().st_mtime_ns == trained


def test_a_token_that_may_not_write_is_known_before_the_run(job, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "WrongToken" * 3)
    with pytest.raises(OSError, match="401|403"):
        runpy.run_path(str(SCRIPT))["main"](job)
    assert not (tmp_path / "volume").exists()


def test_the_owners_settings_decide_unless_private_is_asked_for(job, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.create_repo", lambda _, **flags: asked.append(flags["private"]))
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main([*job, "--held_out", "5000"]) == main([*job[:-1], "--held_out", "5000"]) == 2
    assert asked == [True, True, None, None]


def test_a_run_that_fails_publishes_nothing(job, hub):
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main([*job, "--held_out", "5000"]) == 2
    assert "adapter_config.json" not in hub.files("me/adapter")
