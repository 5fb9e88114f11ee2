"""The paper's datasets with their real schemas, read from the local Hub."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.utils import httpx

from resa_hf.data import PRESETS, load_qa, load_questions
from resa_hf.errors import DataError

if TYPE_CHECKING:
    from hub_server import HubServer

PARQUET = "data/train-00000-of-00001.parquet"
PAIRS = [("What is $1+1$?", "2"), ("Solve $x^2=4$.", "\\{-2, 2\\}"), ("What is 007?", "007")]
OPENR1_CARD = (
    "---\nlicense: apache-2.0\nconfigs:\n- config_name: all\n  data_files:\n  - split: train\n    path: all/train-*\n"
    "- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
)


def packed(path: str, rows: list[dict[str, Any]]) -> bytes:
    if path.endswith(".json"):
        return json.dumps(rows).encode()
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be right."}, {"role": "user", "content": question}]


def verified(answer: str) -> str:
    return json.dumps({"type": "math_verifiable", "answer": {"value": answer}})


# File, and the real columns of a row.
SCHEMAS: dict[str, tuple[str, Callable[[str, str], dict[str, Any]]]] = {
    "still": (PARQUET, lambda q, a: {"question": q, "answer": a}),
    "deepscaler": ("deepscaler.json", lambda q, a: {"problem": q, "answer": a, "solution": f"So {a}."}),
    "open-s1": (
        PARQUET,
        lambda q, a: {"problem": q, "solution": f"So {a}.", "answer": a, "source": "s", "messages": asked(q)},
    ),
    "open-rs": (PARQUET, lambda q, a: {"problem": q, "solution": f"So {a}.", "answer": a, "level": "Hard"}),
    "ii-thought": (PARQUET, lambda q, a: {"messages": asked(q), "verification_info": verified(a)}),
    "openr1-math": (
        PARQUET,
        lambda q, a: {
            **{"problem": q, "solution": f"So {a}.", "answer": a, "problem_type": "Algebra", "uuid": "u"},
            **{"generations": ["<think>", "<think>"], "correctness_llama": None, "messages": asked(q)},
        },
    ),
    "limr": ("limr.json", lambda q, a: {"prompt": q, "answer": a}),
}


def serve(hub: "HubServer", name: str, rows: list[dict[str, Any]] | None = None) -> str:
    """Puts a preset's dataset on the Hub; `main` has moved on since the pinned commit."""
    path, row = SCHEMAS[name]
    preset = PRESETS[name]
    files: dict[str, bytes | str] = {path: packed(path, rows or [row(*pair) for pair in PAIRS])}
    if name == "openr1-math":
        files |= {"README.md": OPENR1_CARD, "all/train-0.parquet": packed(PARQUET, [row("Of all?", "0")])}
    commit = hub.create_repo(preset.repo, "dataset", files=files, commit=preset.revision)
    if preset.revision:
        hub.commit(preset.repo, {path: packed(path, [row("New?", "1")])}, "dataset")
    return commit


def test_the_presets_are_the_papers_datasets() -> None:
    assert set(SCHEMAS) == set(PRESETS)
    assert all(preset.revision is None or len(preset.revision) == 40 for preset in PRESETS.values())


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_preset_reads_its_schema_at_its_commit(name: str, hub: "HubServer") -> None:
    commit = serve(hub, name)
    rows, report = load_qa(name)
    assert rows.column_names == ["problem", "answer"]
    assert list(zip(rows["problem"], rows["answer"], strict=True)) == PAIRS
    assert (report.repo, report.commit, report.kept) == (PRESETS[name].repo, commit, 3)
    assert list(load_questions(name)) == [question for question, _ in PAIRS]


@pytest.mark.parametrize("name", ["deepscaler", "open-s1", "open-rs", "openr1-math"])
def test_traces_are_kept_if_asked_for(name: str, hub: "HubServer") -> None:
    serve(hub, name)
    rows, report = load_qa(name, solution_column="solution")
    assert rows["solution"][:] == [f"So {answer}." for _, answer in PAIRS]
    assert "CoT-based: the text holds the reasoning traces of column 'solution'" in report.describe()
    assert report.fingerprint != load_qa(name)[1].fingerprint


def test_messages_and_json_that_cannot_be_read_are_counted(hub: "HubServer") -> None:
    good = {"messages": asked("Good?"), "verification_info": verified("1")}
    rows = [
        good,
        {**good, "verification_info": '{"answer": {"value": "1"'},
        {**good, "verification_info": '{"answer": "1"}'},
        {**good, "verification_info": '{"ground_truth": "1"}'},
        {**good, "verification_info": '{"answer": {"value": "\\ud800"}}'},
        {**good, "verification_info": '{"answer": {"value": 1}}'},
        {**good, "verification_info": '{"answer": {"value": " "}}'},
        {**good, "verification_info": None},
        {**good, "messages": [{"role": "system", "content": "No question."}]},
        {**good, "messages": []},
        {**good, "messages": None},
        {"messages": asked("Last?"), "verification_info": verified("2")},
    ]
    serve(hub, "ii-thought", rows)
    kept, report = load_qa("ii-thought")
    assert kept[:] == {"problem": ["Good?", "Last?"], "answer": ["1", "2"]}
    assert (report.rows_read, report.unreadable, report.non_string) == (12, 4, 1)
    assert (report.empty_answer, report.empty_question, report.repeated) == (2, 3, 0)
    assert "4 with a cell that cannot be read (broken JSON" in report.describe()
    assert list(load_questions("ii-thought")) == ["Good?"] * 8 + ["", "", "", "Last?"]


def test_a_named_column_is_read_as_text(hub: "HubServer") -> None:
    serve(hub, "ii-thought", [{"messages": asked("a"), "verification_info": verified("1"), "answer": "one"}])
    assert load_qa("ii-thought", answer_column="answer")[0][:] == {"problem": ["a"], "answer": ["one"]}


def test_a_revision_of_ones_own_and_the_commit_behind_it(hub: "HubServer") -> None:
    old = hub.create_repo("me/mine", "dataset", files={"train.jsonl": '{"q": "a", "a": "1"}\n'})
    columns = {"question_column": "q", "answer_column": "a"}
    new = hub.commit("me/mine", {"train.jsonl": '{"q": "b", "a": "1"}\n'}, "dataset")
    for revision, commit, question in ((None, new, "b"), ("main", new, "b"), (old, old, "a")):
        rows, report = load_qa("me/mine", revision=revision, **columns)
        assert (report.commit, rows["problem"][:]) == (commit, [question])
    serve(hub, "open-rs")
    newest = hub.commits(PRESETS["open-rs"].repo, "dataset")[0]
    rows, report = load_qa("open-rs", revision="main")
    assert (report.commit, rows["problem"][:]) == (newest, ["New?"])


def test_a_branch_that_moves_between_two_requests(hub: "HubServer", monkeypatch: pytest.MonkeyPatch) -> None:
    commit = serve(hub, "still")
    ask = huggingface_hub.HfApi.dataset_info

    def moves(*args: Any, **kwargs: Any) -> Any:
        info = ask(*args, **kwargs)
        hub.commit(PRESETS["still"].repo, {PARQUET: packed(PARQUET, [{"question": "New?", "answer": "1"}])}, "dataset")
        return info

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", moves)
    rows, report = load_qa("still")
    assert (report.commit, rows["problem"][:]) == (commit, [question for question, _ in PAIRS])


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_offline_from_the_cache(hub: "HubServer", monkeypatch: pytest.MonkeyPatch) -> None:
    serve(hub, "still")
    serve(hub, "open-rs")
    online = [load_qa(name)[1] for name in ("still", "open-rs")]
    requests = len(hub.requests)
    offline(monkeypatch)
    assert [load_qa(name)[1] for name in ("still", "open-rs")] == online
    assert len(hub.requests) == requests
    with pytest.raises(DataError, match="Without network, only what was loaded before can be read"):
        load_qa("limr")
    # What is in the cache is not taken for another commit, nor for a branch that may be another one.
    with pytest.raises(DataError, match=f"but the cache has {online[0].commit} only. Load it once with network"):
        load_qa("still", revision="0" * 40)
    with pytest.raises(DataError, match=r"revision 'v2'\) cannot be loaded"):
        load_qa("still", revision="v2")


def test_a_hub_out_of_reach_is_like_offline(hub: "HubServer", monkeypatch: pytest.MonkeyPatch) -> None:
    serve(hub, "still")
    report = load_qa("still")[1]

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise httpx.ConnectError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", unreachable)
    assert load_qa("still")[1] == report


def test_what_the_hub_refuses_is_said(hub: "HubServer", monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"train.jsonl": '{"problem": "a", "answer": "1"}\n'}
    hub.create_repo("me/gated", "dataset", files=files, gated=True)
    hub.create_repo("me/private", "dataset", files=files, private=True)
    hub.create_repo("me/mine", "dataset", files=files)
    monkeypatch.setenv("HF_TOKEN", hub.stranger)
    for read in (load_qa, lambda repo: list(load_questions(repo))):
        with pytest.raises(DataError, match=r"me/gated is a gated dataset.*Accept its terms at .*datasets/me/gated"):
            read("me/gated")
        for repo in ("me/private", "me/none"):
            with pytest.raises(DataError, match=f"Hub dataset '{repo}' .* cannot be loaded.* If it is private, log"):
                read(repo)
    for changes, words in (
        ({"split": "test"}, "split 'test'"),
        ({"revision": "v1"}, "revision 'v1'"),
        ({"question_column": "q"}, "no column 'q'. Its columns: 'problem', 'answer'"),
    ):
        with pytest.raises(DataError, match=words):
            load_qa("me/mine", **changes)
    hub.fail("GET", "/api/datasets/me/mine", 500, times=20)
    with pytest.raises(DataError, match="500") as error:
        load_qa("me/mine")
    assert hub.stranger not in str(error.value)


def test_runs_and_stages_tell_the_commit(hub: "HubServer", tmp_path: Path) -> None:
    from resa_hf.arguments import DataArguments
    from resa_hf.commands.single_stage import stage_text
    from resa_hf.experiment.folder import RunFolder, read_json
    from resa_hf.experiment.prepare import prepare
    from resa_hf.experiment.settings import RunArguments
    from resa_hf.models import load_tokenizer

    pairs = [(f"{number}+1 mod 10", str((number + 1) % 10)) for number in range(30)]
    rows = {name: [SCHEMAS[name][1](*pair) for pair in pairs] for name in ("deepscaler", "ii-thought")}
    commits = {name: serve(hub, name, rows[name]) for name in rows}
    named = {"dataset": "deepscaler", "solution_column": "solution", "template": "chat", "held_out": 10}

    _, _, told = stage_text(DataArguments(**named), load_tokenizer("resa_hf/tiny/base"), 32)
    assert (told["dataset_repo"], told["dataset_commit"]) == (PRESETS["deepscaler"].repo, commits["deepscaler"])
    assert "CoT-based" in told["rows"]

    run = RunArguments(model_name_or_path="resa_hf/tiny/base", **named | {"solution_column": None})
    run.trigger_dataset = "ii-thought"
    prepare(RunFolder(tmp_path), run, 32)
    report = read_json(tmp_path / "data" / "data.json")
    for role, name in (("dataset", "deepscaler"), ("trigger_dataset", "ii-thought")):
        assert (report[f"{role}_repo"], report[f"{role}_commit"]) == (PRESETS[name].repo, commits[name])
    assert report["solution_column"] is None and "CoT" not in report["rows"]
