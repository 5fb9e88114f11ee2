"""A run's arms, folder, results and report, on answers written by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from resa_hf.errors import DataError, JobError
from resa_hf.evaluation.engine import Sampling
from resa_hf.experiment.arms import BASE, Arm, Candidate, make_arms
from resa_hf.experiment.folder import RunFolder, claim, write_json
from resa_hf.experiment.pipeline import run_experiment
from resa_hf.experiment.plan import plan
from resa_hf.experiment.prepare import prepare
from resa_hf.experiment.report import as_plain, table, write_report
from resa_hf.experiment.results import choose_candidates, collect, harness_check
from resa_hf.experiment.schedule import arm_jobs, choosing_jobs, stage1_jobs, workers
from resa_hf.experiment.settings import RunArguments, RunSettings
from resa_hf.experiment.stages import _saes_of

ONLY = Candidate(1e-6)
CHOSEN = {"good": ONLY, "control noise": ONLY, "other": ONLY}
DATA = {"rows": "All.", "train_rows": 5, "held_out_rows": 200, "tokens": {"train": {"describe": "5 documents."}}}
PLANNED = plan({"held_out": (200, 1)}, 5)


def settings(arms, seeds=(0, 1, 2, 3, 4), **run):
    defaults = {"model_name_or_path": "base", "source_model": "source", "dataset": "d", "template": "chat"}
    arguments = RunArguments(**defaults | {"seeds": list(seeds), "selection": 2} | run)
    return RunSettings(arguments, {"hookpoints": ["layers.1"]}, {}, Sampling(), arms)


def write_answers(place, split, correct, length=7, seconds=1.0):
    rows = [
        {"problem": str(i), "completions": ["x"], "correct": [bool(c)], "lengths": [length], "truncated": [False]}
        for i, c in enumerate(correct)
    ]
    path = place / "answers" / split / "held_out.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"task": "held_out", "seconds": seconds}
    path.write_text("\n".join(json.dumps(row) for row in [head, *rows]) + "\n")


def test_jobs():
    arms = [Arm("r", "none", "random_adapter", like="a"), Arm("a"), Arm("b", "base"), Arm("k", "none", "zero_adapter")]
    run = settings(arms, seeds=(3, 4), learning_rates=[1e-3, 1e-4])
    assert {(j.source, j.seed) for j in stage1_jobs(run)} == {(s, n) for s in ("source", "base") for n in (3, 4)}
    low, high = Candidate(1e-4), Candidate(1e-3)
    chosen = [(j.arm.name, j.candidates, j.seed, j.split) for j in choosing_jobs(run)]
    assert chosen == [(name, (rate,), 3, "selection") for name in "ab" for rate in (low, high)]
    first, then = arm_jobs(run, {"a": high, "b": low})
    assert [(j.arm.name, j.candidates, j.seed) for j in first] == [
        (name, rate, seed)
        for seed in (3, 4)
        for name, rate in (("base", ()), ("a", (high,)), ("b", (low,)), ("k", ()))
    ]
    # It needs the adapter that it is to be as large as.
    assert [(j.arm.name, j.candidates, j.seed) for j in then] == [("r", (high,), 3), ("r", (high,), 4)]
    # Without another source, one SAE serves as the base's and the source's.
    alone = settings(arms, seeds=(0,), source_model=None)
    assert [(j.source, j.seed) for j in stage1_jobs(alone)] == [("source", 0)]
    assert choosing_jobs(settings(arms, learning_rates=[1e-3])) == []


def test_checkpoints_of_one_training_are_one_job():
    run = settings([Arm("a")], learning_rates=[1e-3, 1e-4], checkpoints=[20, 10])
    assert [j.candidates for j in choosing_jobs(run)] == [
        tuple(Candidate(rate, step) for step in (10, 20)) for rate in (1e-4, 1e-3)
    ]
    folder = RunFolder(Path("run"))
    early = folder.arm(Arm("a"), Candidate(1e-4, 10), 0)
    assert early.parent == folder.training(Arm("a"), Candidate(1e-4), 0) == folder.arm(Arm("a"), Candidate(1e-4), 0)


def test_controls_say_what_stage_1_must_train():
    def sources(**tuning):
        return Arm("a", "source", tuning=tuning).sae_sources

    assert (
        sources()
        == sources(control="noise")
        == sources(control="other_layer", control_sae_id="layers.1")
        == {"source"}
    )
    assert sources(control="prose_sae") == {"source", "source-prose"}
    assert sources(control="random_source_sae") == {"source", "source-random"}
    assert sources(control="prose_sae", control_sae="mine") == {"source"}
    assert Arm("a", "none").sae_sources == Arm("a", adapter="mine").sae_sources == set()
    alone = settings([Arm("a", "base", tuning={"control": "prose_sae"})], source_model=None)
    assert alone.sae_sources == ["source", "source-prose"]


def test_learning_rate_and_checkpoint_are_chosen_on_the_selection_questions(tmp_path):
    arms = [Arm("a", "none", tuning={"kl_reference": "source"}), Arm("tied", "none"), Arm("k", "none", "zero_adapter")]
    run, folder = settings(arms, learning_rates=[1e-3, 1e-4], checkpoints=[5, 9]), RunFolder(tmp_path)
    right = {("a", 1e-3, 5): [1, 1], ("tied", 1e-3, 9): [1, 0], ("tied", 1e-4, 9): [0, 1]}
    for arm in arms[:2]:
        for candidate in run.candidates:
            correct = right.get((arm.name, candidate.rate, candidate.step), [0, 0])
            write_answers(folder.arm(arm, candidate, 0), "selection", correct)
            # What the test questions would say must not matter.
            write_answers(folder.arm(arm, candidate, 0), "held_out", [1 - c for c in correct])
    chosen, chosen_by = choose_candidates(folder, run, choosing_jobs(run))
    assert chosen == {"a": Candidate(1e-3, 5), "tied": Candidate(1e-4, 9)}
    assert chosen_by["a"]["lr 0.001, step 5"] == 1.0 and len(chosen_by["a"]) == 4
    on_test = settings(arms, learning_rates=[1e-3, 1e-4], checkpoints=[5, 9], choose_on_test=True, selection=0)
    worst, _ = choose_candidates(folder, on_test, choosing_jobs(on_test))
    assert worst["a"] == Candidate(1e-4, 5)


@pytest.fixture
def judged(tmp_path):
    """Base at 0.5; one arm 0.2 better with some spread, one equal, one 0.3 worse, one better like its control."""
    problems, folder = 200, RunFolder(tmp_path)
    arms = [
        Arm("good", "source", tuning={"control": None}),
        Arm("control noise", "source", tuning={"control": "noise"}),
        Arm("zero", "none", "zero_adapter"),
        Arm("loss", "none", "weight_noise"),
        Arm("other", "base"),
    ]
    run = settings(arms, held_out=problems)
    rng = np.random.default_rng(0)
    accuracies = {}
    for seed in run.run.seeds:
        base = rng.random(problems) < 0.5
        shares = {"good": 0.7, "control noise": 0.7, "loss": 0.2, "other": 0.7}
        correct = {name: rng.random(problems) < share for name, share in shares.items()} | {"base": base, "zero": base}
        for arm in (BASE, *arms):
            place = folder.arm(arm, ONLY if arm.is_trained else None, seed)
            write_answers(place, "held_out", correct[arm.name])
            if arm.is_trained:
                evaluations = [{"step": 0, "eval_kl": 0.5}, {"step": 9, "eval_kl": 0.1 * (seed + 1)}]
                tuning = {"seconds": 2.0, "tokens": 10, "steps": 9, "evaluations": evaluations}
                write_json(place / "tuning.json", tuning)
            write_json(place / "movement.json", {"kl": 0.01 * seed, "update_norm": 2.0})
            accuracies.setdefault(arm.name, []).append(correct[arm.name].mean())
        quality = {"eval_fvu/layers.1": 0.1 + 0.1 * seed, "eval_loss": 9.0}
        for source in ("source", "base"):
            write_json(folder.sae(source, seed) / "stage1.json", {"seconds": 3.0, "tokens": 9, "quality": quality})
    return folder, run, accuracies


def test_results_against_scipy(judged):
    folder, run, accuracies = judged
    results = {r.arm.name: r for r in collect(folder, run, CHOSEN)}
    assert list(results) == ["base", "good", "control noise", "zero", "loss", "other"]
    for name in ("good", "control noise", "loss"):
        expected = stats.ttest_rel(accuracies[name], accuracies["base"])
        interval = expected.confidence_interval()
        compared = results[name].compared
        assert compared.difference.p_value == pytest.approx(expected.pvalue)
        assert (compared.difference.low, compared.difference.high) == pytest.approx((interval.low, interval.high))
        assert compared.adjusted_p >= compared.difference.p_value
        assert compared.accuracy.estimate == pytest.approx(np.mean(accuracies[name]))
    words = {name: r.compared.verdict.word for name, r in results.items() if r.compared.verdict}
    assert words == {
        "good": "better than base but not than each control", "control noise": "better", "zero": "equivalent",
        "loss": "worse", "other": "better",
    }  # fmt: skip
    # A control with another SAE is not this arm's: it would not be matched.
    assert "nothing stood in for its SAE" in results["other"].compared.verdict.sentence
    assert "control control noise" in results["good"].compared.verdict.sentence
    good = results["good"]
    assert (good.initial_kl, good.final_kl, good.without_sae["kl"]) == pytest.approx((0.5, 0.3, 0.02))
    assert good.seconds == {"training": 10.0, "answers": 5.0} and good.tokens == {"training": 50, "answers": 7000}


def test_gain_recovered_is_told_where_an_arm_was_trained_by_rl(judged):
    folder, run, accuracies = judged
    run = RunSettings(
        RunArguments(**{**vars(run.run), "rl_arm": "control noise"}), run.stage1, run.stage2, run.sampling, run.arms
    )
    results = {r.arm.name: r.compared for r in collect(folder, run, CHOSEN)}
    base, good, rl = (np.mean(accuracies[name]) for name in ("base", "good", "control noise"))
    assert results["good"].retention.estimate == pytest.approx(good / rl)
    assert results["good"].gain_recovered.estimate == pytest.approx((good - base) / (rl - base))
    assert results["control noise"].retention is None
    assert "gain recovered" in write_report(folder, run, collect(folder, run, CHOSEN), DATA, {}, PLANNED)


def test_fewer_than_five_seeds_judge_the_adapter_not_the_method(judged):
    folder, run, _ = judged
    one = RunSettings(RunArguments(**{**vars(run.run), "seeds": [0]}), run.stage1, run.stage2, run.sampling, run.arms)
    results = collect(folder, one, CHOSEN)
    assert [r.compared.difference.over for r in results[1:]] == ["problems"] * 5
    assert results[3].compared.verdict.word == "equivalent"


def test_report_can_be_read_by_people_and_programs(judged):
    folder, run, _ = judged
    read = {"source": {"name": "me/source", "commit": "5" * 40}}
    for path in folder.root.glob("sae/source/*/stage1.json"):
        write_json(path, json.loads(path.read_text()) | {"revisions": read})
    results = collect(folder, run, CHOSEN)
    text = write_report(folder, run, results, DATA, {}, PLANNED)
    assert "Harness check: FAILED" not in text and "Harness check: passed. 2 arms" in text
    assert "verdicts on the method" in text and "fvu/layers.1 0.3" in text and PLANNED["text"] in text
    lines = table(results).splitlines()
    assert len(lines) == 8 and len({len(line) for line in lines}) == 1
    assert lines[5].startswith("| zero ") and "+0.0" in lines[5]
    report = json.loads((folder.root / "report.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == ["base", "good", "control noise", "zero", "loss", "other"]
    assert report["arms"][2]["verdict"]["word"] == "better" and report["settings"]["run"]["seeds"] == [0, 1, 2, 3, 4]
    assert report["costs"]["Stage II"]["seconds"] == 30 and report["costs"]["Stage I"]["tokens"] == 90
    assert (folder.root / "report.png").stat().st_size > 10_000
    assert report["revisions"] == {"base": {"name": "base", "commit": None}, **read}
    written = (folder.root / "report.md").read_text()
    assert "![accuracy by arm](report.png)" in written and f"source me/source@{'5' * 40}." in written


def test_what_was_chosen_on_the_test_set_says_so(judged):
    folder, run, _ = judged
    chosen = RunArguments(**{**vars(run.run), "choose_on_test": True})
    run = RunSettings(chosen, run.stage1, run.stage2, run.sampling, run.arms)
    text = write_report(folder, run, collect(folder, run, CHOSEN), DATA, {"good": {"lr 1e-06": 0.7}}, PLANNED)
    assert "**Selected on the test set.**" in text
    assert json.loads((folder.root / "report.json").read_text())["chosen_on"] == "the test set"


def test_a_harness_that_gets_a_known_case_wrong_says_so(judged):
    folder, run, _ = judged
    arms = [Arm("loss", "none", "zero_adapter")]  # made as a loss, but claimed to change nothing
    wrong = RunSettings(run.run, run.stage1, run.stage2, run.sampling, arms)
    results = collect(folder, wrong, {})
    assert harness_check(results) == [("loss", "equivalent", "worse")]
    text = write_report(folder, wrong, results, DATA, {}, PLANNED)
    assert "Harness check: FAILED. loss should be equivalent, got worse" in text


def test_a_folder_with_another_run_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    claim(folder.root, as_plain(settings([Arm("a")])))
    claim(folder.root, as_plain(settings([Arm("a")], processes=2)))  # how many processes does not change the results
    with pytest.raises(DataError, match=r"other settings \(run.seeds\)"):
        claim(folder.root, as_plain(settings([Arm("a")], seeds=(0,))))
    with pytest.raises(DataError, match=r"other settings \(arms\)"):
        claim(folder.root, as_plain(settings([Arm("b")])))
    claim(folder.root, as_plain(settings([Arm("b")])), free=("arms",))
    claim(folder.root, as_plain(settings([Arm("b")])))


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written: Not a directory"):
        claim(tmp_path / "file" / "run", as_plain(settings([Arm("a")])))


def test_data_that_has_changed_since_is_refused(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"problem": f"{a}+{b} mod 10", "answer": str((a + b) % 10)} for a in range(9) for b in range(9)]
    path.write_text("\n".join(map(json.dumps, rows)))
    run = settings([], model_name_or_path="resa_hf/tiny/base", source_model=None, dataset=str(path), held_out=9).run
    folder = RunFolder(tmp_path / "run")
    first = prepare(folder, run, 32)
    assert prepare(folder, run, 32) == first
    path.write_text("\n".join(map(json.dumps, rows[:-1])))
    with pytest.raises(DataError, match="has changed since the run"):
        prepare(folder, run, 32)


def test_a_control_differs_in_nothing_else_or_is_a_random_adapter_or_cot_free_sft():
    noise = Arm("n", "source", tuning={"control": "noise", "sae_gradient": "stop"})
    assert noise.is_control_of(Arm("a", "source", tuning={"sae_gradient": "stop"}))
    assert not noise.is_control_of(Arm("a", "source"))
    assert not noise.is_control_of(Arm("a", "base", tuning={"sae_gradient": "stop"}))
    assert not noise.is_control_of(noise)
    assert not Arm("a", "source").is_control_of(Arm("b", "source"))
    random = Arm("r", "none", "random_adapter", like="a")
    assert random.is_control_of(Arm("a", "source")) and not random.is_control_of(Arm("b", "source"))
    sft = Arm("s", "none", tuning={"kl_weight": 0.0, "sft_weight": 1.0})
    assert sft.is_control_of(Arm("a", "source")) and sft.is_control_of(Arm("t", "none", adapter="mine"))
    assert not sft.is_control_of(noise) and not sft.is_control_of(Arm("k", "none", "zero_adapter"))


def test_a_job_that_fails_is_named(tmp_path):
    run = settings([Arm("my arm", "none")], seeds=(7,))
    message = "my arm, seed 7: The rows in .*train are missing or damaged .FileNotFoundError"
    with workers(RunFolder(tmp_path), run) as run_jobs, pytest.raises(JobError, match=message):
        run_jobs(arm_jobs(run, {"my arm": ONLY})[0][1:], "title")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"a": {"sae_from": "teacher"}}, "sae_from is 'teacher' .*valid: source, base, pretrained, none"),
        ({"a": {"known": "gain"}}, "known is 'gain' .*valid: zero_adapter, svd_of_source, weight_noise"),
        ({"a b": {}, "A-B": {}}, "stay different as folder names"),
        ({"Base": {}}, "none may be 'base'"),
        ({"a": {"sae_from": "pretrained"}}, "wants the pretrained SAE, but `sae` is not set"),
        ({"a": {"known": "random_adapter"}}, "like is None; a random_adapter, and no other, needs a trained arm"),
        ({"a": {"known": "random_adapter", "like": "b"}}, "like is 'b'"),
        ({"a": {"known": "zero_adapter", "adapter": "mine"}}, "both known .* and taken"),
    ],
)
def test_bad_arms(section, message):
    with pytest.raises(ValueError, match=message):
        make_arms(section, False, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": ""}, "model_name_or_path is not set"),
        ({"dataset": ""}, "dataset is not set"),
        ({"template": "plain"}, "template is 'plain'; it must be one of paper, chat"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"seeds": []}, "seeds is"),
        ({"seeds": [1, 1]}, "each once"),
        ({"learning_rates": ["1e-4", 1e-3], "selection": 0}, "no selection questions"),
        ({"checkpoints": [5, 10], "selection": 0}, "no selection questions"),
        ({"checkpoints": [0]}, "checkpoints is"),
        ({"held_out": 0}, "held_out is 0; it must be at least 2"),
        ({"margin": 0.0}, "margin is 0.0"),
        ({"lora_r": 0}, "lora_r is 0"),
    ],
)
def test_bad_run_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        settings([], **changes)


def test_settings_may_not_change_once_something_has_answered(tmp_path):
    first, folder = settings([Arm("a")]), RunFolder(tmp_path)
    claim(folder.root, as_plain(first))
    write_answers(folder.arm(BASE, None, 0), "held_out", [1, 0])
    with pytest.raises(DataError, match=r"other settings \(arms\)"):
        run_experiment(folder, settings([Arm("b")]))


def test_an_arm_may_take_another_sae_of_the_repo(tmp_path):
    run = settings(
        [Arm("a", "pretrained"), Arm("b", "pretrained", tuning={"sae_id": "layers.3"})], sae="r", sae_id="x"
    )
    found = [_saes_of(RunFolder(tmp_path), run, arm, 0) for arm in run.arms]
    assert [saes["sae_id"] for saes in found] == ["x", "layers.3"] and found[0]["sae"] == "r"
