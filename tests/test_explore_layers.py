"""What results say of the layers, from reports that the commands have really written."""

import json

import pytest
from explore_pages import Fragment
from small_sweep import recipe, write

from resa_hf.cli import main
from resa_hf.explore.layers import layers_html
from resa_hf.explore.results import adapters_of, find_results, recipe_of, saes_of
from resa_hf.models import load_causal_lm
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.checkpoint import save_sae

PROMPT = "think in <think> and </think> then answer in <answer> and </answer>"
HOOKPOINTS = ["layers.1", "layers.2"]
TITLES = ["Reasoning latents by layer", "Quality of the SAEs by layer", "Scores by layer"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a features report and a sweep over two layers."""
    root = tmp_path_factory.mktemp("runs")
    width = load_causal_lm("resa_hf/tiny/source").config.hidden_size
    for seed, hookpoint in enumerate(HOOKPOINTS):
        save_sae(TopKSAE(width, 256, 40, hookpoint=hookpoint, seed=seed), root / "saes" / hookpoint)
    flags = (
        f"--model_name_or_path resa_hf/tiny/source --saes {root}/saes --dtype float32 --dataset tiny-reasoner "
        "--limit 40 --held_out 6 --template chat --pack false --max_length 128 --passages 2 --problems 0 --nulls 2 "
        f"--tested 1 --examples 1 --output_dir {root}/latents"
    )
    assert main(["features", *flags.split(), "--prompt", PROMPT]) == 0
    grid = {"grid": {"hookpoint": HOOKPOINTS}, "features": {"prompt": PROMPT, "components": 1}}
    assert main(["sweep", "--config", str(write(root / "sweep.yaml", recipe(root / "sweep", **grid)))]) == 0
    return root


@pytest.mark.slow
def test_tables_and_pictures_of_all_that_is_measured_by_layer(runs):
    results = find_results([runs])
    assert [result.kind for result in results] == ["features", "sweep"]
    page = Fragment(layers_html(results))
    assert page.by_tag["h2"] == TITLES and not [text for text in page.by_tag["p"] if "No result here" in text]
    assert page.by_tag["h3"] == ["latents, features", "latents, features", "sweep, sweep", "sweep, sweep"]
    cells = page.by_tag["td"]
    latents, sweep = (json.loads((runs / name / "report.json").read_text()) for name in ("latents", "sweep"))
    (point,) = [point for point in sweep["points"] if point["values"] == {"hookpoint": "layers.2"}]
    measured = json.loads((runs / "sweep" / point["folder"] / "report.json").read_text())["sae_quality"]["source"]
    for value in (
        f"{latents['quality']['layers.2']['fvu']:.4g}",
        f"{latents['layers'][1]['prose']['mean']:.2f}",
        f"{measured['fvu/layers.2']:.4g}",
        f"{100 * point['arms'][-1]['accuracy']['estimate']:.1f}",
        f"{sum(sweep['layers']['SAE-Tuning']['features'][1]):.4g}",
    ):
        assert value in cells
    pictures = [(image["class"], image["alt"][:18]) for image in page.all("img")]
    names = ["Reasoning latents ", "Quality of the SAE", "SAE-Tuning: accura"]
    assert pictures == [(theme, name) for name in names for theme in ("only-light", "only-dark")]


@pytest.mark.slow
def test_what_a_real_sweep_offers(runs):
    (sweep,) = [result for result in find_results([runs]) if result.kind == "sweep"]
    assert list(adapters_of(sweep)) == [f"SAE-Tuning, hookpoint-{name} (sweep, sweep)" for name in HOOKPOINTS]
    assert all((path / "adapter_model.safetensors").is_file() for path in adapters_of(sweep).values())
    (saes,) = saes_of(sweep).values()
    assert {path.name for path in saes.iterdir() if path.is_dir()} >= set(HOOKPOINTS)
    assert "prompt: think in <think>" in recipe_of(sweep)  # its section `features`


def test_a_sentence_names_the_command_where_something_is_missing():
    page = Fragment(layers_html([]))
    assert page.by_tag["h2"] == TITLES and not page.all("h3")
    assert page.text.count("No result here") == 3
    commands = [text for text in page.by_tag["code"] if text.startswith("resa-hf")]
    assert commands == ["resa-hf features", "resa-hf train-sae", "resa-hf features", "resa-hf sweep"]


def test_a_damaged_report_does_not_keep_the_others_from_the_page(tmp_path):
    stage = {"settings": {"hookpoints": []}, "held_out": {"eval_fvu/layers.1": 0.25, "eval_l0/layers.1": 8.0}}
    for name, held_out in (("a", {"eval_fvu/layers.1": "<b>"}), ("b", stage["held_out"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(stage | {"held_out": held_out}))
    page = Fragment(layers_html(find_results([tmp_path])))
    assert page.by_tag["h3"] == ["a, train-sae", "b, train-sae"] and "a, train-sae is damaged" in page.text
    assert page.by_tag["td"].count("0.25") == 1
