"""The recipes against the paper's tables, typed here from arXiv 2506.09967v2, and against their READMEs."""

import re
from pathlib import Path

import pytest
import yaml
from test_recipes import parse

RECIPES = Path(__file__).parents[1] / "recipes"
R1, MATH, QWEN = "deepseek-r1-distill-qwen-1.5b", "qwen2.5-math-1.5b", "qwen2.5-1.5b"
LLAMA, QWEN3 = "llama-3.2-1b", "qwen3-1.7b"

# Tables 1 and 5: row, source model, target model, trigger data, elicitation data, SAE training mode.
ROWS = """
Resa-STILL-v1             Tina-STILL        R1-Distill  STILL       STILL       Fine-tuned
Resa-STILL-v2             -                 R1-Distill  -           STILL       Pre-trained
Resa-STILL-v3             Tina-STILL        R1-Distill  STILL       STILL       Trained-from-Scratch
Resa-STILL-v4             R1-Distill        R1-Distill  STILL       STILL       Fine-tuned
Resa-STILL-v5             R1-Distill        R1-Distill  STILL       STILL       Trained-from-Scratch
Resa-DeepScaleR-v1        Tina-DeepScaleR   R1-Distill  DeepScaleR  DeepScaleR  Fine-tuned
Resa-DeepScaleR-v2        Tina-DeepScaleR   R1-Distill  DeepScaleR  DeepScaleR  Trained-from-Scratch
Resa-DeepScaleR-v3        R1-Distill        R1-Distill  DeepScaleR  DeepScaleR  Trained-from-Scratch
Resa-DeepScaleR-v4        Tina-STILL        R1-Distill  STILL       DeepScaleR  Fine-tuned
Resa-STILL2Open-S1        Tina-STILL        R1-Distill  STILL       Open-S1     Fine-tuned
Resa-STILL2II-Thought     Tina-STILL        R1-Distill  STILL       II-Thought  Fine-tuned
Resa-STILL2OpenR1         Tina-STILL        R1-Distill  STILL       OpenR1      Fine-tuned
"""
# The same components where a row's source can exist, which for the siblings is the model itself.
SIBLING_ROWS = """
Resa-STILL-v2             -                 self        -           STILL       Pre-trained
Resa-STILL-v4             self              self        STILL       STILL       Fine-tuned
Resa-STILL-v5             self              self        STILL       STILL       Trained-from-Scratch
Resa-DeepScaleR-v3        self              self        DeepScaleR  DeepScaleR  Trained-from-Scratch
"""
ADAPTER_ROW = "{}  Tina-STILL  self  STILL  STILL  Fine-tuned"
OTHER_FAMILIES = {LLAMA: ("Resa-STILL-v4", "Resa-STILL-v5"), QWEN3: ("Resa-STILL-v5",)}

MODELS = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": "R1-Distill",
    "Tina-Yi/R1-Distill-Qwen-1.5B-STILL/checkpoint-2000": "Tina-STILL",
    "Tina-Yi/R1-Distill-Qwen-1.5B-DeepScaleR/checkpoint-1000": "Tina-DeepScaleR",
}
DATASETS = {
    "still": "STILL",
    "deepscaler": "DeepScaleR",
    "open-s1": "Open-S1",
    "ii-thought": "II-Thought",
    "openr1-math": "OpenR1",
}
SIX = ["resa:aime24", "resa:aime25", "resa:amc23", "resa:math_500", "resa:gpqa_diamond", "resa:minerva"]
REVISIONS = {"model_revision", "source_revision", "evaluate_on_revision", "sae_revision", "initial_sae_revision"}


def read(folder, kind, name):
    return yaml.safe_load((RECIPES / folder / kind / f"{name}.yaml").read_text())


def components(recipe):
    """What a recipe says, as the paper's Table 1 would."""
    stage1 = recipe.get("stage1")
    mode = "Pre-trained" if stage1 is None else "Fine-tuned" if "initial_sae" in stage1 else "Trained-from-Scratch"
    own = MODELS.get(recipe["model_name_or_path"], "self")
    source = MODELS[recipe["source_adapter"]] if "source_adapter" in recipe else own
    trigger = DATASETS[recipe.get("trigger_dataset", recipe["dataset"])]
    source, trigger = ("-", "-") if stage1 is None else (source, trigger)
    return [source, own, trigger, DATASETS[recipe["dataset"]], mode]


def rows():
    table = [(R1, line.split()) for line in ROWS.strip().splitlines()]
    table += [(folder, line.split()) for folder in (MATH, QWEN) for line in SIBLING_ROWS.strip().splitlines()]
    table += [(MATH, ADAPTER_ROW.format("Resa-STILL-Qwen-Math-Adapter").split())]
    table += [(QWEN, ADAPTER_ROW.format("Resa-STILL-Qwen-Adapter").split())]
    like = {line.split()[0]: line.split() for line in SIBLING_ROWS.strip().splitlines()}
    return table + [(folder, like[name]) for folder, names in OTHER_FAMILIES.items() for name in names]


@pytest.mark.parametrize(("folder", "row"), rows(), ids=lambda value: value if isinstance(value, str) else value[0])
def test_a_row_of_tables_1_and_5(folder, row):
    recipe = read(folder, "run", row[0].lower())
    assert components(recipe) == row[1:]
    assert recipe["tasks"] == SIX
    # Table 7, and the paper's two GPUs with one sequence each: 1,448 steps an epoch of STILL (Table 8).
    stage2 = recipe["stage2"]
    assert [recipe[key] for key in ("lora_r", "lora_alpha", "lora_dropout")] == [32, 128, 0.05]
    assert recipe["lora_target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (stage2["learning_rate"], stage2["num_train_epochs"], stage2["lr_scheduler_type"]) == (
        *(1e-6, 2),
        "cosine_with_min_lr",
    )
    assert stage2["per_device_train_batch_size"] * stage2["gradient_accumulation_steps"] == 2
    assert (stage2["max_length"], stage2["kl_beta"], stage2["sae_gradient"]) == (2048, 1.0, "flow")
    if recipe.get("stage1"):
        stage1 = recipe["stage1"]
        assert (stage1["k"], stage1["sae_optimizer"], stage1["learning_rate"]) == (32, "signum", 2.5e-4)
        assert (stage1["per_device_train_batch_size"], stage1["num_train_epochs"]) == (16, 1)
        assert stage1["dead_after_tokens"] == 1_000_000
        llama_sae = folder == LLAMA and row[-1] == "Fine-tuned"
        assert stage1["num_latents"] == (131_072 if llama_sae else 65_536)
    # "The output of the MLP submodule after the 12th layer (out of 28)"; elsewhere the middle one.
    (hookpoint,) = recipe["stage1"]["hookpoints"] if recipe.get("stage1") else [recipe["sae_id"]]
    assert hookpoint == {LLAMA: "layers.8.mlp", QWEN3: "layers.14.mlp"}.get(folder, "layers.12.mlp")
    start = (recipe.get("stage1") or {}).get("initial_sae", recipe.get("sae"))
    published = "sae-Llama-3.2-1B-131k" if folder == LLAMA else "sae-DeepSeek-R1-Distill-Qwen-1.5B-65k"
    assert start == (None if row[-1] == "Trained-from-Scratch" else f"EleutherAI/{published}")


@pytest.mark.parametrize("folder", [MATH, QWEN])
def test_the_adapters_of_table_5_are_moved_to_r1_distill(folder):
    name = {MATH: "resa-still-qwen-math-adapter", QWEN: "resa-still-qwen-adapter"}[folder]
    recipe = read(folder, "run", name)
    assert MODELS[recipe["evaluate_on"]] == MODELS[recipe["source_model"]] == "R1-Distill"
    assert recipe["evaluate_on_revision"] == recipe["source_revision"] == read(R1, "run", "paper")["model_revision"]
    others = [path for path in (RECIPES / folder / "run").glob("*.yaml") if path.stem != name]
    assert not any("evaluate_on" in yaml.safe_load(path.read_text()) for path in others)


def test_every_row_is_there_and_no_other():
    named = {(folder, row[0].lower()) for folder, row in rows()}
    found = {(path.parts[-3], path.stem) for path in RECIPES.glob("*/run/resa-*.yaml")}
    assert found == named


# Resa-STILL-2nd-Layer to -27th-Layer; the 13th has the scores of Resa-STILL-v1, which is layers.12 counted from 0.
TABLE_6 = [f"layers.{layer - 1}.mlp" for layer in range(2, 28)]


@pytest.mark.parametrize("folder", [MATH, QWEN])
def test_one_arm_for_each_layer_of_table_6(folder):
    recipe = read(folder, "compare", "hookpoints")
    assert recipe["stage1"]["hookpoints"] == TABLE_6
    swept = {name: arm["sae_id"] for name, arm in recipe["arms"].items() if "control" not in arm}
    assert swept == {f"layer {number}": TABLE_6[number - 2] for number in range(2, 28)}
    assert components(recipe)[0] == "self"


def test_the_sweep_of_table_6():
    recipe, row = read(R1, "sweep", "hookpoints"), read(R1, "run", "resa-still-v1")
    assert recipe["grid"] == {"hookpoint": TABLE_6} and recipe["features"] == {"components": 3}
    assert components(recipe) == ["Tina-STILL", "R1-Distill", "STILL", "STILL", "Fine-tuned"]
    assert recipe["stage1"] == {key: value for key, value in row["stage1"].items() if key != "hookpoints"}
    assert recipe["stage2"] == row["stage2"]
    sweep = parse(RECIPES / R1 / "sweep" / "hookpoints.yaml")
    assert [point.settings.stage1["hookpoints"] for point in sweep.points] == [TABLE_6] * 26
    assert len({point.stage1 for point in sweep.points}) == len({point.base for point in sweep.points}) == 1


def test_the_sweep_over_the_sources_steps_of_table_4():
    recipe = read(R1, "sweep", "source_steps")
    # 0 steps are the base itself; each with an SAE that is fine-tuned and one from scratch.
    steps = [1, 10, 50, 100, 500, 2000, 3000]
    tina = [f"Tina-Yi/R1-Distill-Qwen-1.5B-STILL/checkpoint-{step}" for step in steps]
    assert recipe["grid"]["source_adapter"] == [None, *tina]
    points = parse(RECIPES / R1 / "sweep" / "source_steps.yaml").points
    assert len(points) == 16 and len({point.base for point in points}) == 1
    for name, number in {"v1": 12, "v3": 13, "v4": 0, "v5": 1}.items():
        row, point = parse(RECIPES / R1 / "run" / f"resa-still-{name}.yaml"), points[number].settings
        # From scratch the grid says `null`, the row nothing.
        assert {key: value for key, value in point.stage1.items() if value is not None} == row.stage1
        assert point.stage2 == row.stage2
        assert point.run.source_adapter == row.run.source_adapter


def row_of(name):
    return parse(RECIPES / R1 / "run" / f"{name}.yaml")


def set_keys(section):
    """What a section says: a grid says `null` where a row says nothing."""
    return {key: value for key, value in section.items() if value is not None}


# Beside which point of an ablation which row of the paper's stands.
POINTS_THAT_ARE_ROWS = [
    ("gradient_and_rate", ("flow", 1e-6), "resa-still-v1"),
    ("k_and_latents", (32, 65_536), "resa-still-v3"),
    ("elicitation", ("still",), "resa-still-v1"),
    ("elicitation", ("deepscaler",), "resa-deepscaler-v4"),
    ("elicitation", ("open-s1",), "resa-still2open-s1"),
    ("elicitation", ("ii-thought",), "resa-still2ii-thought"),
    ("elicitation", ("openr1-math",), "resa-still2openr1"),
]


@pytest.mark.parametrize(("name", "values", "row"), POINTS_THAT_ARE_ROWS)
def test_a_point_of_an_ablation_has_the_values_of_its_row(name, values, row):
    points = parse(RECIPES / R1 / "sweep" / f"{name}.yaml").points
    (point,) = [point.settings for point in points if tuple(point.values.values()) == values]
    theirs = row_of(row)
    assert set_keys(point.stage1) == theirs.stage1 and point.stage2 == theirs.stage2
    for key in ("dataset", "source_adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"):
        assert getattr(point.run, key) == getattr(theirs.run, key)
    assert (point.run.trigger_dataset or point.run.dataset) == (theirs.run.trigger_dataset or theirs.run.dataset)


def test_what_the_ablations_vary():
    grids = {
        "sft": {"solution_column": [None, "solution"]},
        "elicitation": {"dataset": list(DATASETS)},
        "gradient_and_rate": {"stage2.sae_gradient": ["flow", "stop"], "stage2.learning_rate": [1e-6, 1e-5, 1e-4]},
        "k_and_latents": {"stage1.k": [16, 32, 64], "stage1.num_latents": [16_384, 65_536]},
    }
    for name, grid in grids.items():
        assert read(R1, "sweep", name)["grid"] == grid
    assert read(R1, "sweep", "elicitation")["tasks"] == SIX
    # One SAE serves gradients and rates, and one base every size of the SAE.
    assert len({point.stage1 for point in parse(RECIPES / R1 / "sweep" / "gradient_and_rate.yaml").points}) == 1
    for name in ("gradient_and_rate", "k_and_latents"):
        assert len({point.base for point in parse(RECIPES / R1 / "sweep" / f"{name}.yaml").points}) == 1


def test_the_sft_ablation_with_a_tuned_rate():
    for point in parse(RECIPES / R1 / "sweep" / "sft.yaml").points:
        (arm,) = point.settings.arms
        assert (arm.sae_from, arm.tuning) == ("none", {"kl_weight": 0.0, "sft_weight": 1.0})
        assert point.settings.chosen_on == "selection" and point.settings.run.selection == 200
        assert [candidate.rate for candidate in point.settings.candidates] == [1e-6, 1e-5, 1e-4]
        released = row_of("cot-based-sft").stage2
        assert set_keys(point.settings.stage2) == {key: released[key] for key in released if key != "learning_rate"}


def test_the_teachers():
    run = parse(RECIPES / R1 / "compare" / "teachers.yaml")
    source = {"sae_from": "none", "kl_reference": "source"}
    teachers = {
        "SAE-Tuning": {"sae_from": "source"},
        "teacher = source": source,
        "teacher = source with its SAE": source | {"sae_from": "source", "sae_in": "teacher"},
        "teacher = source with a random SAE": source
        | {"sae_from": "source", "sae_in": "teacher", "control": "random_sae"},
        "teacher = source, on text of the target": source | {"text": "target"},
        "teacher = source, on-policy": source | {"text": "student", "kl_temperature": 0.6},
        "SFT on the source's traces": {"sae_from": "none", "kl_weight": 0.0, "sft_weight": 1.0, "text": "source"},
        "CoT-free SFT": {"sae_from": "none", "kl_weight": 0.0, "sft_weight": 1.0},
    }
    trained = {arm.name: arm for arm in run.arms if arm.is_trained}
    assert {
        name: {"sae_from": arm.sae_from, **arm.tuning, **({} if arm.text == "dataset" else {"text": arm.text})}
        for name, arm in trained.items()
    } == teachers
    made = {arm.known: arm for arm in run.arms if not arm.is_trained}
    assert made.keys() == {"source", "random_adapter"}
    assert made["random_adapter"].like == "teacher = source" and made["source"].name == run.run.rl_arm
    assert MODELS[run.run.source_adapter] == "Tina-STILL" and run.chosen_on == "selection"
    # What Tina-STILL was trained on is no test for it.
    assert run.run.dataset == "still" and run.run.tasks and not any("still" in task for task in run.run.tasks)


@pytest.mark.parametrize(
    ("folder", "name", "dataset", "traces", "batch"),
    [
        *((folder, "cot-free-sft", "still", None, 32) for folder in (R1, MATH, QWEN, LLAMA, QWEN3)),
        *((folder, "cot-based-sft", "deepscaler", "solution", 16) for folder in (R1, MATH, QWEN)),
    ],
)
def test_the_sft_ablations(folder, name, dataset, traces, batch):
    recipe = read(folder, "run", name)
    (arm,) = recipe["arms"].values()
    assert arm == {"sae_from": "none", "kl_weight": 0.0, "sft_weight": 1.0}
    assert (recipe["dataset"], recipe.get("solution_column"), recipe["pack"]) == (dataset, traces, False)
    stage2 = recipe["stage2"]
    # The released code: 16 documents (8 with traces) on each of two GPUs, so 936 and 2,520 steps an epoch (B.1).
    assert stage2["per_device_train_batch_size"] * stage2["gradient_accumulation_steps"] == batch
    assert (stage2["learning_rate"], stage2["num_train_epochs"], stage2["warmup_steps"]) == (1e-5, 3, 0.05)


def test_answers_fit_the_positions_of_qwen2_5_math():
    for path in (RECIPES / MATH).glob("*/*.yaml"):
        recipe = yaml.safe_load(path.read_text())
        on_itself = "evaluate_on" not in recipe
        assert not on_itself or {**recipe, **recipe.get("sampling", {})}["max_new_tokens"] + 1024 <= 4096


def all_recipes():
    found = sorted(path for path in RECIPES.glob("*/*/*.yaml") if path.parts[-3] != "tiny-reasoner")
    return pytest.mark.parametrize("path", found, ids=lambda path: "/".join(path.parts[-3:]))


@all_recipes()
def test_revisions_are_pinned_and_costs_told(path):
    recipe = yaml.safe_load(path.read_text())
    pinned = {**recipe, **(recipe.get("stage1") or {}), **(recipe.get("stage2") or {})}
    found = {key: value for key, value in pinned.items() if key in REVISIONS}
    assert "model_revision" in found
    assert "source_revision" in found or "source_adapter" not in recipe
    assert all(re.fullmatch("[0-9a-f]{40}", value) for value in found.values())
    comment = path.read_text().partition("\n\n")[0]
    assert comment.startswith("# ") and "Estimated, not measured" in comment
    assert " h" in comment or "hour" in comment


@pytest.mark.parametrize("folder", sorted(path.name for path in RECIPES.iterdir() if path.is_dir()))
def test_a_readme_names_its_recipes_and_no_other(folder):
    text = (RECIPES / folder / "README.md").read_text()
    named = set(re.findall(r"`((?:sae|tune|rl|run|compare|evaluate|sweep|features)/[\w.-]+\.yaml)`", text))
    there = {f"{path.parent.name}/{path.name}" for path in (RECIPES / folder).glob("*/*.yaml")}
    assert named == there


def test_the_readmes_flags_for_the_released_code():
    text = (RECIPES / R1 / "README.md").read_text()
    flags = re.search(r"values, by flags: `([^`]+)`", text)[1].split()
    finetuned = re.search(r"where\s+the SAE is fine-tuned `([^`]+)`", text)[1].split()
    ours = parse(RECIPES / R1 / "run" / "resa-still-v4.yaml", *flags, *finetuned)
    released = parse(RECIPES / R1 / "run" / "released.yaml")
    assert ours.stage1["hookpoints"] == released.stage1["hookpoints"]
    assert ours.stage1["dead_after_tokens"] == released.stage1["dead_after_tokens"]
    # sparsify's rule, which is the default: 5e-3 / sqrt(65536 / 16384).
    assert "learning_rate" not in released.stage1 and ours.stage1["learning_rate"] == 5e-3 / 4**0.5
    for key in ("sae_gradient", "kl_beta", "lr_scheduler_type", "max_grad_norm", "gradient_accumulation_steps"):
        assert ours.stage2[key] == released.stage2[key]
    assert released.run.lora_target_modules is None and len(ours.run.lora_target_modules) == 7
