"""Rewards of the user's own: in a process that is stopped when it takes too long, and ends with its caller."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from resa_hf.rl.limited import LimitedReward


def made(name: str, seconds: float = 20.0) -> LimitedReward:
    return LimitedReward(f"user_rewards.{name}", seconds)


def call(reward: LimitedReward, *completions: Any, **columns: Any) -> tuple[list[float | None], dict[str, float]]:
    """What it returns, and the metrics that it logs, without the reward's name."""
    metrics: dict[str, float] = {}
    values = reward(
        prompts=["?"] * len(completions),
        completions=list(completions),
        completion_ids=[[1]] * len(completions),
        log_metric=metrics.__setitem__,
        **columns,
    )
    return values, {name.removeprefix(f"rewards/{reward.__name__}/"): value for name, value in metrics.items()}


def gone(pid: int, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


FINE = {"timed_out": 0.0, "failed": 0.0}


def test_calls_the_function_with_the_columns() -> None:
    assert made("brevity").__name__ == "brevity"
    assert call(made("brevity"), "four", "", "sixsix") == ([-4.0, 0.0, -6.0], FINE)
    matches = made("matches")
    assert call(matches, "a", "b", "c", answer=["a", "x", "c"], level=[3, 2, 1]) == ([3.0, 0.0, 1.0], FINE)
    assert call(matches, "a", answer=["a"], level=[0.5]) == ([0.5], FINE)
    assert matches(["?"], ["a"], [[1]], answer=["a"], level=[2]) == [2.0]


def test_what_is_no_json_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", str(tmp_path / "given"))
    texts = ["a\n\r\u2028b", "\ud800\0", [{"role": "assistant", "content": "中文"}]]
    loop: list[Any] = []
    loop.append(loop)
    strange = {"trainer_state": object(), "log_extra": print, "bytes": [b""], "set": [{1}], "loop": loop}
    assert call(made("given"), *texts, answer=["1", "2", None], **strange) == ([0.0] * 3, FINE)
    assert json.loads((tmp_path / "given").read_text()) == {
        "completions": texts,
        "prompts": ["?"] * 3,
        "completion_ids": [[1]] * 3,
        "answer": ["1", "2", None],
    }
    values, metrics = call(made("needs_the_state"), "a", trainer_state=object())
    assert (values, metrics["failed"]) == ([0.0], 1.0)


def test_what_counts_as_a_number(caplog: pytest.LogCaptureFixture, fault: Any) -> None:
    assert call(made("numbers"), *"abcdef") == ([1.0, 0.5, 0.25, 0.125, 7.0, None], FINE)
    assert call(made("array"), *"abc") == ([0.0, 0.5, 1.0], FINE)
    assert call(made("later"), *"ab") == ([0.75, 0.75], FINE)
    values, metrics = call(made("no_numbers"), *"abcdefghij")
    assert values == [1.5, 0, 0, 0, 0, 0, 0, None, 0, 0]
    assert metrics == {"timed_out": 0.0, "failed": 0.8}
    fault("NaN, infinity or text as a reward", told=caplog.messages[0], kept="the run: those completions score 0")


def test_what_it_prints_or_reads_is_not_the_protocol(capfd: pytest.CaptureFixture[str]) -> None:
    prints = made("prints")
    for _ in range(2):
        assert call(prints, "a", "b") == ([1.0, 1.0], FINE)
    out, err = capfd.readouterr()
    assert not out and '{"values": [9]}\nno line end' in err and '{"values": [8]}' in err and '{"values": [7]}' in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "completion"),
    [("sleeps", "sleep"), ("counts", "count"), ("powers", "power"), ("spares_nobody", "catch")],
)
def test_is_stopped_when_it_takes_too_long(
    name: str, completion: str, caplog: pytest.LogCaptureFixture, fault: Any
) -> None:
    reward = made(name, seconds=1.0)
    assert call(reward, "a") == ([1.0], FINE)
    for _ in range(2):
        child = reward._process.pid
        start = time.monotonic()
        assert call(reward, "a", completion, "b") == ([0.0] * 3, {"timed_out": 1.0, "failed": 0.0})
        assert 1.0 <= time.monotonic() - start < 5
        assert gone(child)
        assert call(reward, "a", "b") == ([1.0, 1.0], FINE)
    assert caplog.text.count(f"user_rewards.{name} took more than 1 s for a batch, and was stopped") == 1
    fault(f"a reward function that hangs ({name})", told=caplog.messages[0], kept="the run: that batch scores 0")


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("raises", r"raised KeyError: 'no such thing \ud800'"),
        ("exits", "raised SystemExit: enough"),
        ("dies", "ended its process (exit status 7)"),
        ("crashes", "ended its process (exit status -11)"),
    ],
)
def test_what_raises_or_crashes_scores_0(
    name: str, warning: str, caplog: pytest.LogCaptureFixture, fault: Any
) -> None:
    reward = made(name)
    for _ in range(2):
        assert call(reward, "a") == ([1.0], FINE)
        assert call(reward, "a", "bad") == ([0.0, 0.0], {"timed_out": 0.0, "failed": 1.0})
    assert caplog.text.count(f"user_rewards.{name} {warning}") == 1
    fault(f"a reward function that {name}", told=caplog.messages[0], kept="the run: that batch scores 0")


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("one_less", "returned 2 values for 3 completions"),
        ("one_more", "returned 4 values for 3 completions"),
        ("nothing", "raised TypeError"),
        ("one_number", "raised TypeError"),
    ],
)
def test_a_wrong_number_of_values_scores_0(
    name: str, warning: str, caplog: pytest.LogCaptureFixture, fault: Any
) -> None:
    assert call(made(name), *"abc") == ([0.0] * 3, {"timed_out": 0.0, "failed": 1.0})
    assert warning in caplog.text
    fault(f"a reward function of a wrong type ({name})", told=caplog.messages[0], kept="the run: that batch scores 0")


def test_one_process_serves_all_batches_and_another_follows_its_death(fault: Any) -> None:
    reward = made("pid")
    (first,), (second,) = call(reward, "a")[0], call(reward, "a")[0]
    assert first == second != os.getpid()
    os.kill(int(first or 0), signal.SIGKILL)
    reward._process.wait(10)  # a zombie whose threads still end cannot be waited for yet
    (third,), metrics = call(reward, "a")
    assert third not in (0.0, first) and metrics == FINE
    fault(
        "the reward's worker killed between batches", told="nothing", kept="everything: another one serves the batch"
    )


def test_a_batch_larger_than_a_pipe_passes() -> None:
    texts = ["x" * 1_000_000, "y" * 2_000_000]
    assert call(made("brevity"), *texts) == ([-1e6, -2e6], FINE)
    # Nothing reads what is sent to a process that is busy in C.
    assert call(made("powers", seconds=1.0), "power", "x" * 10_000_000)[1]["timed_out"] == 1.0


def test_an_empty_batch_has_no_rewards() -> None:
    assert call(made("brevity")) == ([], {})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module.brevity", "importing 'no_such_module' raised ModuleNotFoundError: No module named"),
        ("user_rewards.no_such_function", "module 'user_rewards' has no function 'no_such_function'"),
        ("user_rewards.NUMBER", "module 'user_rewards' has no function 'NUMBER'"),
        ("broken_rewards.brevity", "importing 'broken_rewards' raised ZeroDivisionError: division by zero"),
        ("leaving_rewards.brevity", "importing 'leaving_rewards' raised SystemExit: 3"),
        ("dying_rewards.brevity", "importing its module ended the process"),
        ("user_rewards.", "module 'user_rewards' has no function ''"),
        (".brevity", "importing '' raised ValueError: Empty module name"),
    ],
)
def test_a_function_that_is_not_there_is_a_value_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    (tmp_path / "broken_rewards.py").write_text("print('{}')\n1 / 0\n")
    (tmp_path / "leaving_rewards.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "dying_rewards.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"The reward function {path!r} cannot be used: {message}")):
        LimitedReward(path, 20.0)


def test_a_module_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "here.py").write_text("def half(completions, **columns):\n    return [0.5]\n")
    # What has the name of a module that is installed must not hide it.
    (tmp_path / "colorsys.py").write_text("1 / 0\n")
    (tmp_path / "package" / "__init__.py").write_text("import numpy, colorsys\n")
    monkeypatch.chdir(tmp_path)
    assert call(LimitedReward("package.here.half", 20.0), "a") == ([0.5], FINE)


@pytest.mark.slow
def test_what_it_started_is_stopped_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PID", str(tmp_path / "pid"))
    assert call(made("starts_another", seconds=2.0), "sleep")[1]["timed_out"] == 1.0
    assert gone(int((tmp_path / "pid").read_text()))
    # One with a session of its own survives, but is not waited for.
    start = time.monotonic()
    assert call(made("forks", seconds=2.0), "a")[1]["timed_out"] == 1.0
    assert time.monotonic() - start < 10
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


CALLER = """
    import sys
    from resa_hf.rl.limited import LimitedReward
    completions = sys.argv[2:]
    reward = LimitedReward("user_rewards.tells_its_pid", float(sys.argv[1]))
    print(reward(prompts=["?"], completions=completions[:1], completion_ids=[[1]]), flush=True)
    reward(prompts=["?"], completions=completions[1:] or ["a"], completion_ids=[[1]])
    print("done", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("then", "limit", "kill"),
    [
        ("idle", 100, signal.SIGKILL),
        ("idle", 100, None),
        ("sleep", 100, signal.SIGKILL),
        ("sleep", 100, signal.SIGTERM),
        ("power", 3, signal.SIGKILL),  # in C, where nothing of ours runs before its limit
    ],
)
def test_ends_with_its_caller(tmp_path: Path, then: str, limit: int, kill: signal.Signals | None) -> None:
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PID": str(tmp_path / "pid")}
    command = [sys.executable, "-c", textwrap.dedent(CALLER), str(limit), "a", then]
    caller = subprocess.Popen(command, env=found, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert caller.stdin is not None and caller.stdout is not None
    assert caller.stdout.readline() == "[1.0]\n"
    child = int((tmp_path / "pid").read_text())
    if then == "idle":
        assert caller.stdout.readline() == "done\n"
    else:
        time.sleep(0.5)
    assert psutil.pid_exists(child)
    if kill is None:
        caller.stdin.close()
    else:
        caller.send_signal(kill)
    assert caller.wait(10) == (-kill if kill else 0)
    assert gone(child, 12 if then == "power" else 5)
    caller.stdout.close()
    caller.stdin.close()
