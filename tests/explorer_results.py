"""Small results of every kind that the explorer shows, made by the package's own commands.

PYTHONPATH=tests python tests/explorer_results.py FOLDER
"""

import sys
from pathlib import Path

from small_sweep import recipe, write

from resa_hf.cli import main

PROMPT = "User: 7*4-2+8 mod 10\nAssistant: <think>7*4=8;8-2=6;6+8=4</think><answer>4</answer>"
ARMS = {"SAE-Tuning": {"sae_from": "source"}, "control - noise": {"sae_from": "source", "control": "noise"}}


def make_results(root: Path) -> None:
    """Makes, in a folder, `run` with two arms and two seeds, `sweep` over two layers, `features` of the run's SAEs."""
    root.mkdir(parents=True, exist_ok=True)
    run, sweep, features = root / "run", root / "sweep", root / "features"
    small = recipe(run, seeds=[0, 1], arms=ARMS)
    small["stage1"] |= {"hookpoints": ["layers.1", "layers.2"]}
    small["stage2"] |= {"sae_id": "layers.2"}
    _make("run", root, small)
    grid = {"hookpoint": ["layers.1", "layers.2"]}
    _make("sweep", root, recipe(sweep, grid=grid, features={"prompt": PROMPT, "components": 1}))
    reading = {
        "model_name_or_path": "resa_hf/tiny/source", "dtype": "float32", "saes": str(run / "sae/source/seed-0"),
        "dataset": "tiny-reasoner", "limit": 60, "held_out": 8, "template": "chat", "pack": False, "max_length": 64,
        "prompt": PROMPT, "components": 1, "passages": 4, "tested": 2, "problems": 8, "nulls": 2, "answer_nulls": 2,
        "examples": 2, "max_new_tokens": 24, "batch_size": 8, "output_dir": str(features),
    }  # fmt: skip
    _make("features", root, reading)


def _make(command: str, root: Path, content: dict[str, object]) -> None:
    assert main([command, "--config", str(write(root / f"{command}.yaml", content))]) == 0


if __name__ == "__main__":
    make_results(Path(sys.argv[1]))
