"""Commands on the tiny reasoner that end in seconds, started here and killed."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
from distributed_runs import TESTS
from small_sweep import recipe, write

STEPS, EVERY = 9, 2
# What the commands import. Those of one process are forked from a process that has done so, and has run nothing.
_IMPORTED = [
    "resa_hf.commands.single_stage", "resa_hf.rl.run", "resa_hf.experiment.answering", "resa_hf.experiment.pipeline",
    "resa_hf.experiment.sweep_report", "resa_hf.experiment.sweep_checks", "resa_hf.experiment.evaluate",
    "resa_hf.experiment.evaluate_report", "torch._dynamo",
]  # fmt: skip
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(_IMPORTED)
# What Python tells its audit hooks of: before the operation is done.
_OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
Started = BaseProcess | subprocess.Popen[bytes]

_DATA = ["--model_name_or_path", "resa_hf/tiny/base", "--dtype", "float32", "--dataset", "tiny-reasoner"]
_DATA += ["--limit", "120", "--held_out", "21", "--template", "chat"]
_STEPS = ["--max_steps", str(STEPS), "--save_steps", str(EVERY), "--save_total_limit", "1", "--disable_tqdm", "false"]
_STAGE = ["--per_device_train_batch_size", "4", "--max_length", "64", "--report_to", "none", "--use_cpu"]
_STAGE += ["--save_strategy", "steps", "--logging_steps", "1"]
_SAES = ["--hookpoints", "layers.1", "layers.2", "--num_latents", "64", "--k", "4", "--auxk_alpha", "0.1"]
_SAES += ["--dead_after_tokens", "400"]
_RL = ["--config", str(TESTS.parent / "recipes/tiny-reasoner/rl/grpo.yaml"), "--limit", "900"]
_RL += ["--per_device_train_batch_size", "8", "--num_generations", "4", "--checkpoints", "1", "5"]
_EVALUATE = ["--model_name_or_path", "resa_hf/tiny/base", "--dtype", "float32", "--file_prompt", "plain"]
_EVALUATE += ["--temperature", "1.0", "--top_p", "1.0", "--max_new_tokens", "48", "--samples", "2"]
_EVALUATE += ["--batch_size", "4"]


@dataclass(frozen=True)
class Command:
    """`resa-hf NAME`, in one process or in two.

    Args:
        name (`str`): its name.
        processes (`int`): how many work.
        launched (`bool`): whether torchrun starts them; else the command does, if they are two.
    """

    name: str
    processes: int
    launched: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{self.processes}"

    @property
    def forked(self) -> bool:
        """Whether it runs in one process, forked from one that has imported everything."""
        return self.processes == 1

    def words(self, inputs: Path, output: Path) -> list[str]:
        """What comes behind `resa-hf`; `inputs` is as [`make_inputs`] leaves it."""
        tuned = ["--sae", str(inputs / "saes"), "--sae_id", "layers.2", "--learning_rate", "1e-3"]
        adapter = ["--adapters", "source=resa_hf/tiny/source", "--tasks", str(inputs / "chains.jsonl")]
        rest = {
            "train-sae": [*_DATA, *_STAGE, *_STEPS, *_SAES],
            "tune": [*_DATA, *_STAGE, *_STEPS, *tuned],
            "train-rl": [*_RL, *_STEPS],
            "sweep": ["--config", str(inputs / "sweep.yaml"), "--processes", str(self.processes)],
            "run": ["--config", str(inputs / "answers.yaml"), "--processes", str(self.processes)],
            "evaluate": [*_EVALUATE, *adapter],
        }[self.name]
        return [self.name, *rest, "--output_dir", str(output)]


def make_inputs(folder: Path) -> None:
    """Recipes, problems and SAEs for the commands."""
    from resa_hf.tiny.task import make_rows, training_questions

    folder.mkdir()
    rows = make_rows(24, seed=7, exclude=training_questions())
    (folder / "chains.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = recipe(folder, grid={"stage2.learning_rate": [1e-3, 2e-3]})
    for stage in ("stage1", "stage2"):
        steps = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": EVERY, "save_total_limit": 1}
        # A log over several steps is one of those since the last checkpoint.
        content[stage] |= steps | {"per_device_train_batch_size": 4, "logging_steps": 1}
    content["sampling"]["batch_size"] = 2
    write(folder / "sweep.yaml", content)
    # Nothing is trained: two processes answer.
    known = {name: {"known": name} for name in ("zero_adapter", "weight_noise", "source")}
    content = recipe(folder, arms=known, held_out=24)
    content["sampling"] |= {"batch_size": 2, "samples": 2}
    write(folder / "answers.yaml", content)
    finish(Command("train-sae", 1), folder, folder / "saes")


def log_of(output: Path) -> str:
    """What the last command with this output folder has printed."""
    return output.with_name(f"{output.name}.log").read_text(errors="replace")


def operations_of(output: Path) -> list[tuple[str, str]]:
    """The file operations below its output folder that a forked command has done, and the path of each."""
    lines = output.with_name(f"{output.name}.operations").read_text().splitlines()
    return [(event, path) for event, path in map(json.loads, lines)]


def start(command: Command, inputs: Path, output: Path, at: int | None = None) -> Started:
    """Starts a command; one that is forked gets SIGKILL before its `at`-th file operation below the output folder."""
    words = command.words(inputs, output)
    if command.forked:
        process = _FORKED.Process(target=_work, args=(words, output, at))
        process.start()
        return process
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if command.launched else []
    with output.with_name(f"{output.name}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "resa_hf.cli", *words],
            stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def _work(words: list[str], output: Path, at: int | None) -> None:
    """What the forked process does."""
    log, told = (
        os.open(output.with_name(f"{output.name}.{ending}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for ending in ("log", "operations")
    )
    os.dup2(log, 1)
    os.dup2(log, 2)
    seen = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        if event in _OPERATIONS and str(args[0]).startswith(str(output)):
            os.write(told, f"{json.dumps([event, str(args[0])])}\n".encode())
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    import torch

    from resa_hf.cli import main

    torch.set_num_threads(1)
    sys.addaudithook(hook)
    code = main(words)
    sys.stdout.flush()
    os._exit(code)


def code_of(process: Started, seconds: float) -> int | None:
    """With what a command has ended, at the latest after so many seconds; `None` if it goes on."""
    if isinstance(process, BaseProcess):
        process.join(seconds)
        return process.exitcode
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.poll()


def finish(command: Command, inputs: Path, output: Path) -> None:
    """Runs a command, which must end well."""
    code = code_of(start(command, inputs, output), 500)
    assert code == 0, (code, log_of(output)[-4000:])


def workers_of(process: Started) -> list[psutil.Process]:
    """Those that share the work of a command in two processes."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children()
        return [child for child in children if {"resa_hf.cli", "--multiprocessing-fork"} & set(child.cmdline())]
    return []


def kill(process: Started, whom: str, worker: int) -> None:
    """SIGKILL to `"all"` of a command's processes, the `"parent"`, or `"one"` of its workers. Then all must end."""
    parent = psutil.Process(process.pid)
    everybody = [parent, *parent.children(recursive=True)]
    for one in {"all": everybody, "parent": [parent], "one": workers_of(process)[worker : worker + 1]}[whom]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
    code = code_of(process, 120)
    assert code, (whom, code)
    # Nobody is left to tell them, but they see it themselves.
    deadline = time.monotonic() + 10
    while alive := [one for one in everybody if not _ended(one)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


def _ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
