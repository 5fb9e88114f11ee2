"""Both stages as commands on the tiny reasoner, and disks that are too small: what tests of faults share."""

import itertools
import json
import os
import subprocess
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from resa_hf.cli import main
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.checkpoint import save_sae

STEPS = 6  # with checkpoints at 2 and 4
RESULT = {"stage1": "layers.1/sae_weights.safetensors", "stage2": "adapter_model.safetensors"}


class Commands:
    """Runs Stage I or II on 64 rows of a folder.

    Args:
        folder (`Path`): dataset and SAE are put here.
        capsys: pytest's, for the message.
    """

    def __init__(self, folder, capsys):
        self.folder, self._capsys = folder, capsys
        folder.mkdir(parents=True, exist_ok=True)
        self.rows, self.sae = folder / "mine.jsonl", folder / "sae"
        pairs = itertools.product(range(8), range(8))
        lines = [{"frage": f"{a}*{b}+1-{b}+{a} mod 10", "antwort": str((a * b + 1 + a - b) % 10)} for a, b in pairs]
        self.rows.write_text("\n".join(map(json.dumps, lines)))
        save_sae(TopKSAE(128, 256, 8, hookpoint="layers.2"), self.sae)

    def argv(self, stage, out, *flags):
        own = {
            "stage1": ["train-sae", "--hookpoints", "layers.1", "--num_latents", "64", "--k", "8"],
            "stage2": ["tune", "--sae", str(self.sae), "--lora_r", "2", "--use_cpu", "true"],
        }[stage]
        return [
            *own, "--dataset", str(self.rows), "--question_column", "frage", "--answer_column", "antwort",
            "--model_name_or_path", "resa_hf/tiny/base", "--dtype", "float32", "--held_out", "8", "--template", "chat",
            "--pack", "false", "--max_length", "64", "--max_steps", str(STEPS), "--save_strategy", "steps",
            "--save_steps", "2", "--per_device_train_batch_size", "4", "--report_to", "none", "--disable_tqdm",
            "true", "--output_dir", str(out), *flags,
        ]  # fmt: skip

    def fails(self, stage, out, *flags):
        """The message of a command that ends with it, and without a trace."""
        status = main(self.argv(stage, out, *flags))
        printed = self._capsys.readouterr().err
        assert status == 2 and "Traceback" not in printed, printed
        return printed[printed.rindex("\nresa-hf ") + 1 :].strip()

    def ends(self, stage, out, *flags):
        """The weights that a command ends with."""
        assert main(self.argv(stage, out, *flags)) == 0, self._capsys.readouterr().err
        self.printed = self._capsys.readouterr().out
        assert json.loads((out / "report.json").read_text())["seconds"] >= 0
        return load_file(out / RESULT[stage])


@pytest.fixture
def commands(tmp_path, capsys):
    return Commands(tmp_path / "given", capsys)


class Undisturbed:
    """Runs that nothing happens to, each made when it is first asked for."""

    def __init__(self, folder):
        self._folder, self._weights = folder, {}

    def weights(self, commands, stage):
        """What it ends with."""
        if stage not in self._weights:
            self._weights[stage] = commands.ends(stage, self._folder / stage)
        return self._weights[stage]

    def room(self, commands, stage, checkpoints, result=0.0):
        """Bytes for so many checkpoints, and for a part of the result."""
        self.weights(commands, stage)
        files = [path for path in (self._folder / stage / "checkpoint-2").rglob("*") if path.is_file()]
        whole = sum(-(-path.stat().st_size // 4096) * 4096 for path in files)
        return int(checkpoints * whole + result * (self._folder / stage / RESULT[stage]).stat().st_size) + 40_000


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@contextmanager
def at_step(monkeypatch, step, do):
    """Once, in the next training, `do` is called after so many steps."""
    from transformers.trainer_callback import CallbackHandler

    usual = CallbackHandler.on_step_end

    def watched(self, args, state, control, **kwargs):
        control = usual(self, args, state, control, **kwargs)
        if state.global_step == step:
            do()
        return control

    with monkeypatch.context() as patch:
        patch.setattr(CallbackHandler, "on_step_end", watched)
        yield


class Disk:
    """A file system of its own at a folder; the tests that need one are skipped where none can be mounted."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        if os.geteuid() or self._run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder):
            pytest.skip("only root can mount a small disk")

    @staticmethod
    def _run(*words):
        return subprocess.run(list(map(str, words)), capture_output=True).returncode

    def resize(self, size):
        assert self._run("mount", "-o", f"remount,size={size}", self.folder) == 0

    def fill(self):
        content = b"\0" * self._free()
        (self.folder / "ballast").write_bytes(content)
        assert self._free() == 0

    def _free(self):
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_bsize

    def protect(self):
        """Read-only from now on, also while files are open in it, as after an error of the disk."""
        assert self._run("mount", "--bind", self.folder, self.folder) == 0
        assert self._run("mount", "-o", "remount,bind,ro", self.folder) == 0

    def unprotect(self):
        assert self._run("umount", self.folder) == 0

    def close(self):
        while os.path.ismount(self.folder):
            self._run("umount", "-l", self.folder)


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path / "disk")
    yield made
    made.close()
