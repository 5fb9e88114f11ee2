"""Locales, homes, temporary folders and names that are not as usual: what is told, and what is kept."""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile

import pytest
from fault_commands import RESULT, equal
from safetensors.torch import load_file

from resa_hf.cli import main
from resa_hf.experiment.folder import read_json, write_whole

pytest_plugins = ("fault_commands",)

# Python itself makes UTF-8 of a C locale, unless it is told not to.
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}


@pytest.fixture
def chinese(commands):
    """Questions in Chinese, with the columns of the others; `∑` and `≈` are in no small character set."""
    rows = [json.loads(line) for line in commands.rows.read_text().splitlines()]
    rows = [{"frage": f"∑ {row['frage']} 是多少？", "antwort": f"≈ {row['antwort']}"} for row in rows]
    commands.rows.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return commands


def process(words, changes, without=()):
    """A command in a process of its own: status, and what it printed."""
    environment = {name: value for name, value in os.environ.items() if name not in without} | changes
    done = subprocess.run([sys.executable, "-m", "resa_hf.cli", *words], env=environment, capture_output=True)
    # What tells how it ended comes last.
    parts = (done.stdout, done.stderr) if done.returncode else (done.stderr, done.stdout)
    printed = b"".join(parts).decode(errors="replace")
    assert "Traceback" not in printed, printed
    return done.returncode, printed


def last(printed):
    return printed.strip().splitlines()[-1]


@pytest.mark.long
@pytest.mark.parametrize(
    ("what", "changes", "without"),
    [
        ("locale C without UTF-8, and ASCII in and out", ASCII, ()),
        ("locale that does not exist", {"LC_ALL": "xx_YY.UTF-8"}, ()),
        ("no HOME", {}, ("HOME",)),
        ("HOME that is not there", {"HOME": "/nowhere/at/all"}, ()),
        (
            "HOME and HF_HOME that cannot be written",
            {"HOME": "/proc/1", "HF_HOME": "/proc/1/hub"},
            ("XDG_CACHE_HOME",),
        ),
        ("TMPDIR that is not there", {"TMPDIR": "/nowhere"}, ()),
    ],
)
def test_a_process_in_a_strange_environment(chinese, tmp_path, fault, what, changes, without):
    out = tmp_path / "out"
    status, printed = process(chinese.argv("stage2", out), changes, without)
    assert status == 0, printed
    assert equal(load_file(out / RESULT["stage2"]), chinese.ends("stage2", tmp_path / "usual"))
    fault(f"{what}, with Chinese questions", told=f"nothing; {last(printed)}", kept="all: the same bits as elsewhere")


@pytest.mark.long
def test_a_name_that_an_ascii_locale_cannot_read(chinese, tmp_path, fault):
    status, printed = process(chinese.argv("stage1", tmp_path / "输出"), ASCII)
    assert status == 2 and not (tmp_path / "输出").exists()
    told = last(printed)
    assert "is no text in ascii" in told and "Set PYTHONUTF8=1" in told
    status, printed = process(chinese.argv("stage1", tmp_path / "输出"), ASCII | {"PYTHONUTF8": "1"})
    assert status == 0, printed
    fault("non-ASCII path in a locale C without UTF-8", told=told, kept="nothing was begun; with PYTHONUTF8=1 it runs")


@pytest.mark.long
def test_a_files_encoding_is_not_the_locales(tmp_path, fault):
    """A recipe, reports and settings are UTF-8 wherever they are written and read."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# ∑ 是多少\nquestion_column: 问题\n", encoding="utf-8")
    code = (
        "import sys; from pathlib import Path; from resa_hf.commands.recipe import read_yaml; "
        "from resa_hf.experiment.folder import write_whole; "
        "write_whole(Path(sys.argv[2]), read_yaml(sys.argv[1])['question_column'])"
    )
    words = [sys.executable, "-c", code, str(recipe), str(tmp_path / "report.md")]
    done = subprocess.run(words, env=os.environ | ASCII, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == "问题"
    fault("recipe and report in Chinese in a locale C without UTF-8", told="nothing", kept="both, as UTF-8")


def test_a_terminal_that_is_ascii(tmp_path, fault, monkeypatch):
    """What is printed of a question must not end a run."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", terminal)
    given = ["train-sae", "--dataset", "数学.jsonl", "--model_name_or_path", "resa_hf/tiny/base", "--dry_run"]
    assert main([*given, "--hookpoints", "1", "--question_column", "∑"]) == 0
    terminal.flush()
    printed = terminal.buffer.getvalue().decode("ascii")
    assert "\\u6570\\u5b66.jsonl" in printed and "\\u2211" in printed
    fault("terminal that knows ASCII only", told=next(line for line in printed.splitlines() if "u6570" in line),
          kept="the run: what the terminal cannot show is escaped")  # fmt: skip


def test_an_argument_that_is_no_text(tmp_path, fault, capsys):
    word = os.fsdecode(b"m\xfcller.jsonl")  # Latin-1
    assert main(["train-sae", "--dataset", word, "--output_dir", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("resa-hf train-sae: 'm\\udcfcller.jsonl' is no text in utf-8")
    fault("file name in Latin-1", told=told, kept="nothing was begun")


@pytest.mark.long
def test_the_temporary_folder_is_full(commands, undisturbed, disk, tmp_path, fault, monkeypatch):
    disk.fill()
    monkeypatch.setattr(tempfile, "tempdir", str(disk.folder))
    told = commands.fails("stage1", tmp_path / "out")
    assert f"Rows cannot be written to {disk.folder}: " in told and "set TMPDIR to a larger disk" in told
    monkeypatch.undo()
    assert equal(commands.ends("stage1", tmp_path / "out"), undisturbed.weights(commands, "stage1"))
    fault("TMPDIR full", told=told, kept="the folder: with another TMPDIR the same bits")


@pytest.mark.long
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_names_with_blanks_other_scripts_and_line_breaks(commands, undisturbed, tmp_path, fault, stage):
    expected = undisturbed.weights(commands, stage)
    for what, name in (("blanks", "my runs"), ("Chinese and symbols", "数学 ∑ ≈"), ("a line break", "two\nlines")):
        place = tmp_path / name
        place.mkdir()
        for path in (commands.rows, commands.sae):
            target = place / f"{name} {path.name}"
            shutil.move(path, target)
            setattr(commands, "rows" if path is commands.rows else "sae", target)
        target = commands.rows.rename(commands.rows.with_suffix(".jsonl"))
        commands.rows = target
        assert equal(commands.ends(stage, place / name), expected)
        report = read_json(place / name / "report.json")
        assert report["settings"]["dataset"] == str(target) and report["settings"]["output_dir"] == str(place / name)
        fault(f"{what} in the paths of output, dataset and SAE", told=f"nothing; {last(commands.printed)}",
              kept="all: the same bits as elsewhere")  # fmt: skip


def test_a_report_holds_any_character(tmp_path):
    write_whole(tmp_path / "report.md", "∑ 数学 \U0001f600")
    assert (tmp_path / "report.md").read_bytes().decode("utf-8") == "∑ 数学 \U0001f600"
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
