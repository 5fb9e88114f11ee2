"""From a sweep's recipe to its points, each against the run that it stands for; and what they share."""

from dataclasses import replace

import pytest
from small_sweep import recipe, write

from resa_hf.commands.grid import parse_sweep
from resa_hf.commands.recipe import parse_run
from resa_hf.experiment.sweep import make_point


def points_of(tmp_path, *flags, **changes):
    path = write(tmp_path / "sweep.yaml", recipe(tmp_path / "out", **changes))
    return parse_sweep(["--config", str(path), *flags], "test", "").points


def run_of(tmp_path, *flags, **changes):
    path = write(tmp_path / "run.yaml", recipe(tmp_path / "out", **changes))
    return parse_run(["--config", str(path), *flags], "test", "")


def same(settings, other):
    """But for the folder."""
    placed = replace(other, run=replace(other.run, output_dir=settings.run.output_dir))
    return settings == placed


def test_points_are_the_product_in_the_recipes_order_and_each_is_the_run_with_those_values(tmp_path):
    grid = {"stage1.k": [4, 8], "lora_r": [2, 4], "sampling.top_p": [0.5]}
    points = points_of(tmp_path, "--stage2.max_steps", "7", "--limit", "50", grid=grid)
    expected = [(k, r) for k in (4, 8) for r in (2, 4)]
    assert [(point.values["stage1.k"], point.values["lora_r"]) for point in points] == expected
    for point, (k, r) in zip(points, expected, strict=True):
        flags = ["--stage1.k", str(k), "--lora_r", str(r), "--sampling.top_p", "0.5"]
        flags += ["--stage2.max_steps", "7", "--limit", "50"]
        assert same(point.settings, run_of(tmp_path, *flags))
        assert point.root == tmp_path / "out" / f"k-{k}_lora_r-{r}_top_p-0.5"
        assert point.settings.run.output_dir == str(point.root)


def test_a_hookpoint_is_the_saes_and_stage_1_trains_all_of_them(tmp_path):
    points = points_of(tmp_path, grid={"hookpoint": ["layers.1", "layers.3"]})
    for point, hookpoint in zip(points, ("layers.1", "layers.3"), strict=True):
        flags = ["--stage1.hookpoints", "layers.1", "layers.3", "--stage2.sae_id", hookpoint]
        assert same(point.settings, run_of(tmp_path, *flags))
        assert point.is_by_hookpoint
    assert len({point.stage1 for point in points}) == 1
    everywhere = points_of(tmp_path, grid={"hookpoint": "all"})
    assert [point.settings.stage2["sae_id"] for point in everywhere] == [f"layers.{i}" for i in range(4)]
    assert everywhere[0].settings.stage1["hookpoints"] == [f"layers.{i}" for i in range(4)]


def test_the_hookpoints_of_pretrained_saes_need_no_stage_1(tmp_path):
    points = points_of(tmp_path, grid={"hookpoint": ["layers.1", "layers.2"]}, sae="me/saes", stage1={})
    assert [point.settings.stage2["sae_id"] for point in points] == ["layers.1", "layers.2"]
    assert all("hookpoints" not in point.settings.stage1 for point in points)
    assert len({point.base for point in points}) == len({point.stage1 for point in points}) == 1


# What data, SAEs and the base's answers do not depend on, said here once more and by hand.
ADAPTER = {"lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "learning_rates", "checkpoints"}
ADAPTER |= {"sae", "sae_id", "sae_revision"}
JUDGING = {"choose_on_test", "margin", "rl_arm", "rl_seconds", "rl_gpus", "price_per_gpu_hour"}
PLACE = {"processes", "output_dir"}
ANSWERING = {"tasks", "file_prompt", "greedy"}
STAGE1 = {"source_model", "source_adapter", "source_revision", "trigger_dataset", "prose"}
OTHER = {
    "dtype": "bfloat16", "template": "paper", "pack": True, "seeds": [3], "file_prompt": "plain", "lora_r": 2,
    "lora_dropout": 0.1, "held_out": 9, "lora_target_modules": ["q_proj"], "learning_rates": [0.1], "checkpoints": [1],
    "choose_on_test": True, "margin": 0.1, "tasks": ["resa:aime24"], "greedy": True, "rl_arm": "SAE-Tuning",
    "rl_seconds": 3.0, "rl_gpus": 2, "price_per_gpu_hour": 1.0, "split_seed": 5, "selection": 6, "limit": 40,
    "lora_alpha": 2, "train_rows": 9,
}  # fmt: skip


def test_what_is_shared_by_points_that_differ_in_one_field(tmp_path):
    settings = run_of(tmp_path, arms={"SAE-Tuning": {"sae_from": "none", "kl_weight": 0.0, "sft_weight": 1.0}})
    one = make_point(tmp_path, {}, settings)
    for name in vars(settings.run).keys() - PLACE:
        value = OTHER.get(name, "something else")
        assert value != vars(settings.run)[name]
        other = make_point(tmp_path, {}, replace(settings, run=replace(settings.run, **{name: value})))
        assert (one.stage1 == other.stage1) == (name in ADAPTER | JUDGING | ANSWERING), name
        assert (one.base == other.base) == (name in ADAPTER | JUDGING | STAGE1 | {"train_rows"}), name


@pytest.mark.parametrize(
    ("field", "values", "stage1", "base"),
    [
        ("stage1.k", [2, 4], False, True),
        ("stage2.kl_beta", [0.0, 1.0], True, True),
        ("stage2.kl_reference", ["base", "source"], False, True),  # the source's special tokens are then looked at
        ("stage2.use_cpu", [True, False], True, False),
        ("sampling.temperature", [0.5, 1.0], True, False),
    ],
)
def test_what_is_shared_by_points_that_differ_in_a_section(tmp_path, field, values, stage1, base):
    one, other = points_of(tmp_path, grid={field: values})
    assert (one.stage1 == other.stage1, one.base == other.base) == (stage1, base)


def test_folders_names_are_readable_and_safe(tmp_path):
    adapters = ["Tina-Yi/R1-Distill-Qwen-1.5B-STILL/checkpoint-1", None, "../../up"]
    grid = {"source_adapter": adapters, "lora_target_modules": [["q_proj", "v_proj"]]}
    points = points_of(tmp_path, grid=grid)
    assert [point.root.name for point in points] == [
        "source_adapter-Tina-Yi-R1-Distill-Qwen-1.5B-STILL-checkpoint-1_lora_target_modules-q_proj-v_proj",
        "source_adapter-none_lora_target_modules-q_proj-v_proj",
        "source_adapter-..-..-up_lora_target_modules-q_proj-v_proj",
    ]
    assert all(point.root.parent == tmp_path / "out" for point in points)
    long = points_of(tmp_path, grid={"source_adapter": ["a" * 300, "a" * 301]})
    assert len({point.root.name for point in long}) == 2 and all(len(point.root.name) < 130 for point in long)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "needs a section `grid`"),
        ({"grid": {}}, "needs a section `grid`"),
        ({"grid": ["k"]}, "grid must be a mapping"),
        ({"grid": {1: [2]}}, "grid: 1 is no field"),
        ({"grid": {"stage1.k": [2]}, "stage1": ["k"]}, "stage1 must be a mapping"),
        ({"grid": {"hookpoint": ["layers.1"]}, "features": {"cues": "a"}}, "cues is 'a'; it must be a list"),
        ({"grid": {"hookpoint": ["layers.1"]}, "features": {"components": "a"}}, "components is 'a'; it must be"),
        ({"grid": {"hookpoint": ["layers.1"]}, "features": {"components": 0}}, "components is 0; it must be"),
        ({"grid": {"hookpoint": ["layers.1"]}, "features": {"prompt": 3}}, "prompt is 3; it must be text"),
        ({"grid": {"stage1.k": 4}}, "stage1.k is 4; give a list of values"),
        ({"grid": {"stage1.k": []}}, "stage1.k is \\[\\]; give a list"),
        ({"grid": {"seeds": [[0], [1]]}}, "grid cannot vary seeds"),
        ({"grid": {"output_dir": ["a", "b"]}}, "grid cannot vary output_dir"),
        ({"grid": {"stage2": [{"k": 1}]}}, "grid cannot vary stage2"),
        ({"grid": {"stage1.kk": [1, 2]}}, "Point kk 1: .*unknown keys: kk"),
        ({"grid": {"lora_rr": [1, 2]}}, "Point lora_rr 1: .*unknown keys: lora_rr"),
        ({"grid": {"stage3.k": [1, 2]}}, "stage3.k is no field of the sections stage1, stage2, sampling"),
        ({"grid": {"template": ["chat", "paperr"]}}, "Point template paperr: template is 'paperr'"),
        ({"grid": {"lora_r": [4, "4"]}}, "Points lora_r 4 and lora_r 4 would share the folder"),
        ({"grid": {"source_adapter": ["a/b", "a-b"]}}, "would share the folder"),
        ({"grid": {"stage1.learning_rate": [0.001, "1e-3"]}}, "are the same"),
        ({"grid": {"lora_r": [2]}, "features": {}}, "sweep over hookpoints alone"),
        ({"grid": {"hookpoint": ["layers.1"]}, "features": {"cue": "a"}}, "must be a mapping of prompt, cues, comp"),
    ],
)
def test_bad_grids(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        points_of(tmp_path, **changes)


def test_a_flag_over_the_grid_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="Points lora_r 2 and lora_r 4 are the same. Does a flag set"):
        points_of(tmp_path, "--lora_r", "8", grid={"lora_r": [2, 4]})


def test_help_is_told_without_a_grid(capsys):
    with pytest.raises(SystemExit):
        parse_sweep(["--help"], "resa-hf sweep", "what it does")
    assert "what it does" in capsys.readouterr().out
