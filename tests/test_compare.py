"""`resa-hf compare` cut down: every control runs, checkpoints are chosen among, adapters move to a sibling."""

import json
import shutil

import pytest
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file

from resa_hf.cli import main
from resa_hf.commands.recipe import recipe_path
from resa_hf.evaluation.movement import lora_updates
from resa_hf.tiny import load_tiny_base, tiny_path
from resa_hf.tiny.sibling import make_sibling

pytestmark = pytest.mark.slow


def compare(recipe, folder, *flags):
    return main(
        ["compare", "--config", str(recipe), "--output_dir", str(folder), "--limit", "150", "--held_out", "30",
         "--selection", "10", "--stage2.max_steps", "3", "--processes", "1", *flags]
    )  # fmt: skip


def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_every_control_of_the_recipe(tmp_path):
    recipe = recipe_path("tiny-reasoner/compare/controls.yaml")
    folder = tmp_path / "run"
    assert compare(recipe, folder, "--seeds", "1", "--learning_rates", "1e-3") == 0
    arms = {arm["name"]: arm for arm in report(folder)["arms"]}
    assert set(yaml.safe_load(recipe.read_text())["arms"]) | {"base"} == set(arms)
    assert arms["zero adapter (known - no change)"]["by_seed"] == arms["base"]["by_seed"]
    assert arms["source (GRPO)"]["by_seed"] == pytest.approx(
        arms["source minus base as LoRA (known - gain)"]["by_seed"], abs=0.05
    )
    spliced = [arm for name, arm in arms.items() if name.startswith(("SAE-Tuning", "control"))]
    assert all(arm["initial_kl"] > 1e-3 and arm["without_sae"]["kl"] > 0 for arm in spliced if arm["initial_kl"])
    assert sum(arm["initial_kl"] is not None for arm in spliced) == 10
    assert set(report(folder)["sae_quality"]) == {"base", "source", "source-prose", "source-random"}

    # The random adapter changes each weight as much as the trained one, in another direction.
    norms, firsts = [], []
    for slug in ("sae-tuning-sae-of-source-flow", "control-random-adapter"):
        place = folder / "arms" / slug / "1e-03" / "seed-1" / "adapter"
        updates = list(lora_updates(PeftModel.from_pretrained(load_tiny_base(), place)))
        norms.append({update.name: (update.B @ update.A * update.scaling).norm().item() for update in updates})
        firsts.append(updates[0].A)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and min(norms[0].values()) > 0
    assert not firsts[0].equal(firsts[1])


@pytest.mark.long
def test_checkpoints_an_adapter_that_is_taken_and_a_sibling(tmp_path, capsys):
    pytest.importorskip("lighteval")
    make_sibling(tmp_path / "sibling", count=256)
    chains = tmp_path / "chains.jsonl"
    chains.write_text("".join(json.dumps({"problem": f"{a}+1*2-3 mod 10", "answer": "1"}) + "\n" for a in range(9)))
    recipe = yaml.safe_load(recipe_path("tiny-reasoner/run/own_data.yaml").read_text())
    recipe |= {
        "dataset": "tiny-reasoner",
        "checkpoints": [1, 3],
        "seeds": [0],
        "evaluate_on": str(tmp_path / "sibling"),
    }
    taken = shutil.copytree(tiny_path("source"), tmp_path / "taken")
    recipe["arms"] = {"SAE-Tuning": {}, "taken": {"adapter": str(taken)}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    folder = tmp_path / "run"
    assert compare(tmp_path / "recipe.yaml", folder) == 0
    found = report(folder)
    assert set(found["choice"]["SAE-Tuning"]) == {"lr 0.0001, step 1", "lr 0.0001, step 3"}
    places = [folder / "arms" / "sae-tuning" / "1e-04" / "seed-0" / f"step-{step}" for step in (1, 3)]
    early, late = (list(lora_updates(PeftModel.from_pretrained(load_tiny_base(), p / "adapter"))) for p in places)
    assert not early[0].B.equal(late[0].B)
    assert [arm["problems"] for arm in found["arms"]] == [30] * 3
    assert found["settings"]["run"]["evaluate_on"] == str(tmp_path / "sibling")

    # The same arms on a benchmark: nothing is trained again.
    recipe["tasks"] = [str(chains)]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert compare(tmp_path / "recipe.yaml", tmp_path / "tasks") == 0
    arms = report(tmp_path / "tasks")["arms"]
    assert [list(arm["tasks"]) for arm in arms] == [["resa:chains"]] * 3 and arms[0]["problems"] == 9

    # Trained again under the same name, the adapter does not get its old answers.
    tensors = load_file(taken / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, taken / "adapter_model.safetensors")
    assert compare(tmp_path / "recipe.yaml", tmp_path / "tasks") == 2
    assert "taken has changed since it answered" in capsys.readouterr().err


@pytest.mark.long
def test_a_checkpoint_behind_the_end_and_one_arm_alone(tmp_path, capsys):
    recipe = yaml.safe_load(recipe_path("tiny-reasoner/run/own_data.yaml").read_text())
    recipe |= {"dataset": "tiny-reasoner", "checkpoints": [50]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert compare(tmp_path / "recipe.yaml", tmp_path / "run") == 2
    assert "checkpoints names step 50, but Stage II has 3 steps" in capsys.readouterr().err
    del recipe["arms"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert compare(tmp_path / "recipe.yaml", tmp_path / "other") == 2
    assert "nothing to compare" in capsys.readouterr().err


@pytest.mark.long
def test_an_adapter_of_its_own_for_each_seed(tmp_path):
    """Seed 0 takes the source's adapter, seed 1 the same with its update doubled."""
    for seed in (0, 1):
        place = shutil.copytree(tiny_path("source"), tmp_path / f"taken-{seed}")
        weights = load_file(place / "adapter_model.safetensors")
        grown = {name: (1 + seed) * value if "lora_B" in name else value for name, value in weights.items()}
        save_file(grown, place / "adapter_model.safetensors")
    recipe = yaml.safe_load(recipe_path("tiny-reasoner/run/own_data.yaml").read_text())
    arms = {f"taken {name}": {"adapter": f"{tmp_path}/taken-{name}"} for name in (0, 1)}
    arms["each its own"] = {"adapter": f"{tmp_path}/taken-{{seed}}"}
    recipe |= {"dataset": "tiny-reasoner", "seeds": [0, 1], "arms": arms}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert compare(tmp_path / "recipe.yaml", tmp_path / "run") == 0
    moved = {}
    for slug in ("taken-0", "taken-1", "each-its-own"):
        places = [tmp_path / "run/arms" / slug / f"untrained/seed-{seed}" for seed in (0, 1)]
        moved[slug] = [json.loads((place / "movement.json").read_text())["update_norm"] for place in places]
        if slug == "each-its-own":
            read = [(place / "answers/held_out").glob("*.jsonl") for place in places]
            own = [next(paths).read_text().splitlines()[1:] for paths in read]
    assert moved["taken-1"][0] == pytest.approx(2 * moved["taken-0"][0], rel=1e-4)
    assert moved["each-its-own"] == [moved["taken-0"][0], moved["taken-1"][1]]
    for seed, lines in enumerate(own):
        (path,) = (tmp_path / f"run/arms/taken-{seed}/untrained/seed-{seed}/answers/held_out").glob("*.jsonl")
        assert path.read_text().splitlines()[1:] == lines
