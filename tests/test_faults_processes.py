"""Processes that are killed, signalled or cut off: what is told, that nothing hangs, and that a rerun ends well."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from distributed_runs import assert_weights_agree
from sae_reference import config, rows, same, weights
from small_sweep import recipe, write
from transformers import TrainerCallback

from resa_hf.errors import JobError
from resa_hf.experiment.schedule import Job, workers
from resa_hf.experiment.stages import SECONDS, train_from_last_checkpoint
from resa_hf.explained import explained
from resa_hf.sae.trainer import SAETrainer

TESTS = Path(__file__).parent
WORKER = str(TESTS / "fault_worker.py")
DATA = ["--model_name_or_path", "resa_hf/tiny/base", "--dtype", "float32", "--dataset", "tiny-reasoner",
        "--limit", "120", "--held_out", "21", "--template", "chat", "--report_to", "none",
        "--use_cpu", "--logging_steps", "1", "--per_device_train_batch_size", "4"]  # fmt: skip
TEXT = [*DATA, "--max_length", "64"]
SAES = ["train-sae", *TEXT, "--hookpoints", "layers.1", "layers.2", "--num_latents", "64", "--k", "4"]
TUNE = ["tune", *TEXT, "--learning_rate", "1e-3", "--kl_weight", "0", "--sft_weight", "1"]
RL = ["train-rl", *DATA, "--learning_rate", "1e-3", "--num_generations", "4", "--max_completion_length", "64"]
EVERY_2 = ["--save_strategy", "steps", "--save_steps", "2"]
NEVER = ["--save_strategy", "no"]
ADAPTER = "adapter_model.safetensors"
LEFT = {"train-sae": "layers.*/*.safetensors", "tune": ADAPTER, "train-rl": ADAPTER}


def environment():
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def alone(fault, first, *words):
    """Exit status and output of one process."""
    done = subprocess.run(
        [sys.executable, WORKER, fault, "0", str(first), str(first), *words],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def in_two(fault, first, last, *words):
    """Exit status of torchrun, and the output, of two processes; the fault is in the second one."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", WORKER, fault, "1",
         str(first), str(last), *words],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def messages(printed):
    return re.findall(r"^resa-hf [a-z-]+: .*", printed, re.MULTILINE)


def steps_skipped(folder):
    log = json.loads((folder / "report.json").read_text())["log"]
    return max(entry.get("skipped_steps", 0) for entry in log)


@pytest.mark.long
@pytest.mark.parametrize("words", [[*SAES, "--spread_hookpoints"], TUNE, RL], ids=["Stage I", "Stage II", "RL"])
def test_sigterm_to_one_of_two_processes_stops_both_with_one_checkpoint(tmp_path, words, request, fault):
    words = [*words, *NEVER, "--max_steps", "8", "--output_dir"]
    code, printed = in_two("SIGTERM", 3, 3, *words, str(tmp_path / "parts"))
    assert code and [f"process {rank} ended with 75" in printed for rank in (0, 1)] == [True, True]
    # The processes agree a step later.
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-4"]
    assert in_two("none", 0, 0, *words, str(tmp_path / "parts"))[0] == 0
    assert in_two("none", 0, 0, *words, str(tmp_path / "whole"))[0] == 0
    assert_weights_agree(tmp_path / "parts", tmp_path / "whole", LEFT[words[0]], atol=0)
    (told,) = set(messages(printed))
    which = request.node.callspec.id
    fault(f"SIGTERM to one of two processes, {which}", told=told, kept="a checkpoint; the rerun has the same bits")


@pytest.mark.long
# Where SAEs are spread, a gradient is one process' own.
@pytest.mark.parametrize(("kind", "spread"), [("loss", []), ("gradient", ["--spread_hookpoints"])])
def test_what_is_not_finite_in_one_of_two_processes_is_left_out_in_both(tmp_path, kind, spread, fault):
    words = [*SAES, *spread, *NEVER, "--max_steps", "10", "--output_dir"]
    code, printed = in_two(kind, 3, 3, *words, str(tmp_path / "one"))
    assert code == 0, printed[-3000:]
    assert steps_skipped(tmp_path / "one") == 1
    started = time.monotonic()
    code, printed = in_two(kind, 2, 9, *words, str(tmp_path / "stopped"))
    assert code and time.monotonic() - started < 200
    # torchrun stops the slower one by SIGTERM while that tells the same.
    told = {message for message in messages(printed) if "stopped by SIGTERM" not in message}
    assert told and all("not finite in 5 steps in a row, up to step 6" in message for message in told)
    assert len(list((tmp_path / "stopped").glob("batch-not-finite-*.safetensors"))) == 2
    how = f"{kind} not finite in one of two processes" + (", SAEs spread" if spread else "")
    fault(how, told=min(told), kept="the batches; one such step only is left out, in both")


@pytest.mark.long
def test_one_of_two_processes_is_killed(tmp_path, fault):
    words = [*SAES, *EVERY_2, "--max_steps", "8", "--output_dir"]
    code, printed = in_two("SIGKILL", 4, 4, *words, str(tmp_path / "parts"))
    (told,) = messages(printed)
    assert code and "Process 0 of 2 lost another one" in told and "goes on from the last checkpoint" in told
    assert "resa_hf/cli.py" not in printed, "no trace of ours"
    assert (tmp_path / "parts" / "checkpoint-2" / "files.json").is_file()
    for folder in ("parts", "whole"):
        assert in_two("none", 0, 0, *words, str(tmp_path / folder))[0] == 0
    assert_weights_agree(tmp_path / "parts", tmp_path / "whole", LEFT["train-sae"], atol=0)
    fault("SIGKILL to one of two processes", told=told, kept="checkpoint-2; the rerun has the same bits")


@pytest.fixture
def sigint():
    """What is started from a script's background ignores the signal, and so does what it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.long
def test_ctrl_c_in_the_middle_of_a_step(tmp_path, fault, sigint):
    words = [*SAES, *EVERY_2, "--max_steps", "8", "--output_dir", str(tmp_path)]
    code, printed = alone("SIGINT", 5, *words)
    assert code == 130 and "Traceback" not in printed
    (told,) = messages(printed)
    assert told == "resa-hf train-sae: interrupted; what was finished is kept."
    assert (tmp_path / "checkpoint-4" / "files.json").is_file()
    assert alone("none", 0, *words)[0] == 0
    fault("Ctrl-C in the middle of a step", told=told, kept="checkpoint-4; the rerun ends")


@contextlib.contextmanager
def a_run_in_two(folder):
    """`resa-hf run` with two workers, one of which has written a checkpoint of Stage II, to be ended in the block.
    Afterwards a rerun ends it well, and leaves the SAEs that were finished as they are."""
    content = recipe(folder / "run", processes=2, seeds=[0, 1])
    content["stage2"] |= {"max_steps": 60, "save_strategy": "steps", "save_steps": 10}
    words = [sys.executable, "-m", "resa_hf.cli", "run", "--config", str(write(folder / "recipe.yaml", content))]
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while not any((folder / "run").glob("**/arms/**/checkpoint-10/files.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    workers = [one for one in psutil.Process(process.pid).children() if "spawn_main" in " ".join(one.cmdline())]
    yield process, workers
    assert not psutil.wait_procs(workers, timeout=20)[1]
    kept = {path: path.stat().st_mtime_ns for path in (folder / "run").glob("saes/**/*.safetensors")}
    assert subprocess.run(words, env=environment(), check=False).returncode == 0
    assert kept == {path: path.stat().st_mtime_ns for path in kept} and any((folder / "run").glob("report.md"))


@pytest.mark.long
def test_a_worker_of_a_run_is_killed(tmp_path, fault):
    with a_run_in_two(tmp_path) as (process, workers):
        workers[0].kill()
        printed = process.communicate(timeout=120)[0]
    assert process.returncode == 2 and "Traceback" not in printed
    (told,) = messages(printed)
    assert "A worker process was killed" in told and "processes: 1 (now 2)" in told
    fault(
        "a worker of `run` with processes: 2 killed", told=told, kept="finished jobs and checkpoints; the rerun ends"
    )


@pytest.mark.long
def test_ctrl_c_reaches_a_run_and_its_workers(tmp_path, fault, sigint):
    with a_run_in_two(tmp_path) as (process, _):
        os.killpg(process.pid, signal.SIGINT)
        printed = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "Traceback" not in printed, printed
    (told,) = messages(printed)
    fault("Ctrl-C to `run` with processes: 2", told=told, kept="finished jobs and checkpoints; the rerun ends")


@dataclass(frozen=True)
class Hungry(Job):
    """Takes 256 MiB in a group of processes that may have 64, for which Linux kills it."""

    group: str = ""

    def run(self, folder, settings):
        Path(self.group, "cgroup.procs").write_text(str(os.getpid()))
        bytearray(2**28)


@dataclass(frozen=True)
class Settings:
    run: SimpleNamespace
    stage1: dict
    stage2: dict


@pytest.fixture
def small_group():
    group = Path("/sys/fs/cgroup/memory") / f"resa-hf-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(2**26))
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    yield group
    group.rmdir()


@pytest.mark.long
def test_the_system_kills_a_worker_that_takes_too_much_memory(tmp_path, small_group, fault):
    settings = Settings(SimpleNamespace(processes=2), {}, {})
    with (
        pytest.raises(JobError, match=r"because memory was full: set processes: 1 \(now 2\)") as at,
        workers(SimpleNamespace(root=tmp_path), settings) as run_jobs,
    ):
        run_jobs([Hungry(0, group=str(small_group))], "Jobs")
    fault("out of memory (cgroup), a worker of `run`", told=at.value, kept="finished jobs")


class KilledLoader:
    """A collator whose process is killed at a batch, if it is a worker's."""

    def __init__(self, collate, at):
        self.collate, self.at, self.seen = collate, at, 0

    def __call__(self, batch):
        self.seen += 1
        if torch.utils.data.get_worker_info() is not None and self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.collate(batch)


@pytest.mark.long
def test_a_process_that_loads_data_is_killed(make_model, tmp_path, fault):
    def trainer(workers):
        settings = {"dataloader_num_workers": workers, "save_strategy": "steps", "save_steps": 1}
        return SAETrainer(make_model("qwen2"), config(tmp_path, **settings), rows(24))

    broken = trainer(1)
    broken.data_collator = KilledLoader(broken.data_collator, 5)
    with pytest.raises(
        ValueError, match=r"A process that loads data was killed at step \d.*num_workers: 0 \(now 1\)"
    ) as at:
        train_from_last_checkpoint(broken)
    # torch tells of the killed process wherever Python is when the signal comes, which may be after its pipe broke.
    with contextlib.suppress(RuntimeError):
        time.sleep(2)
    begun = broken.state.global_step
    assert begun >= 1
    rerun = trainer(0)
    train_from_last_checkpoint(rerun)
    assert rerun.state.global_step == 6
    fault("a DataLoader worker killed", told=at.value, kept=f"checkpoint-{begun}; the rerun ends")


def test_a_checkpoint_without_its_seconds_is_resumed(make_model, tmp_path, fault):
    """Killed between the rename that makes it a checkpoint and the file that the last callback adds."""

    class Killed(BaseException):
        pass

    class Kill(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise Killed

    def trainer(folder, *callbacks):
        args = config(tmp_path / folder, save_strategy="steps", save_steps=4)
        return SAETrainer(make_model("qwen2"), args, rows(24), callbacks=list(callbacks))

    with pytest.raises(Killed):
        train_from_last_checkpoint(trainer("parts", Kill()))
    checkpoint = tmp_path / "parts" / "checkpoint-4"
    assert (checkpoint / "files.json").is_file() and not (checkpoint / SECONDS).exists()
    resumed, whole = trainer("parts"), trainer("whole")
    seconds = train_from_last_checkpoint(resumed)
    train_from_last_checkpoint(whole)
    assert resumed.state.global_step == 6 and same(weights(resumed), weights(whole)) and 0 < seconds < 60
    told = "nothing: only the seconds before are not counted"
    fault("killed between a checkpoint's rename and its seconds.json", told=told, kept="the checkpoint; the same bits")


CHATTY = """
import sys
from resa_hf import cli
from resa_hf.commands import run
run.main = lambda words: [print("line", flush=True) for _ in range(100_000)]
sys.exit(cli.main(["run"]))
"""


def test_what_reads_the_output_has_ended(fault):
    line = f"{sys.executable} -c '{CHATTY}' | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 141 and done.stdout == "line\n"
    assert done.stderr.strip() == "resa-hf run: what read its output has ended; what was finished is kept."
    fault("output closed (`| head -1`)", told=done.stderr, kept="what was finished; status 141")


@pytest.mark.long
@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_a_closed_input_or_output_is_no_fault(tmp_path, closed, fault):
    words = [sys.executable, "-m", "resa_hf.cli", *SAES, *NEVER, "--max_steps", "2", "--output_dir", str(tmp_path)]
    done = subprocess.run(["bash", "-c", f'exec "$@" {closed}', "x", *words], env=environment(), check=False)
    assert done.returncode == 0 and (tmp_path / "report.json").is_file()
    what = "input" if closed.startswith("<") else "output"
    fault(f"standard {what} closed", told="nothing", kept="everything: it ends well")


def test_a_port_that_is_in_use_is_told(monkeypatch, fault):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(RuntimeError) as at:
            torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
    told = explained(at.value)
    assert told.startswith(f"The port {port} of 127.0.0.1") and "--main_process_port" in told
    fault("the port of torchrun in use", told=told, kept="everything: nothing was begun")


def test_only_what_is_known_is_shown_without_a_trace(monkeypatch):
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is typical")
    assert explained(RuntimeError("shapes cannot be multiplied")) is None and explained(broken) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert explained(broken).startswith("Process 1 of 2 lost another one")
    assert explained(torch.distributed.DistBackendError("NCCL error")).startswith("Process 1 of 2 lost")
    assert explained(RuntimeError("shapes cannot be multiplied")) is None
    full = JobError("arm, seed 0: Out of memory while answering: x.")
    full.__cause__ = MemoryError()
    assert explained(full) == str(full)
