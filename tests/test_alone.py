"""Two commands in one output folder: the second is refused, and a killed one is not in the way."""

import os
import signal
import time
from pathlib import Path

import pytest
from small_sweep import recipe, write

from resa_hf.cli import main as resa_hf
from resa_hf.errors import DataError
from resa_hf.experiment.folder import alone_in
from resa_hf.experiment.manifest import note_start


def holder(folder: Path) -> int:
    """A process that works in the folder until it is killed."""
    child = os.fork()
    if not child:
        try:
            with alone_in(folder):
                note_start(folder, {})
                time.sleep(60)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 30
    while not (folder / "manifest.json").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return child


def test_a_second_is_refused_until_the_first_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = holder(tmp_path)
    try:
        told = rf"Another command is at work in {tmp_path} \(process {child} on .*, started 20.*another --output_dir"
        with pytest.raises(DataError, match=told), alone_in(tmp_path):
            pass
        monkeypatch.setenv("RANK", "1")  # beside the process of rank 0 that holds it
        with alone_in(tmp_path):
            pass
        monkeypatch.delenv("RANK")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for _ in range(2):
        with alone_in(tmp_path):
            pass


@pytest.mark.parametrize("command", ["run", "compare", "train-sae", "tune", "train-rl", "evaluate", "features"])
def test_each_command_says_so_and_touches_nothing(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "there"
    run = recipe(folder, arms={"one": {}, "two": {"control": "random_sae"}})
    base = {key: run[key] for key in ("model_name_or_path", "output_dir")}
    data = base | {key: run[key] for key in ("dataset", "limit", "held_out", "template")}
    content = {
        "run": run,
        "compare": run,
        "train-sae": data | {"hookpoints": ["layers.2"]},
        "tune": data | {"sae": str(tmp_path)},
        "train-rl": data,
        "evaluate": base | {"adapters": [f"one={tmp_path}"], "tasks": ["tiny-reasoner"]},
        "features": data | {"saes": str(tmp_path), "prompt": "x", "problems": 4},
    }[command]
    config = write(tmp_path / "recipe.yaml", content)
    with alone_in(folder):
        before = {path.name for path in folder.iterdir()}
        assert resa_hf([command, "--config", str(config)]) == 2
        assert f"resa-hf {command}: Another command is at work in {folder}." in capsys.readouterr().err
        assert {path.name for path in folder.iterdir()} == before
