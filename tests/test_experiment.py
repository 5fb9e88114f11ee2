"""A run's arms, folder, results and report, on answers written by hand."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig
from scipy import stats

from resa_hf.errors import DataError, JobError
from resa_hf.evaluation.engine import Sampling
from resa_hf.experiment.folder import BASE, RunFolder, claim, write_json
from resa_hf.experiment.known import make_known
from resa_hf.experiment.prepare import prepare
from resa_hf.experiment.report import as_plain, table, write_report
from resa_hf.experiment.results import choose_rates, collect, harness_check
from resa_hf.experiment.schedule import arm_jobs, choosing_jobs, stage1_jobs, workers
from resa_hf.experiment.settings import Arm, RunArguments, RunSettings, make_arms
from resa_hf.experiment.stages import _last_whole_checkpoint

LORA = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
RATES = {"good": 1e-6, "control noise": 1e-6, "other": 1e-6}
IDS = torch.arange(3, 23).reshape(2, 10)


def settings(arms, seeds=(0, 1, 2, 3, 4), **run):
    defaults = {"model_name_or_path": "base", "source_model": "source", "dataset": "d", "template": "chat"}
    arguments = RunArguments(**defaults | {"seeds": list(seeds), "selection": 2} | run)
    return RunSettings(arguments, {"hookpoints": ["layers.1"]}, {}, Sampling(), arms)


def write_answers(path, correct, length=7, seconds=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "problem": str(i),
            "answer": "1",
            "completions": ["x"],
            "correct": [bool(c)],
            "lengths": [length],
            "truncated": [False],
        }
        for i, c in enumerate(correct)
    ]
    path.write_text("\n".join(json.dumps(row) for row in [{"seconds": seconds}, *rows]) + "\n")


def test_zero_adapter_is_the_base_and_noise_is_not(make_model):
    expected = make_model("qwen2")(IDS).logits
    assert torch.equal(make_known("zero_adapter", make_model("qwen2"), LORA, None, 0)(IDS).logits, expected)
    noisy = [make_known("weight_noise", make_model("qwen2"), LORA, None, seed)(IDS).logits for seed in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.allclose(noisy[0], expected) and not torch.allclose(noisy[0], noisy[2])


def test_svd_of_source_gives_the_source_where_the_rank_allows(make_model):
    base, source = make_model("qwen2"), make_model("qwen2")
    with torch.no_grad():  # a source that differs by updates of rank 3
        for name, module in source.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                out, into = module.weight.shape
                module.weight += 0.2 * torch.randn(out, 3) @ torch.randn(3, into)
    tuned = make_known("svd_of_source", base, LORA, source, 0)
    torch.testing.assert_close(tuned(IDS).logits, source(IDS).logits, rtol=1e-3, atol=1e-4)
    with tuned.disable_adapter():
        assert not torch.allclose(tuned(IDS).logits, source(IDS).logits, atol=0.1)


def test_jobs(tmp_path):
    arms = [Arm("a", "source"), Arm("b", "base"), Arm("k", "none", "zero_adapter")]
    run = settings(arms, seeds=(3, 4), learning_rates=[1e-3, 1e-4])
    assert {(j.source, j.seed) for j in stage1_jobs(run)} == {(s, n) for s in ("source", "base") for n in (3, 4)}
    chosen = [(j.arm.name, j.rate, j.seed, j.split) for j in choosing_jobs(run)]
    assert chosen == [(name, rate, 3, "selection") for name in "ab" for rate in (1e-4, 1e-3)]
    final = [(j.arm.name, j.rate, j.seed) for j in arm_jobs(run, {"a": 1e-3, "b": 1e-4})]
    assert final == [
        (name, rate, seed) for seed in (3, 4) for name, rate in (("base", None), ("a", 1e-3), ("b", 1e-4), ("k", None))
    ]
    # Without another source, one SAE serves as the base's and the source's.
    alone = settings(arms, seeds=(0,), source_model=None)
    assert [(j.source, j.seed) for j in stage1_jobs(alone)] == [("source", 0)]
    assert choosing_jobs(settings(arms, learning_rates=[1e-3])) == []


def test_learning_rate_is_chosen_on_the_selection_questions(tmp_path):
    arms = [Arm("a", "none", tuning={"kl_reference": "source"}), Arm("tied", "none"), Arm("k", "none", "zero_adapter")]
    run, folder = settings(arms, learning_rates=[1e-3, 1e-4]), RunFolder(tmp_path)
    for name, rate, correct in (
        ("a", 1e-4, [0, 1]),
        ("a", 1e-3, [1, 1]),
        ("tied", 1e-4, [0, 1]),
        ("tied", 1e-3, [1, 0]),
    ):
        arm = next(arm for arm in arms if arm.name == name)
        write_answers(folder.arm(arm, rate, 0) / "selection-sampled.jsonl", correct)
        # What the test questions would say must not matter.
        write_answers(folder.arm(arm, rate, 0) / "held_out-sampled.jsonl", [1 - c for c in correct])
    rates, chosen_by = choose_rates(folder, run, choosing_jobs(run))
    assert rates == {"a": 1e-3, "tied": 1e-4}
    assert chosen_by["a"] == {1e-4: 0.5, 1e-3: 1.0}


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
            place = folder.arm(arm, 1e-6 if arm.known is None and arm != BASE else None, seed)
            write_answers(place / "held_out-sampled.jsonl", correct[arm.name])
            kl = {"eval_kl": 0.5, "eval_loss": 0.5}
            write_json(place / "tuning.json", {"seconds": 2.0, "initial": kl, "final": {"eval_kl": 0.1 * (seed + 1)}})
            accuracies.setdefault(arm.name, []).append(correct[arm.name].mean())
        quality = {"eval_fvu/layers.1": 0.1 + 0.1 * seed, "eval_loss": 9.0}
        for source in ("source", "base"):
            write_json(folder.sae(source, seed) / "stage1.json", {"seconds": 3.0, "quality": quality, "log": []})
    return folder, run, accuracies


def test_results_against_scipy(judged):
    folder, run, accuracies = judged
    results = {r.arm.name: r for r in collect(folder, run, RATES)}
    assert list(results) == ["base", "good", "control noise", "zero", "loss", "other"]
    for name in ("good", "control noise", "loss"):
        expected = stats.ttest_rel(accuracies[name], accuracies["base"])
        interval = expected.confidence_interval()
        difference = results[name].difference
        assert difference.p_value == pytest.approx(expected.pvalue)
        assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
        assert results[name].adjusted_p >= difference.p_value
        assert results[name].accuracy.estimate == pytest.approx(np.mean(accuracies[name]))
    assert results["zero"].difference.estimate == results["zero"].difference.high == 0
    words = {name: r.verdict.word for name, r in results.items() if r.verdict}
    assert words == {
        "good": "better", "control noise": "better", "zero": "equivalent", "loss": "worse", "other": "better",
    }  # fmt: skip
    # A control with another SAE is not this arm's: it would not be matched.
    assert results["other"].controls == "better than base; compared with no control, so what did it is open"
    assert "but not than control control noise" in results["good"].controls
    assert results["control noise"].controls == ""
    assert (results["good"].initial_kl, results["good"].final_kl) == pytest.approx((0.5, 0.3))
    assert results["good"].seconds == {"training": 10.0, "answers": 5.0}


def test_fewer_than_five_seeds_judge_the_adapter_not_the_method(judged):
    folder, run, _ = judged
    one = RunSettings(RunArguments(**{**vars(run.run), "seeds": [0]}), run.stage1, run.stage2, run.sampling, run.arms)
    results = collect(folder, one, RATES)
    assert [r.difference.over for r in results[1:]] == ["problems"] * 5
    assert results[3].verdict.word == "equivalent"


def test_report_can_be_read_by_people_and_programs(judged):
    folder, run, _ = judged
    results = collect(folder, run, RATES)
    data = {"rows": "All.", "train_rows": 5, "held_out_rows": 200, "tokens": {"train": {"describe": "5 documents."}}}
    text = write_report(folder, run, results, data, {})
    assert "Harness check: FAILED" not in text and "Harness check: passed. 2 arms" in text
    assert "verdicts on the method" in text and "fvu/layers.1 0.3" in text
    lines = table(results).splitlines()
    assert len(lines) == 8 and len({len(line) for line in lines}) == 1
    assert lines[5].startswith("| zero ") and "+0.0" in lines[5]
    report = json.loads((folder.root / "report.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == ["base", "good", "control noise", "zero", "loss", "other"]
    assert report["arms"][1]["verdict"]["word"] == "better" and report["settings"]["run"]["seeds"] == [0, 1, 2, 3, 4]
    assert (folder.root / "report.png").stat().st_size > 10_000
    assert "![accuracy by arm](report.png)" in (folder.root / "report.md").read_text()


def test_a_harness_that_gets_a_known_case_wrong_says_so(judged):
    folder, run, _ = judged
    arms = [Arm("loss", "none", "zero_adapter")]  # made as a loss, but claimed to change nothing
    wrong = RunSettings(run.run, run.stage1, run.stage2, run.sampling, arms)
    results = collect(folder, wrong, {})
    assert harness_check(results) == [("loss", "equivalent", "worse")]
    data = {"rows": "All.", "train_rows": 5, "held_out_rows": 200, "tokens": {"train": {"describe": "5 documents."}}}
    assert "Harness check: FAILED. loss should be equivalent, got worse" in write_report(
        folder, wrong, results, data, {}
    )


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


def test_only_an_arm_that_differs_in_nothing_else_is_a_control_of_another():
    noise = Arm("n", "source", tuning={"control": "noise", "sae_gradient": "stop"})
    assert noise.is_control_of(Arm("a", "source", tuning={"sae_gradient": "stop"}))
    assert not noise.is_control_of(Arm("a", "source"))
    assert not noise.is_control_of(Arm("a", "base", tuning={"sae_gradient": "stop"}))
    assert not noise.is_control_of(noise)
    assert not Arm("a", "source").is_control_of(Arm("b", "source"))


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    assert _last_whole_checkpoint(tmp_path / "nowhere") is None
    for step, whole in ((9, True), (10, True), (11, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert _last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_job_that_fails_is_named(tmp_path):
    run = settings([Arm("my arm", "none")], seeds=(7,))
    message = "my arm, seed 7: Model 'base' cannot be loaded"
    with workers(RunFolder(tmp_path), run) as run_jobs, pytest.raises(JobError, match=message):
        run_jobs(arm_jobs(run, {"my arm": 1e-3})[1:], "title")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"a": {"sae_from": "teacher"}}, "sae_from is 'teacher' .*valid: source, base, pretrained, none"),
        ({"a": {"known": "gain"}}, "known is 'gain' .*valid: zero_adapter, svd_of_source, weight_noise"),
        ({"a b": {}, "A-B": {}}, "stay different as folder names"),
        ({"Base": {}}, "none may be 'base'"),
        ({"a": {"sae_from": "pretrained"}}, "wants the pretrained SAE, but `sae` is not set"),
    ],
)
def test_bad_arms(section, message):
    with pytest.raises(ValueError, match=message):
        make_arms(section, settings([]).run)


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
        ({"held_out": 0}, "held_out is 0; it must be at least 1"),
        ({"margin": 0.0}, "margin is 0.0"),
        ({"lora_r": 0}, "lora_r is 0"),
    ],
)
def test_bad_run_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        settings([], **changes)
