"""The commands in two processes: each result once; and accelerate reads our configurations."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from distributed_runs import launch

from resa_hf.cli import main as resa_hf
from resa_hf.tiny import tiny_path
from resa_hf.tiny.task import make_rows, training_questions

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "accelerate_configs"
KINDS = {
    "single_gpu": (DistributedType.NO, 1),
    "multi_gpu": (DistributedType.MULTI_GPU, 8),
    "two_nodes": (DistributedType.MULTI_GPU, 16),
    "fsdp2": (DistributedType.FSDP, 8),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, 8),
    "deepspeed_zero3": (DistributedType.DEEPSPEED, 8),
}


def test_the_readme_names_every_configuration():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == KINDS.keys()
    text = (CONFIGS / "README.md").read_text()
    assert all(f"| `{name}.yaml` |" in text for name in KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name):
    read = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (read.distributed_type, read.num_processes) == KINDS[name]
    assert read.num_machines == (2 if name == "two_nodes" else 1)
    # accelerate leaves unknown keys of these sections alone, so they are looked up among the launcher's flags.
    flags = {action.dest for action in launch_command_parser()._actions}
    for section, prefix in ((read.fsdp_config, ""), (read.deepspeed_config, "")):
        assert {prefix + key for key in section} <= flags | {"deepspeed_multinode_launcher"}


@pytest.mark.parametrize("name", KINDS)
def test_an_unknown_key_is_an_error(name, tmp_path):
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    path = tmp_path / "more.yaml"
    path.write_text(yaml.safe_dump({**content, "num_procceses": 2}))
    with pytest.raises(ValueError, match="num_procceses"):
        load_config_from_file(str(path))


def test_what_the_trainers_need_is_set():
    fsdp = load_config_from_file(str(CONFIGS / "fsdp2.yaml")).fsdp_config
    assert fsdp["fsdp_version"] == 2 and not fsdp["fsdp_cpu_ram_efficient_loading"]
    assert fsdp["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    for stage in (2, 3):
        config = load_config_from_file(str(CONFIGS / f"deepspeed_zero{stage}.yaml")).deepspeed_config
        assert config["zero_stage"] == stage


@pytest.mark.parametrize("command", ["evaluate --server", "run", "compare", "features"])
def test_commands_of_one_process_refuse_to_be_launched_in_several(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    tiny = ROOT / "recipes/tiny-reasoner"
    recipe = {
        "run": ["--config", str(tiny / "run/own_data.yaml"), "--dataset", "tiny-reasoner"],
        "compare": ["--config", str(next((tiny / "compare").glob("*.yaml")))],
        "evaluate --server": ["http://127.0.0.1:1/v1", "--model_name_or_path", "x", "--tasks", "resa:aime24"],
        "features": ["--config", str(next((tiny / "features").glob("*.yaml")))],
    }[command]
    assert resa_hf([*command.split(), *recipe, "--output_dir", str(tmp_path / "out")]) == 2
    assert f"resa-hf {command} was launched in 2 processes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_both_stages_in_two_processes_leave_one_result_each(tmp_path):
    data = ["--dataset", "tiny-reasoner", "--limit", "120", "--held_out", "21", "--template", "chat"]
    model = ["--model_name_or_path", "resa_hf/tiny/base", "--dtype", "float32"]
    common = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--max_length", "64", "--report_to", "none"]
    common += ["--use_cpu", "--logging_steps", "1", "--save_strategy", "no"]
    saes = tmp_path / "saes"
    stage1 = ["--hookpoints", "layers.1", "layers.2", "--num_latents", "64", "--k", "4", "--spread_hookpoints"]
    launch(["-m", "resa_hf.cli"], ["train-sae", *model, *data, *common, *stage1, "--output_dir", str(saes)])
    report = json.loads((saes / "report.json").read_text())
    assert {f"eval_{name}/layers.{n}" for n in (1, 2) for name in ("fvu", "ce_recovered")} <= report["held_out"].keys()
    assert report["log"][0]["tokens_seen"] == 8 * 64
    out = tmp_path / "tuned"
    stage2 = ["--sae", str(saes), "--sae_id", "layers.2", "--learning_rate", "1e-3", "--output_dir", str(out)]
    launch(["-m", "resa_hf.cli"], ["tune", *model, *data, *common, *stage2])
    report = json.loads((out / "report.json").read_text())
    assert [entry["num_tokens"] for entry in report["log"] if "loss" in entry] == [8 * 64, 16 * 64]
    assert report["moved"]["update_norm"] > 0 and (out / "adapter_model.safetensors").is_file()


@pytest.fixture
def evaluation(tmp_path):
    """A command that evaluates two models on nine problems, three times each, but for its output folder."""
    problems = tmp_path / "problems.jsonl"
    rows = make_rows(9, seed=6, exclude=training_questions())
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", "--model_name_or_path", "resa_hf/tiny/base", "--adapters", f"source={tiny_path('source')}"]
    words += ["--tasks", str(problems), "--file_prompt", "plain", "--samples", "3", "--max_new_tokens", "64"]
    return [*words, "--temperature", "1.0", "--batch_size", "4", "--dtype", "float32", "--output_dir"]


def left_by(folder):
    """All completions, by model, problem and sample, and the accuracies of the report."""
    found = {}
    for path in (folder / "models").glob("*/completions/*.jsonl"):
        _, *lines = map(json.loads, path.read_text().splitlines())
        entries = [(path.parts[-3], *entry[:2], entry[2]["text"]) for line in lines for entry in line["completions"]]
        assert len(entries) == 27
        found |= {entry[:3]: entry[3] for entry in entries}
    assert len(found) == 54
    return found, [model["accuracy"] for model in json.loads((folder / "report.json").read_text())["models"]]


@pytest.mark.long
def test_an_evaluation_in_two_processes_is_that_of_one_and_goes_on_in_one(evaluation, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert resa_hf([*evaluation, str(one)]) == 0
    printed = launch(["-m", "resa_hf.cli"], [*evaluation, str(two)])
    assert left_by(two) == left_by(one)
    assert printed.count("Report: ") == 1 and len(json.loads((two / "manifest.json").read_text())) == 1
    # As if it had been killed after the first round of the second model.
    (store,) = (two / "models/source/completions").glob("*.jsonl")
    lines = store.read_text().splitlines(keepends=True)
    assert [len(json.loads(line)["completions"]) for line in lines[1:]] == [8, 8, 8, 3]
    store.write_text("".join(lines[:2]))
    assert resa_hf([*evaluation, str(two)]) == 0
    assert left_by(two) == left_by(one)


@pytest.mark.long
@pytest.mark.parametrize(("model", "lines", "whole_group"), [("base", 2, True), ("source", 2, False)])
def test_an_evaluation_in_two_processes_that_is_killed_goes_on(evaluation, tmp_path, model, lines, whole_group):
    one, two = tmp_path / "one", tmp_path / "two"
    assert resa_hf([*evaluation, str(one)]) == 0
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with subprocess.Popen([*start, "-m", "resa_hf.cli", *evaluation, str(two)], start_new_session=True) as running:
        kept = []
        while len(kept) < lines:
            assert running.poll() is None, "it ended before it could be killed"
            kept = [
                line
                for path in two.glob(f"models/{model}/completions/*")
                for line in path.read_bytes().split(b"\n")[:-1]
            ]
            time.sleep(0.001)
        workers = psutil.Process(running.pid).children(recursive=True)
        for process in [*workers, running] if whole_group else [workers[-1]]:
            process.kill()
        assert running.wait() != 0
    launch(["-m", "resa_hf.cli"], [*evaluation, str(two)])
    assert left_by(two) == left_by(one)
    (store,) = two.glob(f"models/{model}/completions/*")
    assert store.read_bytes().split(b"\n")[: len(kept)] == kept
