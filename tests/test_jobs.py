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


@pytest.mark.long
def test_a_recipe_of_one_stage_publishes_its_saes(job, hub, tmp_path):
    recipe = tmp_path / "sae" / "mine.yaml"
    recipe.parent.mkdir()
    content = yaml.safe_load((tmp_path / "run" / "mine.yaml").read_text())
    kept = {key: content[key] for key in ("model_name_or_path", "dtype", "dataset", "limit", "held_out", "template")}
    recipe.write_text(f"# Hardware and cost.\n\n{yaml.safe_dump({**kept, **content['stage1'], 'report_to': 'none'})}")
    place = ["--output_dir", str(tmp_path / "volume"), "--sae_repo_id", "me/saes"]
    assert runpy.run_path(str(SCRIPT))["main"](["--recipe", str(recipe), *place]) == 0
    assert any(path.endswith("layers.2/sae_weights.safetensors") for path in hub.files("me/saes"))
    assert ("model", "me/adapter") not in hub.repos


@pytest.mark.parametrize(("kind", "command"), [("sae", "train-sae"), ("tune", "tune"), ("rl", "train-rl")])
def test_a_stage_has_a_process_on_each_gpu(kind, command, monkeypatch, tmp_path):
    recipe = tmp_path / kind / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text("# Hardware and cost.\n")
    launched = []

    def launch(words, check):
        launched.append(words)
        return subprocess.CompletedProcess(words, 3)

    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("subprocess.run", launch)
    monkeypatch.setattr("huggingface_hub.create_repo", lambda *_, **__: None)
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main(["--recipe", str(recipe), "--output_dir", "out", "--repo_id", "me/it", "--seed", "5"]) == 3
    (words,) = launched
    config = words[words.index("--config_file") + 1]
    assert yaml.safe_load(Path(config).read_text())["distributed_type"] == "MULTI_GPU"
    assert words[:2] == ["accelerate", "launch"] and words[words.index("--num_processes") + 1] == "4"
    told = [command, "--config", str(recipe), "--output_dir", "out", "--seed", "5"]
    assert words[words.index("resa_hf.cli") :] == ["resa_hf.cli", *told]


def test_a_job_without_a_repository_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT))["main"](["--recipe", "x", "--output_dir", str(tmp_path)])
    assert "name a repository" in capsys.readouterr().err


def test_under_slurm_each_machine_starts_its_processes(tmp_path):
    stand_ins = {
        "scontrol": "echo one; echo two",
        "srun": 'shift; for id in 0 1; do SLURM_NODEID=$id "$@"; done',
        "accelerate": 'printf "%s|" "$@"; echo',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    done = subprocess.run(
        ["bash", str(SCRIPT.with_name("train.sbatch")), "tune", "--config", "my recipe.yaml"],
        cwd=ROOT,
        env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = [line.split("|")[:-1] for line in done.stdout.splitlines()]
    assert [words[words.index("--machine_rank") + 1] for words in lines] == ["0", "1"]
    for words in lines:
        flags = dict(zip(words[1:-5:2], words[2:-5:2], strict=True))
        assert flags["--num_processes"] == "16" and flags["--num_machines"] == "2"
        assert flags["--main_process_ip"] == "one" and flags["--main_process_port"] == "20007"
        assert (ROOT / flags["--config_file"]).is_file()
        assert words[-5:] == ["-m", "resa_hf.cli", "tune", "--config", "my recipe.yaml"]


def test_a_run_that_fails_publishes_nothing(job, hub):
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main([*job, "--held_out", "5000"]) == 2
    assert "adapter_config.json" not in hub.files("me/adapter")
