"""Results as the explorer shows them: what is found, what is shown, and what a stranger's report cannot do."""

import base64
import json
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from card_reports import run_report
from explore_pages import PNG, Fragment
from test_page import HOSTILE

from resa_hf.commands.grid import parse_sweep
from resa_hf.commands.recipe import parse_flat, parse_run
from resa_hf.errors import ExploreError
from resa_hf.evaluation.arguments import EvaluateArguments
from resa_hf.experiment.arms import Arm
from resa_hf.experiment.report import as_plain
from resa_hf.experiment.settings import RunArguments
from resa_hf.experiment.sweep import FeatureSettings
from resa_hf.explore.results import Result, adapters_of, find_results, hub_result, recipe_of, result_html, saes_of
from resa_hf.features.arguments import FeatureArguments

RECIPES = Path(__file__).parents[1] / "recipes"
ARMS = [Arm("ours"), Arm("known", "none", known="zero_adapter")]
STAGE = {"settings": {"hookpoints": ["layers.1"]}, "held_out": {"eval_fvu/layers.1": 0.25}}
STAGE |= {"costs": {"Stage I": {"seconds": 3.0, "tokens": 4000}}}
HEAVY = ("torch", "transformers", "peft", "sae_lens", "scipy", "matplotlib", "datasets")


def write(folder, report, text=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))
    if text is not None:
        (folder / "report.md").write_text(text)
    return folder


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


def shown(folder, text, **report):
    write(folder, STAGE | report, text)
    return Fragment(result_html(find_results([folder])[0]))


def as_text(folder):
    """A report of some command, whose text is what matters."""
    return Result("x, run", "run", folder, {})


def test_importing_it_waits_for_nothing_heavy():
    code = f"import sys, resa_hf.explore.layers; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_reports_are_found_in_folders_and_in_those_inside_them(tmp_path):
    run_report(tmp_path / "runs" / "one", {"ours": 0.7}, arms=ARMS[:1])
    run_report(tmp_path / "runs" / "two", {"ours": 0.7}, arms=ARMS)
    write(tmp_path / "runs" / "saes", STAGE)
    write(tmp_path / "runs" / "tuned", {"settings": {}, "held_out": {}})
    write(tmp_path / "runs" / "evaluated", {"settings": {}, "models": [{"name": "base"}]})
    write(tmp_path / "runs" / "latents", {"layers": [], "tested": {}, "settings": {"saes": "nowhere"}})
    write(tmp_path / "runs" / "deeper" / "still", STAGE)
    sweep = write(tmp_path / "sweep", {"grid": {}, "points": []})
    write(sweep / "k-1", STAGE)
    (sweep / "k-1" / "shared.json").write_text('{"stage1": "a", "base": "b"}')
    found = find_results([tmp_path / "runs", sweep, tmp_path / "none", tmp_path / "runs" / "two", tmp_path])
    kinds = {"evaluated": "evaluate", "latents": "features", "one": "run", "saes": "train-sae", "tuned": "tune"}
    assert {result.folder.name: result.kind for result in found} == kinds | {"two": "compare", "sweep": "sweep"}
    assert "two, compare" in [result.label for result in found]


def test_two_results_never_share_a_label(tmp_path):
    for place in ("a", "b", "c"):
        write(tmp_path / place / "saes", STAGE)
    labels = [result.label for result in find_results([tmp_path / place for place in ("a", "b", "c")])]
    assert labels == ["saes, train-sae", "saes, train-sae (2)", "saes, train-sae (3)"]


@pytest.mark.parametrize(
    "content",
    [
        b"{", b"[]", b"", b"\xff\xfe", b"[" * 100_000, b'{"arms": []}', b'{"settings": [], "arms": []}',
        b'{"loss": 1}', b'{"settings": {"run": {}}, "arms": [{"name": "x"}, 5]}', b'{"grid": {}, "points": [{}]}',
        b'{"settings": {}, "models": 7}', b'{"layers": [], "tested": {}}',
        b'{"settings": {"run": {"seeds": []}, "arms": []}, "arms": []}',
    ],
)  # fmt: skip
def test_a_damaged_report_is_left_out_with_a_warning(tmp_path, content):
    write(tmp_path / "damaged", {})
    (tmp_path / "damaged" / "report.json").write_bytes(content)
    write(tmp_path / "sound", STAGE)
    with pytest.warns(UserWarning, match="damaged is left out"):
        found = find_results([tmp_path])
    assert [result.label for result in found] == ["sound, train-sae"]


def test_the_adapters_of_a_run_are_the_chosen_ones_of_the_first_seed(tmp_path):
    arms = [*ARMS, Arm("control", tuning={"control": "noise"}), Arm("gone")]
    run_report(tmp_path / "two", {"ours": 0.7}, arms=arms, seeds=(3, 4))
    places = ["ours/1e-04/seed-3", "ours/1e-04/seed-4", "ours/1e-03/seed-3", "control/1e-04/seed-3"]
    for place in (*places, "known/untrained/seed-3"):
        touch(tmp_path / "two" / "arms" / place / "adapter" / "adapter_config.json")
    (result,) = find_results([tmp_path])
    wanted = {"ours": places[0], "known": "known/untrained/seed-3", "control": places[3]}
    root = tmp_path / "two" / "arms"
    assert adapters_of(result) == {
        f"{name} (two, compare)": root / place / "adapter" for name, place in wanted.items()
    }
    touch(tmp_path / "two" / "sae" / "source" / "seed-3" / "layers.1" / "cfg.json")
    assert saes_of(result) == {"SAEs of the source (two, compare)": tmp_path / "two" / "sae" / "source" / "seed-3"}


def test_the_adapters_and_saes_of_other_commands(tmp_path):
    for name in ("tuned", "kept"):
        touch(tmp_path / name / "adapter_config.json")
    touch(tmp_path / "saes" / "layers.1" / "cfg.json")
    write(tmp_path / "tuned", {"settings": {}, "held_out": {}})
    write(tmp_path / "saes", STAGE)
    write(tmp_path / "latents", {"layers": [], "tested": {}, "settings": {"saes": str(tmp_path / "saes")}})
    models = [{"name": "base"}, {"name": "kept", "adapter": {"name": str(tmp_path / "kept"), "commit": None}}]
    models += [{"name": "from the Hub", "adapter": {"name": "owner/adapter", "commit": "a" * 40}}, {"name": "served"}]
    write(tmp_path / "evaluated", {"settings": {}, "models": models})
    adapters, saes = {}, {}
    for result in find_results([tmp_path]):
        adapters |= adapters_of(result)
        saes |= saes_of(result)
    assert adapters == {
        "kept (evaluated, evaluate)": tmp_path / "kept",
        "adapter (tuned, tune)": tmp_path / "tuned",
    }
    assert saes == dict.fromkeys(("SAEs (latents, features)", "SAEs (saes, train-sae)"), tmp_path / "saes")


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("place", ["{}", "| a |\n|---|\n| {} |", "# {}", "- {}", "`{}`", "```\n{}\n```", "> {}"])
def test_what_somebody_wrote_is_text(tmp_path, text, place):
    (tmp_path / "report.md").write_text(place.replace("{}", text))
    page = Fragment(result_html(as_text(tmp_path)))
    if "&lt;" not in text:  # an entity is the letter it stands for
        assert all(word in page.text for word in text.replace("\n", " ").split())


def test_what_somebody_named_is_text_also_without_a_text(tmp_path):
    run_report(tmp_path, dict.fromkeys(HOSTILE, 0.7), arms=[Arm(name) for name in HOSTILE], dataset=HOSTILE[0])
    (tmp_path / "report.md").unlink()
    (result,) = find_results([tmp_path])
    assert Fragment(result_html(result)).text.count("Verdict:") == len(HOSTILE)
    assert yaml.safe_load(recipe_of(result))["arms"] == {name: {"sae_from": "source"} for name in HOSTILE}


@pytest.mark.parametrize(
    "address",
    [
        "https://evil.example/p.png", "//evil.example/p.png", "data:image/png;base64,AAAA", "../secret.png",
        "pictures/../../secret.png", "..%2Fsecret.png", "/etc/secret.png", "file:///etc/secret.png", "link.png",
        "text.png", "missing.png", "report.json", "pictures/pictures/deep.png", "a\\..\\secret.png",
    ],
)  # fmt: skip
def test_a_picture_from_elsewhere_is_its_text(tmp_path, address):
    for place in ("secret.png", "result/pictures/pictures/deep.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(PNG)
    (tmp_path / "result" / "text.png").write_text("<svg onload=alert(1)>")
    (tmp_path / "result" / "link.png").symlink_to(tmp_path / "secret.png")
    page = shown(tmp_path / "result", f"![the <b>picture](<{address}>)")
    assert not page.all("img") and "the <b>picture" in page.text


def test_pictures_are_shown_in_light_and_dark_each_once(tmp_path):
    names = ("report.png", "pictures/counts.png", "pictures/counts-dark.png")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PNG + name.encode())
    page = shown(tmp_path, '![both](report.png)\n\n![say "x"](pictures/counts.png)\n\n![again](report.png)')
    images = page.all("img")
    assert [(image["class"], image["alt"]) for image in images] == [
        ("", "both"), ("only-light", 'say "x"'), ("only-dark", 'say "x"')
    ]  # fmt: skip
    assert [base64.b64decode(image["src"].partition(",")[2])[8:].decode() for image in images] == list(names)
    assert "again" in page.text and [wide["tabindex"] for wide in page.all("span")] == ["0", "0"]


def test_a_text_of_any_length_is_cut(tmp_path):
    page = shown(tmp_path, "*a _b " * 200_000)
    assert 100_000 < len(page.text) < 250_000 and page.text.rstrip().endswith("…")


def test_paths_of_this_machine_are_not_shown(tmp_path):
    settings = STAGE["settings"] | {"saes": "/home/me/secret/saes", "output_dir": "/home/me/out", "hub_token": "hf_x"}
    text = "read /home/me/secret/saes, wrote /home/me/out, 1/2/3 and owner/name"
    page = shown(tmp_path, text, settings=settings)
    assert page.text.strip() == "read saes, wrote out, 1/2/3 and owner/name"
    recipe = recipe_of(find_results([tmp_path])[0])
    assert "home" not in recipe and "hf_x" not in recipe and "hub_token" not in recipe
    assert yaml.safe_load(recipe) == {"hookpoints": ["layers.1"], "saes": "saes", "output_dir": "out"}


def from_report(folder, report):
    """The recipe as a user gets it, in a file."""
    (result,) = find_results([write(folder, report)])
    (folder / "recipe.yaml").write_text(recipe_of(result), encoding="utf-8")
    return ["--config", str(folder / "recipe.yaml")]


def plain_run(settings):
    plain = as_plain(settings)
    return plain | {"run": plain["run"] | {"output_dir": Path(plain["run"]["output_dir"]).name}}


@pytest.mark.parametrize(
    "path", sorted(RECIPES.glob("*/run/*.yaml")) + sorted(RECIPES.glob("*/compare/*.yaml")), ids=str
)
def test_the_recipe_of_a_run_is_the_run(path, tmp_path):
    own = ["--dataset", "mine.jsonl"] if path.name == "own_data.yaml" else []
    settings = parse_run(["--config", str(path), "--output_dir", "/home/me/runs/x", *own], "run", "")
    argv = from_report(tmp_path, {"settings": as_plain(settings), "arms": [{"name": "base"}]})
    assert plain_run(parse_run(argv, "run", "")) == plain_run(settings)
    assert "/home" not in (tmp_path / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    "features", [None, FeatureSettings(), FeatureSettings("<think> </think>", ["<think>", "</think>"], 3)]
)
def test_the_recipe_of_a_sweep_is_the_sweep(tmp_path, features):
    sweep = parse_sweep(["--config", str(RECIPES / "tiny-reasoner/sweep/layers.yaml")], "sweep", "")
    points = [{"folder": point.root.name, "settings": as_plain(point.settings)} for point in sweep.points]
    grid = {"hookpoint": [point.values["hookpoint"] for point in sweep.points]}
    report = {"grid": grid, "points": points, "features": features and asdict(features)}
    again = parse_sweep(from_report(tmp_path, report), "sweep", "")
    assert [point.values for point in again.points] == [point.values for point in sweep.points]
    assert [plain_run(point.settings) for point in again.points] == [
        plain_run(point.settings) for point in sweep.points
    ]
    assert again.features == features


def test_the_recipe_of_features_is_those_settings(tmp_path):
    path = RECIPES / "tiny-reasoner/features/layers.yaml"
    (args,), _ = parse_flat((FeatureArguments,), ["--config", str(path)], "features", "")
    argv = from_report(tmp_path, {"layers": [], "tested": {}, "settings": vars(args)})
    assert parse_flat((FeatureArguments,), argv, "features", "")[0] == (args,)


@pytest.mark.parametrize("kind", [RunArguments, FeatureArguments, EvaluateArguments])
def test_no_setting_means_something_by_none_but_its_default(kind):
    hints = get_type_hints(kind)
    optional = [field for field in fields(kind) if type(None) in get_args(hints[field.name])]
    assert optional and all(field.default is None for field in optional)


def published(hub, tmp_path, **files):
    report = run_report(tmp_path / "made", {"ours": 0.75}, arms=ARMS[:1])
    there = {"report.json": json.dumps(report), "report.png": PNG + b"!", "README.md": "# card"}
    hub.create_repo("me/adapter", files=there | files)
    return report


def test_a_published_report_by_its_name(hub, tmp_path):
    report = published(hub, tmp_path)
    result = hub_result(" me/adapter@main ")
    assert (result.repo, result.kind, dict(result.report)) == ("me/adapter@main", "run", report)
    page = Fragment(result_html(result))
    ours = report["arms"][1]
    assert f"{100 * ours['accuracy']['estimate']:.1f}" in page.by_tag["td"]
    assert ours["verdict"]["word"] in page.by_tag["td"] and ours["verdict"]["word"] == "better"
    assert base64.b64decode(page.all("img")[0]["src"].partition(",")[2]) == PNG + b"!"
    assert yaml.safe_load(recipe_of(result))["dataset"] == "owner/questions"


def test_a_report_of_the_hub_names_no_file_of_this_machine(hub, tmp_path):
    touch(tmp_path / "saes" / "layers.1" / "cfg.json")
    touch(tmp_path / "mine" / "adapter_config.json")
    models = [{"name": "base"}, {"name": "x", "adapter": {"name": str(tmp_path / "mine")}}]
    points = [{"folder": "../../../../mine", "stage1": "..", "base": ".."}]
    for number, report in enumerate((
        {"layers": [], "tested": {}, "settings": {"saes": str(tmp_path / "saes")}},
        {"models": models, "settings": {}},
        {"grid": {}, "points": points, "settings": {}},
    )):  # fmt: skip
        hub.create_repo(f"me/hostile-{number}", files={"report.json": json.dumps(report)})
        result = hub_result(f"me/hostile-{number}")
        assert adapters_of(result) == {} and saes_of(result) == {}
        if result.kind == "features":  # which has nothing to tell, and tells it
            assert str(tmp_path) not in result_html(result)
            continue
        with pytest.raises(ExploreError, match="is damaged, or of another version") as raised:
            result_html(result)
        assert str(tmp_path) not in str(raised.value)


def test_a_repository_without_a_report_says_what_its_card_says(hub):
    hub.create_repo("me/other", files={"README.md": "---\nlicense: mit\n---\n\n# Other\n\n<b>Made</b> otherwise."})
    with pytest.raises(ExploreError, match=r"me/other holds no report.json.* says: # Other <b>Made</b> otherwise\.$"):
        hub_result("me/other")
    hub.create_repo("me/bare", files={"config.json": "{}"})
    with pytest.raises(ExploreError, match="me/bare holds no report.json: .* no card either"):
        hub_result("me/bare")


@pytest.mark.parametrize(("name", "size"), [("report.json", 2**20), ("report.md", 2**21), ("report.png", 2**21)])
def test_files_that_are_too_large_are_not_downloaded(hub, tmp_path, name, size):
    published(hub, tmp_path, **{name: b" " * (size + 1)})
    with pytest.raises(ExploreError, match=rf"{name} of me/adapter has {size + 1:,} bytes; at most {size:,} are read"):
        hub_result("me/adapter")
    assert not [path for _, path in hub.requests if "resolve" in path]


def test_only_what_a_result_is_made_of_is_downloaded(hub, tmp_path):
    published(hub, tmp_path, **{"model.safetensors": b"weights", "README.md": b" " * 2**22, "other.png": PNG})
    hub_result("me/adapter")
    assert {Path(path).name for _, path in hub.requests if "resolve" in path} == {"report.json", "report.png"}


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', "[" * 5000, "{" + '"a":{' * 900 + "}" * 901])
def test_a_damaged_report_of_the_hub_is_told_so(hub, content):
    hub.create_repo("me/damaged", files={"report.json": content})
    with pytest.raises(ExploreError, match=r"^report.json of me/damaged (cannot be read|is not that of a command)"):
        hub_result("me/damaged")


@pytest.mark.parametrize("name", ["", "../..", "/etc", "~/x", "a/../b", "C:\\x", "datasets/a/b", "a b/c", "x" * 300])
def test_a_name_that_is_no_repository_is_refused(hub, name):
    with pytest.raises(ExploreError):
        hub_result(name)
    assert hub.requests == []


def test_a_report_with_any_number_of_adapters_is_no_work(hub, tmp_path):
    report = published(hub, tmp_path)
    many = report["arms"] + [report["arms"][1] | {"name": f"arm {i}"} for i in range(400)]
    hub.create_repo("me/many", files={"report.json": json.dumps(report | {"arms": many})})
    with pytest.raises(ExploreError, match="damaged"):
        result_html(hub_result("me/many"))
    long = report["settings"] | {"arms": [{"name": f"arm {i} {'x' * 999}"} for i in range(200)]}
    hub.create_repo("me/long", files={"report.json": json.dumps(report | {"settings": long})})
    with pytest.raises(ExploreError, match="damaged"):
        recipe_of(hub_result("me/long"))
