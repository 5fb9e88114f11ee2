"""Two launches with two_nodes.yaml, as of two machines: with one disk, and with a disk each."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys

import pytest
from distributed_runs import TESTS, assert_weights_agree, launch

pytestmark = pytest.mark.long
CONFIG = TESTS.parent / "recipes/accelerate_configs/two_nodes.yaml"
DATA = ["--model_name_or_path", "resa_hf/tiny/base", "--dtype", "float32", "--dataset", "tiny-reasoner",
        "--limit", "120", "--held_out", "21", "--template", "chat", "--max_length", "64", "--report_to", "none",
        "--use_cpu", "--per_device_train_batch_size", "4", "--max_steps", "4", "--save_strategy", "steps",
        "--save_steps", "2"]  # fmt: skip
SAES = ["train-sae", *DATA, "--hookpoints", "layers.1", "layers.2", "--num_latents", "64", "--k", "4"]
SAES += ["--spread_hookpoints", "--output_dir"]
TUNE = ["tune", *DATA, "--learning_rate", "1e-3", "--sae_id", "layers.2", "--output_dir", "out", "--sae"]
ADAPTER = "out/adapter_model.safetensors"


def on_two_machines(words, places):
    """Exit statuses and outputs of one process in each of two working directories."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(CONFIG)]
    start += ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    running = [
        subprocess.Popen(
            [*start, "--machine_rank", str(rank), "-m", "resa_hf.cli", *words], cwd=place, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank, place in enumerate(places)
    ]  # fmt: skip
    printed = [process.communicate(timeout=280)[0] for process in running]
    return [process.returncode for process in running], printed


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory):
    """Both stages in two processes of one machine."""
    place = tmp_path_factory.mktemp("one")
    launch(["-m", "resa_hf.cli"], [*SAES, "saes"], cwd=place)
    launch(["-m", "resa_hf.cli"], [*TUNE, "saes"], cwd=place)
    return place


def test_two_machines_with_one_disk_give_what_one_machine_gives(one_machine, tmp_path):
    for words, files in (([*SAES, "saes"], "saes/layers.*/*.safetensors"), ([*TUNE, "saes"], ADAPTER)):
        codes, printed = on_two_machines(words, [tmp_path, tmp_path])
        assert codes == [0, 0], printed
        assert not any("does not see" in text for text in printed)
        assert_weights_agree(tmp_path, one_machine, files, atol=0)
    assert not list(tmp_path.glob("*/.seen-*"))
    codes, printed = on_two_machines([*TUNE, "saes", "--save_on_each_node", "--output_dir", "twice"], [tmp_path] * 2)
    said = "resa-hf tune: The machines share the disk of twice: leave save_on_each_node out."
    assert codes == [1, 1] and all(said in text for text in printed)


@pytest.mark.parametrize("flags", [[], ["--save_on_each_node"]], ids=["first", "each"])
def test_two_machines_with_a_disk_each(one_machine, tmp_path, flags, fault):
    places = [tmp_path / "first", tmp_path / "second"]
    for place in places:
        place.mkdir()
    words = [*TUNE, str(one_machine / "saes"), *flags]
    codes, printed = on_two_machines(words, places)
    assert codes == [0, 0], printed
    assert ["does not see" in text for text in printed] == [not flags, False]
    assert_weights_agree(places[0], one_machine, ADAPTER, atol=0)
    finished = (places[0] / "out/adapter_model.safetensors").stat().st_mtime_ns
    codes, printed = on_two_machines(words, places)
    assert codes == [0, 0] and not any("lost another one" in text for text in printed)
    assert (places[0] / "out/adapter_model.safetensors").stat().st_mtime_ns == finished
    # As if they had been stopped before the end.
    (places[0] / "out/report.json").unlink()
    codes, printed = on_two_machines(words, places)
    if not flags:
        assert codes == [1, 1]
        said = "resa-hf tune: Process 1 of 2 does not see out/checkpoint-2, from which the first one goes on."
        assert all(said in text and "resa_hf/cli.py" not in text for text in printed)
        told = next(line for line in printed[1].splitlines() if line.startswith(said))
        fault("two machines that share no disk, at resume", told=told, kept="the first one's checkpoint")
        shutil.copytree(places[0] / "out/checkpoint-2", places[1] / "out/checkpoint-2", dirs_exist_ok=True)
        codes, printed = on_two_machines(words, places)
    assert codes == [0, 0] and not any("random state" in text for text in printed), printed
    assert_weights_agree(places[0], one_machine, ADAPTER, atol=0)
    (places[0] / "out/report.json").unlink()
    (places[1] / "out/checkpoint-2/rng_state_1.pth").unlink()
    codes, printed = on_two_machines(words, places)
    assert codes == [0, 0] and "Process 1 of 2 does not find its random state in out/checkpoint-2" in printed[0]


def test_two_machines_with_a_disk_each_do_not_spread_saes(tmp_path):
    places = [tmp_path / "first", tmp_path / "second"]
    for place in places:
        place.mkdir()
    codes, printed = on_two_machines([*SAES, "saes"], places)
    said = "resa-hf train-sae: Process 1 of 2 does not see what the first one writes into saes. With spread_hookpoints"
    assert codes == [1, 1] and all(said in text for text in printed)
