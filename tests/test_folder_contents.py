"""What is found in a folder that is to be published, and whether an evaluation is of that adapter."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ModelFactory
from peft import PeftModel
from sae_files import make_sae
from safetensors.torch import load_file, save_file

from resa_hf.commands.recipe import parse_run
from resa_hf.errors import PublishError
from resa_hf.experiment.report import as_plain
from resa_hf.hub.folder_contents import find
from resa_hf.hub.matching_evaluation import evaluated_as, update_norms
from resa_hf.sae.checkpoint import save_sae

pytest_plugins = ("publishable",)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_the_arm_and_the_seed_of_a_run(run: Path) -> None:
    def more(report: Any) -> None:
        report["settings"]["run"]["seeds"] = [3, 0]
        (arm,) = report["settings"]["arms"]
        report["settings"]["arms"] += [{**arm, "name": "Other"}, {**arm, "name": "noise", "known": "weight_noise"}]
        line = report["arms"][-1]
        report["arms"] += [{**line, "name": "Other", "candidate": {"rate": 0.5, "step": 7}}]
        report["arms"] += [{**line, "name": "noise", "candidate": None}]

    (place,) = run.glob("arms/sae-tuning/*/seed-0")
    only = find(run)
    assert (only.adapter, only.record.arm, only.record.seed) == (place / "adapter", "SAE-Tuning", 0)
    edit(run / "report.json", more)
    with pytest.raises(PublishError, match="Several arms.*--arm: 'SAE-Tuning', 'Other', 'noise'"):
        find(run)
    with pytest.raises(PublishError, match="no arm 'mine'.*'SAE-Tuning', 'Other'"):
        find(run, arm="mine")
    with pytest.raises(PublishError, match="no seed 9; its seeds are 3, 0"):
        find(run, arm="Other", seed=9)
    # The first seed, and the learning rate and step that the report has chosen.
    chosen = run / "arms" / "other" / "5e-01" / "seed-3" / "step-7" / "adapter"
    shutil.copytree(place / "adapter", chosen)
    shutil.copytree(run / "sae" / "source" / "seed-0", run / "sae" / "source" / "seed-3")
    found = find(run, arm="Other")
    assert (found.adapter, found.record.arm, found.record.seed) == (chosen, "Other", 3)
    assert found.trained_with is not None and found.trained_with.saes == run / "sae" / "source" / "seed-3"
    with pytest.raises(PublishError, match="'noise' has no adapter"):
        find(run, arm="noise", seed=0)


def test_the_recipe_of_a_run_runs_again(run: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "again.yaml"
    recipe.write_text(yaml.safe_dump(dict(find(run).record.recipe)))
    again = as_plain(parse_run(["--config", str(recipe)], "test", "test"))
    before = json.loads((run / "report.json").read_text())["settings"]
    assert before["stage2"].pop("hub_token") == "hf_secret"  # which is told to nobody
    assert json.loads(json.dumps(again)) == before


def test_the_quality_of_the_saes_is_their_own_training_s(run: Path) -> None:
    found = find(run).trained_with
    assert found is not None and set(found.record.saes) == {"layers.1", "layers.2"}
    quality = json.loads((run / "sae" / "source" / "seed-0" / "stage1.json").read_text())["quality"]
    for hookpoint, facts in found.record.saes.items():
        assert (facts["d_in"], facts["num_latents"], facts["k"]) == (128, 256, 8)
        assert facts["fvu"] == quality[f"eval_fvu/{hookpoint}"] > 0
    # The source's SAE was not trained on the base.
    assert "source" in found.record.revisions and "base" not in found.record.revisions


def test_what_is_not_to_be_published(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, words in ((tmp_path / "none", "no folder"), (tmp_path / "empty", "neither adapter_config.json nor")):
        with pytest.raises(PublishError, match=words):
            find(folder)
    (tmp_path / "empty" / "report.json").write_text("[]")
    with pytest.raises(PublishError, match="not a report of resa-hf"):
        find(tmp_path / "empty")
    save_sae(make_sae(), tmp_path / "sae")
    with pytest.raises(PublishError, match="--arm and --seed choose among the arms of a run"):
        find(tmp_path / "sae", seed=1)
    with pytest.raises(PublishError, match="holds none"):
        find(tmp_path / "sae", evaluation=tmp_path / "report.json")


def evaluation_of(*adapters: tuple[str, Path], controls: tuple[tuple[str, Path], ...] = ()) -> dict[str, Any]:
    """What `resa-hf evaluate` would report of the sizes; the norms by numpy-like arithmetic of whole matrices."""

    def norms(folder: Path) -> dict[str, float]:
        tensors = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)
        return {
            key[len("base_model.model.") : -len(".lora_A.weight")]: float(
                (scale * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]).norm()
            )
            for key in tensors
            if key.endswith("lora_A.weight")
        }

    named = [{"name": name, "moved": {"update_norms": norms(folder)}} for name, folder in (*adapters, *controls)]
    groups = {
        group: [f"{name}={folder}" for name, folder in pairs]
        for group, pairs in (("adapters", adapters), ("controls", controls))
    }
    return {"settings": groups, "models": [{"name": "base", "moved": {}}, *named]}


def test_an_evaluation_must_be_of_this_very_adapter(adapter: Callable[..., Path], tmp_path: Path) -> None:
    mine, other = adapter("mine", lora_alpha=3, use_rslora=True), adapter("other", seed=1)
    path = tmp_path / "report.json"
    both = evaluation_of(("mine", mine), ("other", other))
    assert evaluated_as(mine, both, path) == "mine" and evaluated_as(other, both, path) == "other"
    # Folders move, and trained again they hold something else.
    moved = Path(shutil.copytree(mine, tmp_path / "moved"))
    assert evaluated_as(moved, both, path) == "mine"
    weights = moved / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = sorted(tensors)[0]
    save_file({**tensors, key: 1.01 * tensors[key]}, weights)
    with pytest.raises(PublishError, match="not an evaluation of .*moved: it evaluates mine, other"):
        evaluated_as(moved, both, path)
    # A random adapter of the same sizes is a control, and not this one.
    as_large = evaluation_of(("mine", mine), controls=(("random", mine),))
    assert evaluated_as(mine, as_large, path) == "mine"
    with pytest.raises(PublishError, match="of several adapters"):
        evaluated_as(mine, evaluation_of(("a", mine), ("b", mine)), path)
    served = evaluation_of(("mine", mine))
    served["models"][1]["moved"] = {}
    with pytest.raises(PublishError, match="on a server, which does not tell the weights"):
        evaluated_as(mine, served, path)
    with pytest.raises(PublishError, match="not a report of resa-hf evaluate"):
        evaluated_as(mine, {"models": []}, path)


def test_sizes_of_updates_are_those_that_movement_measures(
    adapter: Callable[..., Path], make_model: ModelFactory
) -> None:
    from resa_hf.evaluation.movement import lora_updates

    folder = adapter()
    model = PeftModel.from_pretrained(make_model("qwen2"), folder)
    assert update_norms(folder) == pytest.approx({update.name: update.norm() for update in lora_updates(model)})


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_of_single_modules(
    adapter: Callable[..., Path], make_model: ModelFactory, rslora: bool
) -> None:
    from resa_hf.evaluation.movement import lora_updates

    patterns = {"rank_pattern": {"0.self_attn.q_proj": 4}, "alpha_pattern": {"v_proj": 32}}
    folder = adapter(use_rslora=rslora, **patterns)
    model = PeftModel.from_pretrained(make_model("qwen2"), folder)
    assert len({update.scaling for update in lora_updates(model)}) == 3
    assert update_norms(folder) == pytest.approx({update.name: update.norm() for update in lora_updates(model)})


def test_an_evaluation_of_files_that_are_damaged(adapter: Callable[..., Path], tmp_path: Path) -> None:
    folder = adapter()
    weights = folder / "adapter_model.safetensors"
    evaluation = evaluation_of(("mine", folder))
    tensors = load_file(weights)
    save_file({key: tensor for key, tensor in tensors.items() if "lora_B" not in key}, weights)
    with pytest.raises(PublishError, match="and no .*lora_B.weight"):
        evaluated_as(folder, evaluation, tmp_path / "report.json")
    weights.write_bytes(b"\x80\x04pickle")
    with pytest.raises(PublishError, match="pickle"):
        evaluated_as(folder, evaluation, tmp_path / "report.json")


def test_an_adapter_that_was_tuned_with_an_sae_that_lies_here(adapter: Callable[..., Path], tmp_path: Path) -> None:
    saes = tmp_path / "saes"
    save_sae(make_sae("layers.1"), saes / "layers.1")
    trained = {"settings": {"hookpoints": ["layers.1"], "seed": 3}, "held_out": {"eval_fvu/layers.1": 0.25}}
    read = {"base": {"name": "you/base", "commit": "a" * 40}}
    (saes / "report.json").write_text(json.dumps({**trained, "revisions": read}))
    folder = adapter()
    settings = {"sae": str(saes / "layers.1"), "max_steps": 2}
    (folder / "report.json").write_text(json.dumps({"settings": settings, "held_out": {}, "revisions": read}))
    found = find(folder)
    assert found.record.recipe == settings and found.trained_with is not None
    sae = found.trained_with
    assert (sae.saes, sae.report, sae.record.seed) == (saes / "layers.1", saes, 3)
    sizes = {"d_in": 8, "num_latents": 24, "k": 4, "hook_name": "blocks.1.hook_resid_post"}
    assert sae.record.saes == {"layers.1": {**sizes, "fvu": 0.25}}
    assert find(saes).record.recipe == trained["settings"] and find(saes).saes == saes
    # The SAE is gone: what is known of the adapter is still known.
    shutil.rmtree(saes)
    assert find(folder).trained_with is None


def test_reports_of_another_version(run: Path) -> None:
    edit(run / "report.json", lambda report: report["settings"]["arms"][0].update(unknown=1))
    with pytest.raises(PublishError, match="damaged, or of another version.*unknown"):
        find(run)
