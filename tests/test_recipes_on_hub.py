"""Recipes, unmodified, against the local Hub: tiny stand-ins under the real names, with the real schemas and commits.

Each is trained, published and evaluated, or trained by RL and read as a source; only dtype and steps are set by flags.
One of them here, and all, which takes hours, with RESA_ALL_RECIPES=1 (`make test-recipes`). The tiny reasoner's need
no Hub and are tested elsewhere.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer
from safetensors.torch import load_file
from stand_in_data import serve_datasets

from resa_hf.cli import main as resa_hf
from resa_hf.models import load_causal_lm

pytest.importorskip("lighteval")

from stand_ins import ANSWERING, WIDE, Size, serve_models  # the benchmarks' prompts are lighteval's

RECIPES = Path(__file__).parents[1] / "recipes"
ALL = sorted(path for path in RECIPES.glob("*/*/*.yaml") if path.parts[-3] != "tiny-reasoner")
ONE = RECIPES / "deepseek-r1-distill-qwen-1.5b/run/resa-still-v1.yaml"
CHOSEN = ALL if os.environ.get("RESA_ALL_RECIPES") else [ONE]
STEPS = {"stage1": "1", "stage2": "2"}
# A low-rank control stands for an SAE that is better than the mean activation: so many steps, on a wider model, and
# one of the recipe's seeds, or it takes an hour.
STEPS_TO_LEARN, ONE_SEED = "60", ["--seeds", "0"]
# Rows to train on, beside those that the recipe holds out: one chunk of 2,048 tokens or more. Of the questions that a
# stand-in answers itself, so many that those with a right answer are as much.
TRAIN_ROWS, ANSWERED_ROWS = 64, 256


@pytest.fixture
def serve(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`serve(recipe)` puts all that a recipe names on the Hub; it writes below `tmp_path`, where this process is."""
    monkeypatch.chdir(tmp_path)

    def put(recipe: Path) -> dict:
        settings = yaml.safe_load(recipe.read_text())
        answering = learns_from_answers(settings)
        size = ANSWERING if answering else WIDE if has_low_rank(settings) else Size()
        serve_models(hub, tmp_path / "made", recipe.read_text(), size)
        rows = settings.get("held_out", 0) + settings.get("selection", 0)
        serve_datasets(hub, rows + (ANSWERED_ROWS if answering else TRAIN_ROWS), one_answer=answering)
        return settings

    return put


def has_low_rank(settings: dict) -> bool:
    return any((arm or {}).get("control") == "low_rank" for arm in settings.get("arms", {}).values())


def learns_from_answers(settings: dict) -> bool:
    """Whether some of its answers to the training questions must be right, or differ in what they are worth."""
    return "reward_funcs" in settings or any("text" in (arm or {}) for arm in settings.get("arms", {}).values())


def run(recipe: Path, settings: dict) -> Path:
    """Runs a recipe as it is; returns its output folder."""
    kind = recipe.parent.name
    command = {"sae": "train-sae", "rl": "train-rl"}.get(kind, kind)
    low_rank = has_low_rank(settings)
    numbers = STEPS | ({"stage1": STEPS_TO_LEARN} if low_rank else {})
    steps = [word for name in STEPS if name in settings for word in (f"--{name}.max_steps", numbers[name])]
    steps += ONE_SEED if low_rank else []
    steps = ["--max_steps", "1"] if kind in ("sae", "tune") else steps
    steps = ["--max_steps", "2", "--checkpoints", "1", "2"] if kind == "rl" else steps
    assert resa_hf([command, "--config", str(recipe), "--dtype", "float32", *steps]) == 0
    return Path(settings["output_dir"])


def publish(folder: Path, settings: dict, *, adapter: bool = True) -> tuple[str | None, str | None]:
    """Publishes the first arm's adapter, and the SAEs if the recipe trained some; returns the repos' names."""
    own = settings["model_name_or_path"]
    prefix = "me/Llama-" if own.startswith("meta-llama/") else "me/"
    arms = [name for name, arm in settings.get("arms", {}).items() if "known" not in (arm or {})]
    trained = "stage1" in settings or not adapter
    repos = (f"{prefix}adapter" if adapter else None, f"{prefix}saes" if trained else None)
    flags = [
        word for flag, repo in zip(("--repo_id", "--sae_repo_id"), repos, strict=True) if repo for word in (flag, repo)
    ]
    flags += ["--arm", arms[0]] if arms else []
    assert resa_hf(["publish", "--folder", str(folder), *flags]) == 0
    return repos


def evaluate(recipe: Path, settings: dict, adapter: str, *flags: str) -> dict:
    """The model's own evaluation recipe, with the published adapter by its name."""
    home = {"deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": "deepseek-r1-distill-qwen-1.5b"}
    folder = home.get(settings.get("evaluate_on", ""), recipe.parts[-3])
    config = RECIPES / folder / "evaluate" / "benchmarks.yaml"
    flags = ("--dtype", "float32", "--adapters", f"mine={adapter}", *flags)
    assert resa_hf(["evaluate", "--config", str(config), *flags]) == 0
    output = Path(yaml.safe_load(config.read_text())["output_dir"])
    return json.loads((output / "report.json").read_text())


def check_published(hub: HubServer, settings: dict, adapter: str | None, saes: str | None) -> None:
    if adapter is not None:
        files = hub.files(adapter)
        config = json.loads(files["adapter_config.json"])
        assert config["base_model_name_or_path"] == settings["model_name_or_path"]
        card = files["README.md"].decode()
        assert settings["model_revision"] in card and settings["model_name_or_path"] in card
    if saes is not None:
        hookpoints = settings.get("grid", {}).get("hookpoint") or settings.get("stage1", settings)["hookpoints"]
        weights = {path for path in hub.files(saes) if path.endswith("sae_weights.safetensors")}
        assert weights == {f"{hookpoint}/sae_weights.safetensors" for hookpoint in hookpoints}


def check_source(folder: Path, settings: dict) -> None:
    """What the steps keep is an adapter of the model, and the second one moves it: the first is the warmup's zero."""
    first, second = (load_file(folder / "steps" / step / "adapter_model.safetensors") for step in ("1", "2"))
    assert len(second) == 2 * 7 * 28
    assert not any(weight.any() for name, weight in first.items() if "lora_B" in name)
    assert any(weight.any() for name, weight in second.items() if "lora_B" in name)
    # In float64, since the first steps of a warmup are smaller than what float32 can tell from the weights.
    base = load_causal_lm(
        settings["model_name_or_path"], revision=settings["model_revision"], dtype=torch.float64
    ).state_dict()
    source = load_causal_lm(str(folder / "steps" / "2"), dtype=torch.float64).state_dict()
    assert {name for name in base if not torch.equal(base[name], source[name])} <= {
        f"{name.removeprefix('base_model.model.').partition('.lora')[0]}.weight" for name in second
    }
    assert any(not torch.equal(base[name], source[name]) for name in base)


@pytest.mark.long
@pytest.mark.parametrize("recipe", CHOSEN, ids=lambda path: "/".join(path.parts[-3:]))
def test_a_recipe_on_the_local_hub(recipe: Path, hub: HubServer, serve, tmp_path: Path) -> None:
    kind = recipe.parent.name
    if kind == "evaluate":
        # It needs an adapter: one of a row of the same model.
        row = recipe.parents[1] / "run" / "resa-still-v5.yaml"
        settings = serve(row)
        adapter, _ = publish(run(row, settings), settings)
        report = evaluate(recipe, settings, adapter)
        assert {name: len(found) for name, found in tasks(report).items()} == {"base": 6, "mine": 6}
        return
    settings = serve(recipe)
    if kind == "tune":
        # Its SAE is the output of the Stage I recipe of the same name.
        stage1 = recipe.parents[1] / "sae" / recipe.name
        run(stage1, yaml.safe_load(stage1.read_text()))
    folder = run(recipe, settings)
    if kind == "rl":
        check_source(folder, settings)
        return
    report = json.loads((folder / "report.json").read_text())
    if kind == "sweep":
        # Its points are runs; one of them is published.
        assert len(report["points"]) > 1 and not report["failed"]
        folder = folder / report["points"][-1]["folder"]
    adapter, saes = publish(folder, settings, adapter=kind != "sae")
    check_published(hub, settings, adapter, saes)
    if adapter is not None:
        report = evaluate(recipe, settings, adapter, "--samples", "1", "--max_problems", "4")
        assert tasks(report).keys() == {"base", "mine"}


def tasks(report: dict) -> dict[str, dict]:
    """By model what its report tells of each task."""
    return {model["name"]: model["tasks"] for model in report["models"]}
