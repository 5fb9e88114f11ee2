"""`resa-hf evaluate` as users run it, on the tiny reasoner."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

pytest.importorskip("lighteval")

from resa_hf.cli import main
from resa_hf.commands.dry_run import describe_evaluation
from resa_hf.evaluation.arguments import EvaluateArguments
from resa_hf.evaluation.engine import Completion, Outcomes
from resa_hf.evaluation.pipeline import TaskResult
from resa_hf.evaluation.plot import plot_comparison
from resa_hf.experiment import evaluate as evaluation
from resa_hf.experiment import evaluate_report
from resa_hf.tiny import tiny_path
from resa_hf.tiny.task import make_rows, training_questions

SOURCE = str(tiny_path("source"))


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "chains.jsonl"
    rows = make_rows(40, seed=7, exclude=training_questions())
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(folder, *flags):
    return main(
        ["evaluate", "--model_name_or_path", "resa_hf/tiny/base", "--dtype", "float32", "--file_prompt", "plain",
         "--temperature", "1.0", "--top_p", "1.0", "--max_new_tokens", "64", "--output_dir", str(folder), *flags]
    )  # fmt: skip


def test_a_better_adapter_is_called_better_and_a_rerun_answers_nothing_again(problems, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ("--adapters", f"source={SOURCE}", "--tasks", str(problems), "--samples", "4", "--rl_adapter", "source")
    overlap = tmp_path / "train.jsonl"
    overlap.write_text(problems.read_text().splitlines()[3] + "\n")
    assert evaluate(out, *flags, "--check_overlap", str(overlap)) == 0
    printed = capsys.readouterr().out
    assert "Planned: 40 problems, 1 seed." in printed and "verdicts on this adapter" in printed
    report = json.loads((out / "report.json").read_text())
    base, source = report["models"]
    # The card of the tiny reasoner: 0.702 and 0.961 on 2,000 problems.
    assert base["accuracy"]["low"] < 0.702 < base["accuracy"]["high"]
    assert source["accuracy"]["low"] < 0.961 < source["accuracy"]["high"]
    assert source["verdict"]["word"] == "better" and "compared with no control" in source["verdict"]["sentence"]
    assert source["moved"]["kl"] > 0.01 and source["moved"]["update_norm"] > 1
    assert report["overlap"][str(overlap)]["counts"]["resa:chains"]["exact"] == 1
    assert report["costs"]["base"]["tokens"] > 1000
    assert report["revisions"] == {"base": {"name": "resa_hf/tiny/base", "commit": None}} and report["tasks"] == {}
    assert base["adapter"] is None and source["adapter"] == {"name": "resa_hf/tiny/source", "commit": None}
    assert (out / "report.png").stat().st_size > 10_000 and "pass@4 %" in (out / "report.md").read_text()
    stored = list((out / "models").glob("*/completions/*.jsonl"))
    before = {path: path.stat().st_mtime_ns for path in stored}
    assert len(before) == 2
    assert evaluate(out, *flags) == 0
    assert {path: path.stat().st_mtime_ns for path in stored} == before
    again = json.loads((out / "report.json").read_text())
    assert [model["accuracy"] for model in again["models"]] == [base["accuracy"], source["accuracy"]]


def test_an_adapter_that_does_nothing_ends_it_and_what_was_answered_is_kept(problems, tmp_path, capsys):
    zeros, out = tmp_path / "zeros", tmp_path / "out"
    shutil.copytree(SOURCE, zeros)
    tensors = load_file(zeros / "adapter_model.safetensors")
    save_file({name: tensor * 0 for name, tensor in tensors.items()}, zeros / "adapter_model.safetensors")
    assert evaluate(out, "--adapters", SOURCE, str(zeros), "--tasks", str(problems), "--samples", "1") == 2
    assert "is all zeros" in capsys.readouterr().err
    assert len(list((out / "models").glob("*/completions/*.jsonl"))) == 2


def test_an_adapter_of_another_base_is_refused_with_the_first_tensor(problems, tmp_path, make_model, capsys):
    other = get_peft_model(make_model("qwen2"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    other.save_pretrained(tmp_path / "other")
    status = evaluate(tmp_path / "out", "--adapters", str(tmp_path / "other"), "--tasks", str(problems))
    error = capsys.readouterr().err
    assert status == 2 and "does not fit" in error and "q_proj" in error


def test_a_task_without_rows_is_told_before_anything_is_answered(problems, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert evaluate(tmp_path / "out", "--tasks", str(problems), str(empty)) == 2
    assert "empty.jsonl has no rows" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("models/*"))


def test_a_dry_run_answers_nothing(problems, tmp_path, capsys):
    assert evaluate(tmp_path / "out", "--tasks", str(problems), "--adapters", SOURCE, "--dry_run") == 0
    printed = capsys.readouterr().out
    assert "Predicted memory, at most" in printed and f"Would load: resa_hf/tiny/base, {SOURCE}" in printed
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_the_float32_copy_that_checks_an_adapter(tmp_path):
    width, inner, layers, vocabulary = 1024, 4096, 16, 32_768
    LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8,
        vocab_size=vocabulary, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    parameters = 2 * vocabulary * width + layers * (4 * width**2 + 3 * width * inner + 2 * width) + width
    settings = {"model_name_or_path": str(tmp_path), "dtype": "bfloat16", "tasks": ["resa"]}
    text = describe_evaluation(EvaluateArguments(**settings, adapters=["mine"]))
    model, copy = (f"{parameters * size / 2**30:.2f}" for size in (2, 4))
    assert f"check of an adapter: {parameters * 6 / 2**30:.2f} GiB = model {model} + float32_copy {copy}" in text
    assert "check of an adapter" not in describe_evaluation(EvaluateArguments(**settings))


def results(rows, *tasks):
    """Tasks that were all answered by these letters; `a` is right."""
    right = np.array([[letter == "a" for letter in row] for row in rows])
    completions = [[Completion(letter, 1, False, ()) for letter in row] for row in rows]
    outcomes = Outcomes(right, np.ones_like(right, int), np.zeros_like(right), completions)
    names = [str(row) for row in range(len(rows))]
    return {task: TaskResult(task, names, names, outcomes, [list(row) for row in rows], 3600.0) for task in tasks}


@pytest.mark.long
def test_no_git_is_needed(tmp_path):
    words = [sys.executable, "-m", "resa_hf.cli", "evaluate", "--model_name_or_path", str(tmp_path / "none")]
    words += ["--adapters", "x=y", "--tasks", "resa:aime24", "--output_dir", str(tmp_path)]
    done = subprocess.run(words, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2 and "git" not in done.stderr.lower().replace("github", ""), done.stderr


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Writes the report of a base that gave these answers, and returns it with its text and the picture's label."""

    def write(rows, *tasks, **settings):
        labels = []
        monkeypatch.setattr(evaluate_report, "plot_comparison", lambda *args: labels.append(args[-1]))
        base = evaluation.Evaluated("base", results(rows, *tasks), {})
        args = EvaluateArguments(model_name_or_path="m", output_dir=str(tmp_path), samples=len(rows[0]), **settings)
        text = evaluate_report.write_evaluation(args, evaluation.Evaluation([base], {"text": ""}, {}))
        return json.loads((tmp_path / "report.json").read_text()), text, labels[0]

    return write


def test_the_report_has_pass_and_majority_at_powers_of_two_and_at_all_samples(report):
    rows = ["aab", "abc", "bba", "bcd", "aaa"]

    def majority(votes):
        most = [letter for letter, count in Counter(votes).items() if count == max(Counter(votes).values())]
        return Fraction("a" in most, len(most))

    written, text, _ = report(rows, "resa:x", tasks=["resa:x"])
    found = written["models"][0]["tasks_detail"]["resa:x"]["at_k"]
    assert list(found) == ["pass@2", "pass@3", "maj@2", "maj@3"]
    for k in (2, 3):
        drawn = [list(itertools.combinations(row, k)) for row in rows]
        assert found[f"pass@{k}"] == pytest.approx(np.mean([np.mean(["a" in votes for votes in d]) for d in drawn]))
        by_problem = [float(sum(map(majority, d)) / len(d)) for d in drawn]
        assert found[f"maj@{k}"] == pytest.approx(np.mean(by_problem))
        assert f"pass@{k} %" in text and f"{100 * np.mean(by_problem):.1f}" in text
    four = report(["aaab", "abab"], "resa:x", tasks=["resa:x"])[0]["models"][0]["tasks_detail"]["resa:x"]["at_k"]
    assert list(four) == ["pass@2", "pass@4", "maj@2", "maj@4"]
    one, text, _ = report(["a", "b"], "resa:x", tasks=["resa:x"])
    assert one["models"][0]["tasks_detail"]["resa:x"]["at_k"] == {} and "pass@" not in text


def test_the_average_of_several_tasks_is_called_so(report):
    _, text, label = report(["ab", "bb"], "resa:x", "resa:y", tasks=["resa"])
    assert "macro-average %" in text and label == "macro-average"
    _, text, label = report(["ab", "bb"], "resa:x", tasks=["resa:x"])
    assert "macro-average" not in text and label == "accuracy"


def test_gpu_hours_on_a_server_are_those_that_are_stated(report, monkeypatch):
    monkeypatch.setattr(evaluate_report, "gpus_held", lambda: 8)
    place = {"tasks": ["resa:x"], "server": "http://x"}
    written, *_ = report(["ab", "bb"], "resa:x", **place, gpus=2, price_per_gpu_hour=1.5)
    assert (written["costs"]["base"]["gpu_hours"], written["costs"]["base"]["dollars"]) == (2, 3)
    assert report(["ab", "bb"], "resa:x", **place)[0]["costs"]["base"]["gpu_hours"] == 0
    assert report(["ab", "bb"], "resa:x", tasks=["resa:x"])[0]["costs"]["base"]["gpu_hours"] == 8


def test_overlap_reads_the_question_column_and_no_answers(tmp_path, monkeypatch):
    task, train = tmp_path / "task.jsonl", tmp_path / "train.jsonl"
    question = "How many prime numbers lie between one and fifty?"
    chain = make_rows(1, seed=0, exclude=training_questions())[0]["problem"]  # the preset's first
    lines = [{"frage": text, "antwort": "1"} for text in (question, chain)]
    task.write_text("".join(json.dumps(line) + "\n" for line in lines))
    train.write_text(json.dumps({"frage": "other", "antwort": ""}) + "\n" + json.dumps({"frage": question}) + "\n")
    monkeypatch.setattr(evaluation, "_in_process", lambda *_: [])
    columns = {"question_column": "frage", "answer_column": "antwort"}
    args = EvaluateArguments(
        model_name_or_path="m", tasks=[str(task)], **columns, check_overlap=[str(train), "tiny-reasoner"],
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    found = evaluation.evaluate(args).overlap
    assert [(one.kind, one.row, one.train_row) for one in found[str(train)].overlaps] == [("exact", 0, 1)]
    assert [(one.kind, one.row, one.train_row) for one in found["tiny-reasoner"].overlaps] == [("exact", 1, 0)]


def test_a_picture_is_whole_or_the_one_before(tmp_path, monkeypatch):
    interval = SimpleNamespace(low=0.1, estimate=0.2, high=0.3)
    base = SimpleNamespace(name="base", accuracy=interval, by_seed=[0.2], verdict=None, difference=None)
    picture = tmp_path / "report.png"
    plot_comparison([base], picture, "", "accuracy")
    before = picture.read_bytes()
    assert before.startswith(b"\x89PNG") and before.endswith(b"IEND\xaeB`\x82") and len(list(tmp_path.iterdir())) == 1

    def torn(figure, path, **_):
        path.write_bytes(b"\x89PNG")
        raise OSError("No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", torn)
    with pytest.raises(OSError, match="No space"):
        plot_comparison([base], picture, "", "accuracy")
    assert picture.read_bytes() == before


def test_only_a_name_is_split_from_an_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-4" / "a").mkdir(parents=True)
    split = EvaluateArguments.name_and_place
    assert split("mine=runs/a") == ("mine", "runs/a")
    assert split("mine=lr=1e-4/a") == ("mine", "lr=1e-4/a")
    for whole in ("runs/a", "lr=1e-4/a", "runs/lr=1e-4/a", "./lr=1e-4/a"):
        assert split(whole) == (whole, whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "tasks is not set"),
        ({"adapters": ["a", "a"]}, "a name of its own"),
        ({"adapters": ["base=a"]}, "a name of its own, none 'base'"),
        ({"adapters": ["ad/x"], "controls": ["ad-x"]}, r"'ad/x' \(folder 'ad-x'\), 'ad-x' .* Write name=folder"),
        ({"adapters": ["база"]}, r"'база' \(folder ''\). Write name=folder, with Latin letters"),
        ({"adapters": ["a"], "rl_adapter": "b"}, "rl_adapter is 'b'; it must be one of a"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"file_prompt": "chat"}, "file_prompt is 'chat'"),
        ({"margin": 0.0}, "margin is 0.0"),
        ({"max_problems": 0}, "max_problems is 0"),
        ({"server": "http://x", "model_adapter": "a"}, "merged in process"),
        ({"gpus": -1}, "gpus is -1; it must be 0 or more"),
        ({"price_per_gpu_hour": -0.5}, "price_per_gpu_hour is -0.5"),
        ({"price_per_gpu_hour": float("nan")}, "price_per_gpu_hour is nan"),
        ({"server": "http://x", "price_per_gpu_hour": 2.0}, "price_per_gpu_hour needs gpus: set it to how many"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        EvaluateArguments(**{"model_name_or_path": "m", "tasks": ["resa"]} | changes)


@pytest.fixture
def server(problems):
    """Knows every answer under the name `good`, and none under another."""
    golds = {row["problem"]: row["answer"] for row in map(json.loads, problems.read_text().splitlines())}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            gold = next(answer for problem, answer in golds.items() if problem in body["prompt"])
            text = f"<answer>{gold if body['model'] == 'good' else 'x'}</answer>"
            choice = {"text": text, "finish_reason": "stop"}
            reply = json.dumps({"choices": [choice], "usage": {"completion_tokens": 7}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1"
        running.shutdown()


def test_a_server_answers_under_the_names_of_its_adapters(problems, server, tmp_path, capsys):
    flags = ("--server", server, "--tasks", str(problems), "--samples", "2", "--concurrency", "2")
    priced = ("--gpus", "2", "--price_per_gpu_hour", "3")
    assert evaluate(tmp_path / "out", *flags, *priced, "--adapters", "mine=good") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    base, mine = report["models"]
    assert (base["accuracy"]["estimate"], mine["accuracy"]["estimate"]) == (0, 1)
    assert mine["name"] == "mine" and mine["verdict"]["word"] == "better" and mine["moved"] == {}
    cost = report["costs"]["mine"]
    assert cost["tokens"] == 2 * 40 * 7 and cost["dollars"] == pytest.approx(2 * 3 * cost["seconds"] / 3600)
    capsys.readouterr()
    # A name that the server answers as the base: no log-probabilities are told, so that it cannot be sure.
    with pytest.warns(UserWarning, match="serve the base"):
        assert evaluate(tmp_path / "other", *flags, "--adapters", "unknown") == 0
