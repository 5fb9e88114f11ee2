"""Every file parser on broken files: what it cannot take it refuses for people. First what `fuzz_parsers.py` found."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from fuzz_parsers import KINDS, Parser, fuzz, table, verdict
from hypothesis import strategies as st
from parser_table import PARSERS
from parsers_of_runs import _explore
from safetensors.torch import load, save

from resa_hf.experiment.features import Parts

BY_NAME = {parser.name: parser for parser in PARSERS}
# One of each kind; a process takes a third of a second.
FEW = ["SAE, sae-lens: cfg.json", "adapter: weights", "rows: .parquet", "recipe: run", "checkpoints: files.json"]
FEW += ["completions", "settings.json", "explorer: saes's report.json"]
DEEP = b"[" * 100_000
KEPT = {"text": "x", "length": 1, "truncated": False, "tokens": []}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`whole(parser)`: the folder that its `make` has written, made once."""
    made = {}

    def of(parser: Parser) -> Path:
        if parser.make not in made:
            made[parser.make] = tmp_path_factory.mktemp("whole")
            parser.make(made[parser.make])
        return made[parser.make]

    return of


def line(raw: bytes, **changes):
    """The last line of a JSONL file with other values."""
    *before, last = raw.splitlines()
    return b"\n".join([*before, json.dumps({**json.loads(last), **changes}).encode()]) + b"\n"


def changed(**changes):
    return lambda raw: json.dumps({**json.loads(raw), **changes}).encode()


def kept(**changes):
    return lambda raw: line(raw, completions=[[0, 0, {**KEPT, **changes}]])


def more(text):
    return lambda raw: raw + text.encode()


def weights(raw, edit):
    return save({name: edit(tensor).contiguous() for name, tensor in load(raw).items()})


def long_step(raw):
    """Of a run's report: the names of its candidates' folders are too long to be paths."""
    assert b'"step": null' in raw
    return raw.replace(b'"step": null', b'"step": "%s"' % (b"x" * 300))


CRASHES = [
    ("rows: .jsonl", lambda raw: raw + DEEP, "ours"),
    ("checkpoints: files.json", lambda _: b'{"optimizer.pt": [1e999, ""]}', "accepted"),
    ("checkpoints: files.json", lambda _: b'{"a\\u0000b": [1, ""]}', "accepted"),
    ("checkpoints: files.json", lambda _: DEEP, "accepted"),
    ("what was pushed before", lambda _: DEEP, "ours"),
    ("recipe: run", more("more: !!timestamp x\n"), "shown"),
    ("recipe: run", more("more: !!int ''\n"), "shown"),
    ("recipe: run", lambda _: b"[" * 5_000, "shown"),
    ("recipe: evaluate", more("temperature: [1]\n"), "shown"),
    ("recipe: features", more("max_length: [1]\n"), "shown"),
    ("recipe: train-rl", more("num_generations: {}\n"), "shown"),
    ("recipe: sweep", more("margin: [1]\n"), "shown"),
    ("recipe: sweep", more("output_dir: [out]\n"), "shown"),
    ("model: config.json", changed(num_hidden_layers=133_158), "shown"),
    ("model without weights: config.json", changed(num_hidden_layers=133_158), "shown"),
    ("publish: report.json of tune", changed(settings={"sae": "x" * 300}), "accepted"),
    ("card of a base: README.md", lambda _: b"---\nlicense: !!timestamp x\n---\n", "accepted"),
    ("benchmark: gpqa_diamond.jsonl", lambda raw: line(raw, Question=5), "ours"),
    ("benchmark: aime24.jsonl", lambda raw: line(raw, question="\ud800"), "ours"),
    ("benchmark: aime24.jsonl", lambda raw: line(raw, question=[1]), "ours"),
    ("benchmark: aime24.jsonl", lambda raw: line(raw, problem=None), "ours"),
    ("benchmark: aime24.jsonl", lambda raw: line(raw, answer=None), "ours"),
    ("tokenizer: tokenizer_config.json", changed(model_max_length="many"), "shown"),
    ("tokenizer: tokenizer.json", lambda _: b"{}", "shown"),
    ("model: config.json", changed(num_hidden_layers="many"), "shown"),
    ("completions", kept(text=5), "ours"),
    ("completions", kept(length=None), "ours"),
    ("completions", lambda raw: raw.replace(b"seconds", b"minutes"), "ours"),
    ("shared.json", lambda _: b'{"other": 1}', "ours"),
    ("shared.json", lambda _: b'{"stage1": "", "base": "b"}', "ours"),
    ("shared.json", lambda _: b'{"stage1": "a", "base": "b/.."}', "ours"),
    ("shared.json", lambda _: b'{"stage1": 5, "base": {}}', "ours"),
    ("failure of a task", lambda _: b"\xff", "accepted"),
    ("failure of a task", lambda _: b"", "accepted"),
    ("tokens of a run: data-00000-of-00001.arrow", lambda raw: raw[: len(raw) // 2], "ours"),
    ("tokens of a run: dataset_info.json", lambda _: b"[]", "ours"),
    ("tokens of a run: state.json", lambda _: b"{}", "ours"),
    ("tokens of a run: state.json", changed(_format_columns=[]), "accepted"),
    ("Stage I's progress", lambda raw: weights(raw, lambda x: x[None]), "ours"),
    ("Stage I's progress", lambda raw: weights(raw, lambda x: x.float()), "ours"),
    ("Stage I's progress", lambda raw: weights(raw, lambda x: x.reshape(-1)[:1]), "ours"),
    ("publish: report.json of tune", changed(costs={"Stage II": {}}), "ours"),
    ("publish: report.json of train-sae", changed(costs={"Stage I": {"seconds": "x"}}), "ours"),
    ("explorer: run's report.json", long_step, "accepted"),
    ("publish a run: report.json", long_step, "ours"),
    ("explorer: run's report.json, a stranger's", lambda raw: raw.replace(b'"SAE-Tuning"', b'"x"', 1), "ours"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "wanted"), CRASHES, ids=[case[0] for case in CRASHES])
def test_what_crashed_once(whole, tmp_path, monkeypatch, name, change, wanted):
    parser = BY_NAME[name]
    folder = Path(shutil.copytree(whole(parser), tmp_path / "broken"))
    path = folder / parser.file
    path.write_bytes(change(path.read_bytes()))
    monkeypatch.chdir(tmp_path)
    assert verdict(parser, folder) == wanted


def test_a_part_of_features_that_is_damaged_is_made_anew(tmp_path, capsys):
    """A key that is spelled otherwise is JSON still: only the digest tells."""
    part = Parts(tmp_path)
    assert part("counts", lambda: {"layers": [1.5, None]}) == {"layers": [1.5, None]}
    assert part("counts", lambda: pytest.fail("it is there")) == {"layers": [1.5, None]}
    path = tmp_path / "parts" / "counts.json"
    whole = path.read_text()
    for broken in (whole.replace("layers", "kayers"), whole.replace("1.5", "1.6"), whole[:20], "[]", '{"layers": []}'):
        path.write_text(broken)
        assert part("counts", lambda: {"layers": [2]}) == {"layers": [2]}
        assert "counts.json is damaged" in capsys.readouterr().out
        assert json.loads(path.read_text())["part"] == {"layers": [2]}


def test_a_report_of_features_without_its_text_is_shown(tmp_path):
    """As it lies in a repository of which nobody fetched report.md; it was called damaged."""
    quality = {"layers.1": {"fvu": 0.25, "l0": 4.0, "dead_share": 0.0, "ce_recovered": None}}
    report = {"layers": [], "tested": {}, "quality": quality, "settings": {"saes": "you/saes"}}
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "report.json").write_text(json.dumps(report))
    _explore(tmp_path, "there", "you/results")


def test_the_driver_tells_a_crash_from_an_error(tmp_path):
    """A parser that does all there is to do wrong, in processes of its own."""

    def make(folder):
        (folder / "a.txt").write_text("0123456789")

    def parse(folder):
        text = (folder / "a.txt").read_bytes()
        if not text:
            os.kill(os.getpid(), signal.SIGSEGV)
        if len(text) < 6:
            raise KeyError("x")
        if text[:1] != b"0":
            raise ValueError(f"a.txt is broken: {text[:1]!r}")
        if len(text) > 10:
            json.loads(text.decode(errors="replace") + "{")  # an error that names no file

    files = st.sampled_from([b"", b"0123", b"123456789", b"0123456789ab", b"0123456789"])
    parser = Parser("all wrong", make, "a.txt", parse, lambda: files.map(lambda raw: [lambda _: raw]))
    (tmp_path / "whole").mkdir()
    make(tmp_path / "whole")
    outcome = fuzz(parser, tmp_path / "whole", tmp_path / "crashed", seconds=60, cases=16, number=0)
    assert outcome.counts["shown"] and outcome.counts["accepted"] and outcome.counts["crashes"]
    assert sum(outcome.counts[kind] for kind in KINDS) == 16
    kinds = " ".join(outcome.crashes)
    assert "SIGSEGV" in kinds and "KeyError" in kinds and "JSONDecodeError" in kinds
    assert {path.read_bytes() for path in outcome.crashes.values()} == {b"", b"0123", b"0123456789ab"}
    told = table({"all wrong": outcome})
    assert f"| all wrong | 16 | {outcome.counts['accepted']} |" in told and "KeyError" in told


@pytest.mark.long
def test_an_evaluation_without_its_figures_is_refused(whole, tmp_path):
    parser = BY_NAME["publish: report.json of evaluate"]
    folder = Path(shutil.copytree(whole(parser), tmp_path / "broken"))
    path = folder / parser.file
    path.write_bytes(changed(models=[{"name": "x"}])(path.read_bytes()))
    assert verdict(parser, folder) == "ours"


def check(parser, whole, tmp_path, cases):
    outcome = fuzz(parser, whole(parser), tmp_path / "crashed", seconds=3_000, cases=cases, number=1)
    assert not outcome.crashes, table({parser.name: outcome})
    assert sum(outcome.counts.values()) >= cases


@pytest.mark.parametrize("name", FEW)
def test_a_few_broken_files(whole, tmp_path, name):
    check(BY_NAME[name], whole, tmp_path, 3)


@pytest.mark.long
@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_many_broken_files(whole, tmp_path, parser):
    check(parser, whole, tmp_path, 100)
