"""Every recipe through the real parsers, and the paper's Table 7 in them."""

from pathlib import Path

import pytest
import yaml

from resa_hf.arguments import DataArguments, LoraArguments, ModelArguments, SourceArguments
from resa_hf.commands.grid import parse_sweep
from resa_hf.commands.recipe import parse_flat, parse_run, recipe_path
from resa_hf.evaluation.arguments import EvaluateArguments
from resa_hf.features.arguments import FeatureArguments
from resa_hf.rl.config import RLConfig
from resa_hf.sae.config import SAETrainingConfig
from resa_hf.tuning.config import SAETuningConfig

RECIPES = Path(__file__).parents[1] / "recipes"
STAGE1 = (ModelArguments, DataArguments, SAETrainingConfig)
STAGE2 = (ModelArguments, SourceArguments, LoraArguments, DataArguments, SAETuningConfig)
RL = (ModelArguments, LoraArguments, DataArguments, RLConfig)
FLAT = {"sae": STAGE1, "tune": STAGE2, "rl": RL, "evaluate": (EvaluateArguments,), "features": (FeatureArguments,)}


def parse(path, *flags):
    kind = path.parent.name
    if kind in ("run", "compare"):
        own = ["--dataset", "mine.jsonl"] if path.name == "own_data.yaml" else []
        return parse_run(["--config", str(path), *own, *flags], "test", "")
    if kind == "sweep":
        return parse_sweep(["--config", str(path), *flags], "test", "")
    return parse_flat(FLAT[kind], ["--config", str(path), *flags], "test", "")[0]


ALL = pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*/*.yaml")), ids=lambda path: "/".join(path.parts[-3:]))


@ALL
def test_recipe_parses_and_an_unknown_key_in_it_does_not(path, tmp_path):
    parse(path)
    changed = tmp_path / path.parent.name / path.name
    changed.parent.mkdir()
    changed.write_text(path.read_text() + "\nlearning_rat: 1\n")
    with pytest.raises(ValueError, match="unknown keys: learning_rat"):
        parse(changed)


@ALL
def test_every_key_of_a_recipe_counts(path, tmp_path):
    recipe = yaml.safe_load(path.read_text())
    sections = {name: recipe[name] for name in ("stage1", "stage2", "sampling") if name in recipe}
    top = {key: value for key, value in recipe.items() if key not in (*sections, "arms", "grid", "features")}
    variants = {None: top, **sections}
    for name, keys in variants.items():
        misspelt = {f"{key}x": value for key, value in keys.items()}
        text = (
            {**recipe, name: misspelt}
            if name
            else {**misspelt, **{key: recipe[key] for key in recipe.keys() - top.keys()}}
        )
        changed = tmp_path / path.parent.name / f"{name}.yaml"
        changed.parent.mkdir(exist_ok=True)
        changed.write_text(yaml.safe_dump(text))
        with pytest.raises(ValueError, match="unknown keys: ") as refused:
            parse(changed)
        assert set(str(refused.value).partition("unknown keys: ")[2].rstrip(".").split(", ")) == set(misspelt)


def test_every_kind_of_recipe_is_there():
    kinds = {path.parent.name for path in RECIPES.glob("*/*/*.yaml")}
    assert kinds == {"sae", "tune", "rl", "run", "compare", "evaluate", "sweep", "features"}
    assert all((folder / "README.md").is_file() for folder in RECIPES.iterdir() if folder.is_dir())
    assert recipe_path("tiny-reasoner/run/demo.yaml").is_file()
    assert recipe_path("tiny-reasoner/run/demo_full.yaml").is_file()


def test_table_7_of_the_paper():
    folder = RECIPES / "deepseek-r1-distill-qwen-1.5b"
    _, _, sae = parse(folder / "sae" / "paper.yaml")
    assert (sae.num_latents, sae.k, sae.sae_optimizer, sae.learning_rate) == (65536, 32, "signum", 2.5e-4)
    assert (sae.per_device_train_batch_size, sae.num_train_epochs, sae.dead_after_tokens) == (16, 1, 1_000_000)
    assert sae.hookpoints == ["layers.12.mlp"] and str(sae.lr_scheduler_type.value) == "constant"
    _, _, lora, _, tune = parse(folder / "tune" / "paper.yaml")
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout) == (32, 128, 0.05)
    assert lora.lora_target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (tune.learning_rate, tune.per_device_train_batch_size, tune.num_train_epochs) == (1e-6, 1, 2)
    assert (tune.kl_beta, tune.sae_gradient, tune.max_length) == (1.0, "flow", 2048)
    assert tune.lr_scheduler_type.value == "cosine_with_min_lr"


def test_values_of_the_released_code():
    folder = RECIPES / "deepseek-r1-distill-qwen-1.5b"
    _, _, sae = parse(folder / "sae" / "released.yaml")
    assert (sae.hookpoints, sae.learning_rate, sae.dead_after_tokens) == (["layers.12"], None, 10_000_000)
    _, _, lora, _, tune = parse(folder / "tune" / "released.yaml")
    assert lora.lora_config().target_modules == "all-linear"
    assert (tune.kl_beta, tune.sae_gradient, tune.lr_scheduler_type.value) == (0.0, "stop", "constant")
    assert tune.gradient_accumulation_steps * tune.per_device_train_batch_size == 2 and tune.max_grad_norm == 1.0


def test_stage_and_run_recipes_of_one_name_agree():
    folder = RECIPES / "deepseek-r1-distill-qwen-1.5b"
    for name in ("paper", "released"):
        run = parse(folder / "run" / f"{name}.yaml")
        for section, stage in ((run.stage1, "sae"), (run.stage2, "tune")):
            flat = yaml.safe_load((folder / stage / f"{name}.yaml").read_text())
            assert {key: flat[key] for key in section} == dict(section)


def test_flags_win_over_the_recipe_also_in_sections():
    path = RECIPES / "tiny-reasoner" / "run" / "demo.yaml"
    run = parse(path, "--stage2.learning_rate", "3e-5", "--limit", "700", "--stage1.k", "4", "--seeds", "1", "2")
    assert run.stage2["learning_rate"] == 3e-5 and run.stage1["k"] == 4
    assert run.run.limit == 700 and run.run.seeds == [1, 2]
    assert run.stage1["num_latents"] == parse(path).stage1["num_latents"]


def test_every_spelling_of_a_flag_counts():
    path = RECIPES / "tiny-reasoner" / "run" / "demo.yaml"
    for flags in (["--stage2.kl-beta", "1"], ["--stage2.kl_beta=1"], ["--stage2.kl_beta", "1"]):
        assert parse(path, *flags).stage2["kl_beta"] == 1.0
    assert parse_run([f"--config={path}"], "test", "") == parse(path)
    with pytest.raises(SystemExit):
        parse(path, "--stage2.kl_betta", "1")


def test_arms_hold_values_of_their_types_and_only_what_differs(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model_name_or_path: m\ndataset: d\nstage1: {hookpoints: [layers.1, layers.2], max_length: 64}\n"
        "stage2: {sae_gradient: stop}\narms:\n  a: {sft_weight: 1e-3, sae_gradient: stop, sae_id: layers.1}\n"
        "  b: {control: none, sae_id: layers.2}\n"
    )
    run = parse_run(["--config", str(recipe)], "test", "")
    assert [dict(arm.tuning) for arm in run.arms] == [
        {"sft_weight": 1e-3, "sae_id": "layers.1"},
        {"sae_id": "layers.2"},
    ]
    assert run.stage1["max_length"] == run.stage2["max_length"] == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage2: {sae_gradient: flows}", "sae_gradient is 'flows'; it must be one of flow, stop"),
        ("stage2: {sae_gradients: flow}", "stage2 has unknown keys: sae_gradients"),
        ("margin: null", "sets margin to null"),
        ("stage2: {learning_rate: 1.0e-4, max_grad_norm: }", "stage2 sets max_grad_norm to null"),
        ("stage2: {seed: 4}", "seed cannot be set in stage2"),
        ("stage2: {push_to_hub: true}", "push_to_hub cannot be set in stage2: a run is published .* `resa-hf publish"),
        (
            "stage1: {hookpoints: [layers.1], push_to_hub: true, hub_model_id: me/x}",
            "hub_model_id, push_to_hub cannot be set in stage1",
        ),
        ("arms: {a: {hub_strategy: end}}", "Arm 'a': hub_strategy cannot be set in stage2"),
        ("stage1: {hookpoints: [layers.1], sae_optimizer: adagrad}", "sae_optimizer must be one of signum, adam"),
        ("stage1: {num_latents: 64}", "stage1.hookpoints is not set"),
        ("stage1: {hookpoints: [layers.1, layers.2]}", "an arm tunes with one SAE: set stage2.sae_id"),
        ("stage1: [1]", "stage1 must be a mapping"),
        ("template: paperr", "template is 'paperr'"),
        ("dataset: [d]", r"recipe.yaml: dataset is \['d'\]; it must be text\."),
        ("model_revision: 1234567", "model_revision is 1234567; it must be text: put it in quotes"),
        ("seeds: [null]", r"seeds is \[None\]; it must be a list, each a whole number"),
        ("seeds: one", "seeds is 'one'; it must be a list, each a whole number"),
        ("seeds: {a: 1}", r"seeds is \{'a': 1\}; it must be a list, each a whole number"),
        ("learning_rates: [1e-4, fast]", r"learning_rates is \['1e-4', 'fast'\]; it must be a list, each a number"),
        ("dataset_revision: 2026-01-01", "dataset_revision is .*; it must be text: put it in quotes"),
        ("stage2: {save_strategy: no}", "save_strategy is False; it must be text: put it in quotes"),
        ("stage2: {report_to: no}", "report_to is False; it must be text or a list, each text: put it in quotes"),
        ("processes: 1.5", "processes is 1.5; it must be a whole number"),
        ("stage2: {learning_rate: [1.0]}", r"stage2: learning_rate is \[1.0\]; it must be a number"),
        ("sampling: {temperature: -1.0}", "temperature is -1.0"),
        ("arms: {a: {kl_betta: 1}}", "Arm 'a': stage2 has unknown keys: kl_betta"),
        ("arms: {a: {kl_beta: 2.0}}", "Arm 'a': kl_beta is 2.0"),
        ("arms: {a: {sae_from: none}}", "Arm 'a': No SAE"),
        (
            "stage1: {hookpoints: [layers.1], max_length: 64}\nstage2: {max_length: 128}",
            "max_length is 64 in stage1 and 128",
        ),
        ("arms: {a: {learning_rate: 1.0e-3}}", "Arm 'a' cannot set learning_rate: it shares it with the others"),
        (
            "arms: {a: {max_steps: 3, num_train_epochs: 2}}",
            "Arm 'a' cannot set max_steps, num_train_epochs: it shares",
        ),
        ("arms: {a: {known: zero_adapter, kl_beta: 1.0}}", "Arm 'a' cannot set kl_beta: it is not trained"),
        ("arms: {a: {known: zero_adapter, kl_betta: 1.0}}", "unknown keys: kl_betta"),
        ("stage2: {kl_reference: source}\narms: {a: {sae_from: none}}", "source model that is not the target"),
        ("stage2: {eval_on_start: true}", "eval_on_start cannot be set in stage2"),
        ("stage2: {control: noise}", "control in stage2 would make every arm a control; set it in an arm"),
        ("arms: {a: {control: prose_sae, control_sae: null, sae_from: pretrained}}\nsae: s", "set `control_sae`"),
        (
            "stage1: {hookpoints: [layers.1, layers.2]}\narms: {a: {sae_id: layers.1, control: other_layer}}",
            "other_layer needs `control_sae_id`, another one of stage1.hookpoints than its sae_id \\(layers.1\\)",
        ),
        ("rl_arm: b", "rl_arm is 'b'; the arms: SAE-Tuning"),
        ("stage2: {max_length: null}", "it must be one number"),
        ("null: 1", "keys are words"),
        ("- a", "must be a YAML mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    good = {"model_name_or_path": "m", "dataset": "d", "stage1": {"hookpoints": ["layers.1"]}}
    parsed = (
        None if message in ("keys are words", "must be a YAML mapping", "cannot be read") else yaml.safe_load(text)
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(text if parsed is None else yaml.safe_dump({**good, **parsed}))
    with pytest.raises(ValueError, match=message):
        parse_run(["--config", str(path)], "test", "")


def test_a_recipe_that_is_not_there():
    with pytest.raises(ValueError, match="There is no recipe nowhere.yaml"):
        parse_run(["--config", "nowhere.yaml"], "test", "")


def test_lists_as_yaml_has_them(tmp_path):
    """YAML reads 1e-4 as text; and one value is a list of one, as it is for a flag."""
    given = ["--model_name_or_path", "m", "--dataset", "d.jsonl", "--output_dir", "x", "--config"]
    run = tmp_path / "run.yaml"
    run.write_text(
        "learning_rates: [1e-4, 1.0e-3]\nselection: 4\nseeds: 3\ncheckpoints: '10'\nstage1: {hookpoints: 12}\n"
        "lora_target_modules: all-linear"
    )
    settings = parse_run([*given, str(run)], "test", "")
    assert settings.run.learning_rates == [1e-4, 1e-3] and settings.run.seeds == [3]
    assert settings.run.checkpoints == [10] and settings.stage1["hookpoints"] == [12]
    assert settings.run.lora_config().target_modules == "all-linear"
    rl = tmp_path / "rl.yaml"
    rl.write_text("reward_funcs: accuracy\nreward_weights: [1e0]\ncosine_wrong: [-1e-1, 0]\nuse_cpu: true")
    *_, args = parse_flat(RL, [*given, str(rl)], "test", "")[0]
    assert args.reward_funcs == ["accuracy"] and args.reward_weights == [1.0] and args.cosine_wrong == [-0.1, 0]
    evaluate = tmp_path / "evaluate.yaml"
    evaluate.write_text("adapters: a=runs/a\ntasks: resa:aime24")
    (asked,), _ = parse_flat((EvaluateArguments,), [*given[:2], *given[4:], str(evaluate)], "test", "")
    assert asked.adapters == ["a=runs/a"] and asked.tasks == ["resa:aime24"]
