"""Sweeps on the tiny reasoner: against runs alone, again, with a point that fails, and by several processes."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from small_sweep import recipe, write
from statsmodels.stats.multitest import multipletests

from resa_hf.cli import main
from resa_hf.commands.sweep import work_alone
from resa_hf.experiment.folder import RunFolder
from resa_hf.hookpoints import capture
from resa_hf.sae.checkpoint import load_sae
from resa_hf.tiny import load_tiny_source

PROMPT = "User: 7*4-2+8 mod 10\nAssistant: <think>7*4=8;8-2=6;6+8=4</think><answer>4</answer>"
HOOKPOINTS = ["layers.1", "layers.2", "layers.3"]
ARMS = {"SAE-Tuning": {"sae_from": "source"}, "control - noise": {"sae_from": "source", "control": "noise"}}
LAYERS = {
    "grid": {"hookpoint": HOOKPOINTS},
    "features": {"prompt": PROMPT, "components": 1},
    "seeds": [0, 1],
    "arms": ARMS,
}


def report_in(folder):
    return json.loads((folder / "report.json").read_text())


def without_times(arm):
    return {key: value for key, value in arm.items() if key not in ("seconds", "training_seconds")}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder of a sweep over three layers, with two arms and two seeds."""
    root = tmp_path_factory.mktemp("swept")
    path = write(root / "layers.yaml", recipe(root / "out", **LAYERS))
    assert main(["sweep", "--config", str(path)]) == 0
    return root / "out"


@pytest.mark.slow
def test_what_points_share_is_made_once(swept):
    saes = sorted(path.relative_to(swept / "shared").parts[1:] for path in swept.glob("shared/*/sae/*/*/stage1.json"))
    assert saes == [("sae", "source", f"seed-{seed}", "stage1.json") for seed in (0, 1)]
    for seed in (0, 1):
        (folder,) = swept.glob(f"shared/*/sae/source/seed-{seed}")
        assert {path.name for path in folder.iterdir() if path.is_dir()} == set(HOOKPOINTS)
    bases = [path.parent.name for path in swept.glob("**/arms/base/untrained/*/answers")]
    assert sorted(bases) == ["seed-0", "seed-1"] and len(list(swept.glob("**/data.json"))) == 1
    for hookpoint in HOOKPOINTS:
        point = swept / f"hookpoint-{hookpoint}"
        assert report_in(point)["sweep_points"] == 3 == RunFolder.open(point).points
        assert "one of 3 runs of a sweep" in (point / "report.md").read_text()
        point = swept / f"hookpoint-{hookpoint}"
        assert {path.name for path in point.iterdir()} >= {"arms", "report.md", "report.json", "report.png"}
        assert not (point / "sae").exists() and not (point / "data").exists()
        assert load_sae(RunFolder.open(point).sae("source", 1), hookpoint).hookpoint == hookpoint


@pytest.mark.slow
def test_a_point_gives_what_its_run_alone_gives(swept, tmp_path):
    alone = recipe(tmp_path / "run", seeds=[0, 1], arms=ARMS)
    alone["stage1"] = {**alone["stage1"], "hookpoints": HOOKPOINTS}
    alone["stage2"] = {**alone["stage2"], "sae_id": "layers.3"}
    assert main(["run", "--config", str(write(tmp_path / "run.yaml", alone))]) == 0
    run, point = report_in(tmp_path / "run"), report_in(swept / "hookpoint-layers.3")
    assert [without_times(arm) for arm in run["arms"]] == [without_times(arm) for arm in point["arms"]]
    assert run["revisions"] == point["revisions"] and run["data"] == point["data"]
    quality = [report["sae_quality"]["source"] | {"seconds": None} for report in (run, point)]
    assert quality[0] == quality[1]
    tokens = [{part: cost["tokens"] for part, cost in report["costs"].items()} for report in (run, point)]
    assert tokens[0] == tokens[1]


@pytest.mark.slow
def test_the_report_of_all_points(swept):
    report = report_in(swept)
    assert [point["values"] for point in report["points"]] == [{"hookpoint": name} for name in HOOKPOINTS]
    arms = [arm for point in report["points"] for arm in point["arms"] if arm["name"] != "base"]
    assert report["comparisons"] == len(arms) == 6
    # Holm over all of them, where each point's own report corrects for two.
    p_values = [arm["difference"]["p_value"] for arm in arms]
    expected = multipletests(p_values, method="holm")[1]
    assert [arm["adjusted_p"] for arm in arms] == pytest.approx(expected)
    assert all(point["arms"][0] == report["points"][0]["arms"][0] for point in report["points"])
    assert set(report["best"]) == set(ARMS) and report["best"]["SAE-Tuning"]["n"] == 3
    # What is shared counts once.
    stage1 = [json.loads(path.read_text()) for path in swept.glob("shared/*/sae/*/*/stage1.json")]
    assert report["costs"]["Stage I"]["tokens"] == sum(one["tokens"] for one in stage1)
    assert report["costs"]["Stage II"]["tokens"] == sum(arm["tokens"]["training"] for arm in arms)
    base = report["points"][0]["arms"][0]
    answered = base["tokens"]["answers"] + sum(arm["tokens"]["answers"] for arm in arms)
    assert report["costs"]["evaluation"]["tokens"] == answered
    text = (swept / "report.md").read_text()
    assert "6 comparisons with the base, at 3 points" in text and "![SAE-Tuning: accuracy by layer" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len([line for line in table if "| base " in line]) == 1
    assert (swept / "report.png").stat().st_size > 10_000 and (swept / "report-dark.png").stat().st_size > 10_000


@pytest.mark.slow
def test_features_are_counted_on_the_source_with_the_saes_of_each_seed(swept, tiny_tokenizer):
    layers = report_in(swept)["layers"]
    assert list(layers) == ["SAE-Tuning"] and layers["SAE-Tuning"]["layers"] == [1, 2, 3]
    ids = tiny_tokenizer(PROMPT)["input_ids"]
    cues = [[i for i, token in enumerate(ids) if token == tiny_tokenizer.convert_tokens_to_ids(tag)] for tag in
            ("<think>", "</think>")]  # fmt: skip
    others = [i for i in range(len(ids)) if i not in (*cues[0], *cues[1])]
    source = load_tiny_source()
    for row, hookpoint in enumerate(HOOKPOINTS):
        with torch.no_grad(), capture(source, [hookpoint]) as found:
            source(torch.tensor([ids]))
            x = found[hookpoint][0]
        counts = []
        for seed in (0, 1):
            (folder,) = swept.glob(f"shared/*/sae/source/seed-{seed}")
            active = load_sae(folder, hookpoint).encode(x) > 0  # [tokens, latents]
            at_cues = active[cues[0]].any(0) & active[cues[1]].any(0)
            counts.append(int((at_cues & ~active[others].any(0)).sum()))
        assert layers["SAE-Tuning"]["features"][row] == counts


@pytest.mark.slow
def test_a_rerun_makes_the_report_and_nothing_else(swept, capfd):
    kept = [path for path in swept.rglob("*") if path.is_file() and path.parent not in (swept, swept / "locks")]
    before = {path: path.stat().st_mtime_ns for path in kept if path.name not in ("settings.json",)}
    first = report_in(swept)
    assert main(["sweep", "--config", str(swept.parent / "layers.yaml")]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert report_in(swept) == first
    # Other settings are refused, not mixed in.
    other = recipe(swept, **LAYERS | {"margin": 0.05})
    assert main(["sweep", "--config", str(write(swept.parent / "other.yaml", other))]) == 2
    told = capfd.readouterr().err
    assert "holds a run with other settings (run.margin)" in told
    # They are refused before Stage I is trained for them.
    stages = sorted(swept.glob("shared/*"))
    assert main(["sweep", "--config", str(swept.parent / "layers.yaml"), "--stage1.k", "8"]) == 2
    assert "other settings (stage1.k)" in capfd.readouterr().err and sorted(swept.glob("shared/*")) == stages


@pytest.mark.slow
def test_a_point_that_fails_is_told_and_the_others_go_on(tmp_path, capfd):
    path = write(tmp_path / "steps.yaml", recipe(tmp_path / "out", grid={"checkpoints": [[5], [2]]}))
    for _ in range(2):
        assert main(["sweep", "--config", str(path)]) == 2
        told = capfd.readouterr().err
        assert "1 of 2 points failed" in told and "checkpoints 5: SAE-Tuning, seed 0: checkpoints names step 5" in told
        report = report_in(tmp_path / "out")
        assert list(report["failed"]) == ["checkpoints 5"]
        assert [point["values"] for point in report["points"]] == [{"checkpoints": [2]}]
    assert "**Failed:** checkpoints 5" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.long
def test_data_that_fail_at_one_point_do_not_keep_the_base_from_the_others(tmp_path, capfd):
    (tmp_path / "bad.jsonl").write_text('{"problem": "a"}\n')
    grid = {"trigger_dataset": [str(tmp_path / "bad.jsonl"), "tiny-reasoner"]}
    path = write(tmp_path / "triggers.yaml", recipe(tmp_path / "out", grid=grid))
    assert main(["sweep", "--config", str(path)]) == 2
    told = capfd.readouterr().err
    assert "1 of 2 points failed" in told and "has no column 'answer'" in told
    assert [point["values"]["trigger_dataset"] for point in report_in(tmp_path / "out")["points"]] == ["tiny-reasoner"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"grid": {"hookpoint": ["layers.1", "layers.9"]}},
            "Unknown hookpoint 'layers.9'. Valid: layers.0 to layers.3",
        ),
        ({"grid": {"hookpoint": ["all"]}}, "Unknown hookpoint 'all'"),
        ({"grid": {"hookpoint": [None]}}, "grid: hookpoint is [None]; give names"),
        ({"grid": {"hookpoint": [1]}}, "grid: hookpoint is [1]; give names, such as layers.1"),
        ({"grid": {"hookpoint": ["model.layers.1"]}}, "Stage I trains there is named 'layers.1'"),
        (
            {"grid": {"hookpoint": ["layers.1"]}, "features": {"cues": ["abc"]}},
            "features: The prompt has no tokens for",
        ),
    ],
)
def test_what_can_only_fail_fails_before_anything_is_done(tmp_path, capfd, changes, message):
    path = write(tmp_path / "sweep.yaml", recipe(tmp_path / "out", **changes))
    for flags in ([], ["--dry_run"]):
        assert main(["sweep", "--config", str(path), *flags]) == 2
        assert message in capfd.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_points_with_other_bases_are_each_held_against_their_own(tmp_path):
    grid = {"sampling.temperature": [0.5, 1.0]}
    arms = {"zero": {"known": "zero_adapter"}}
    path = write(tmp_path / "temperatures.yaml", recipe(tmp_path / "out", grid=grid, arms=arms))
    assert main(["sweep", "--config", str(path)]) == 0
    report = report_in(tmp_path / "out")
    bases = {point["base"] for point in report["points"]}
    assert len(bases) == 2 and {path.parents[5].name for path in tmp_path.glob("**/arms/base/**/held_out")} == bases
    for point in report["points"]:
        base, zero = point["arms"]
        assert base["by_seed"] == zero["by_seed"] and zero["verdict"]["word"] == "equivalent"
    assert report["best"] == {} and report["layers"] is None
    rows = [line.split("|")[1:3] for line in (tmp_path / "out" / "report.md").read_text().splitlines() if "|" in line]
    assert [[cell.strip() for cell in row] for row in rows[2:6]] == [
        ["0.5", "base"], ["0.5", "zero"], ["1.0", "base"], ["1.0", "zero"],
    ]  # fmt: skip
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"report.png", "report-2.png"}


@pytest.mark.slow
def test_a_dry_run_tells_the_points_and_what_they_share(tmp_path, capsys):
    path = write(tmp_path / "layers.yaml", recipe(tmp_path / "out", **LAYERS))
    assert main(["sweep", "--config", str(path), "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert "3 points" in told and "Predicted memory" in told and not (tmp_path / "out").exists()
    assert all(f"hookpoint-{name}: Would load: resa_hf/tiny/base" in told for name in HOOKPOINTS)
    shared = told.partition("Made once")[2]
    assert shared.count("source-seed-") == 2 and shared.count("base-") == 2 and shared.count("-data") == 1


def sweep_process(path, *launcher):
    command = [sys.executable, *(launcher or ("-m",)), "resa_hf.cli", "sweep", "--config", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
def test_another_process_takes_over_from_one_that_is_killed(swept, tmp_path):
    path = write(tmp_path / "layers.yaml", recipe(tmp_path / "out", **LAYERS))
    first = sweep_process(path)
    end = time.monotonic() + 300
    while not any((tmp_path / "out").glob("hookpoint-*/arms/**/tuning.json")):  # in the middle of a point
        assert first.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    second = sweep_process(path)
    time.sleep(5)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    told = second.communicate(timeout=600)[1]
    assert second.returncode == 0, told
    one, other = (report_in(folder)["points"] for folder in (tmp_path / "out", swept))
    assert [[without_times(arm) for arm in point["arms"]] for point in one] == [
        [without_times(arm) for arm in point["arms"]] for point in other
    ]


@pytest.mark.long
def test_launched_as_two_processes_they_share_the_points(swept, tmp_path):
    path = write(tmp_path / "layers.yaml", recipe(tmp_path / "out", **LAYERS))
    launched = sweep_process(path, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m")
    printed, told = launched.communicate(timeout=600)
    assert launched.returncode == 0, told
    for hookpoint in HOOKPOINTS:
        assert printed.count(f"hookpoint-{hookpoint}: ") == 1
    one, other = (report_in(folder)["points"] for folder in (tmp_path / "out", swept))
    for mine, theirs in zip(one, other, strict=True):
        for arm, same in zip(mine["arms"], theirs["arms"], strict=True):
            assert arm["by_seed"] == same["by_seed"] and math.isclose(arm["accuracy"]["low"], same["accuracy"]["low"])


@pytest.mark.parametrize(
    ("visible", "rank", "gpu"), [(None, 3, "3"), ("4,5,6,7", 2, "6"), ("GPU-a,GPU-b", 1, "GPU-b"), ("", 1, "")]
)
def test_a_launched_process_takes_the_gpu_of_its_rank_and_forgets_the_others(visible, rank, gpu):
    launched = {"LOCAL_RANK": str(rank), "RANK": "9", "WORLD_SIZE": "16", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    launched |= {"OMPI_COMM_WORLD_SIZE": "16", "PMI_SIZE": "16"}
    launched |= {"ACCELERATE_MIXED_PRECISION": "bf16", "TORCHELASTIC_RUN_ID": "x", "PATH": "/bin", "HF_TOKEN": "t"}
    environment = launched | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    work_alone(environment)
    assert environment == {"PATH": "/bin", "HF_TOKEN": "t", "CUDA_VISIBLE_DEVICES": gpu}
    alone = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1"}
    work_alone(alone)
    assert alone == {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1"}
