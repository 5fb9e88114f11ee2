"""Checkpoints under any order of saves, damage and resumptions: the newest undamaged one is found."""

import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from resa_hf.checkpoints import FILES, WholeCheckpoints, checkpoints, damage, newest_whole, set_torn_aside

STATE = "trainer_state.json"
contents = st.dictionaries(
    st.sampled_from(["weights-of-it.bin", "in/a-folder.json", "rng"]), st.binary(min_size=1, max_size=40), min_size=1
)


class Saver:
    """What of Trainer writes checkpoints."""

    def __init__(self, folder, limit, step, files, is_best, best):
        self.folder, self.files, self.is_best = folder, files, is_best
        self.args = SimpleNamespace(should_save=True, save_total_limit=limit, local_process_index=0)
        self.accelerator = SimpleNamespace(wait_for_everyone=lambda: None)
        self.state = SimpleNamespace(global_step=step, best_model_checkpoint=best, save_to_json=self._save_state)

    def _get_output_dir(self, trial):
        return str(self.folder)

    def _save_state(self, path):
        Path(path).write_text(json.dumps({"best": self.state.best_model_checkpoint}))

    def _save_checkpoint(self, model, trial):
        place = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        for name, content in self.files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        if self.is_best:
            self.state.best_model_checkpoint = str(place)


class Trainer(WholeCheckpoints, Saver):
    pass


class Checkpoints(RuleBasedStateMachine):
    """`written`: by step the bytes of all files as they were when the checkpoint stood. No code of the package's."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="checkpoints-"))
        self.written, self.best = {}, 0

    def teardown(self):
        shutil.rmtree(self.folder)

    def place(self, step):
        return self.folder / f"checkpoint-{step}"

    def is_whole(self, step):
        """Each file there with its bytes; of the list of files, that it says what it said."""
        try:
            listed = (self.place(step) / FILES).read_bytes()
            same = json.loads(listed) == json.loads(self.written[step][FILES])
            return same and all(
                (self.place(step) / name).read_bytes() == content
                for name, content in self.written[step].items()
                if name != FILES
            )
        except (OSError, ValueError):
            return False

    @rule(step=st.integers(1, 12), files=contents, limit=st.sampled_from([None, 0, 1, 2, 3]), is_best=st.booleans())
    def save(self, step, files, limit, is_best):
        every = {*self.written, step}
        trainer = Trainer(self.folder, limit, step, files, is_best, self.best and str(self.place(self.best)))
        with mock.patch("resa_hf.checkpoints.check_finite"):
            trainer._save_checkpoint(None, None)
        self.best = step if is_best else self.best
        there = {number for number in range(20) if self.place(number).is_dir()}
        kept = {step, max(every), self.best} & every
        assert kept <= there <= every
        assert there == every if not limit else len(there) <= max(limit, len({step, max(every), self.best} - {0}))
        gone = every - there
        assert all(number > other for number in there - kept for other in gone)
        paths = [path for path in self.place(step).rglob("*") if path.is_file()]
        written = {path.relative_to(self.place(step)).as_posix(): path.read_bytes() for path in paths}
        assert written.keys() == files.keys() | {STATE, FILES}
        assert all(written[name] == content for name, content in files.items())
        self.written = {number: {**self.written, step: written}[number] for number in there}

    def some_file(self, data):
        step = data.draw(st.sampled_from(sorted(self.written)))
        files = sorted(path for path in self.place(step).rglob("*") if path.is_file())
        return data.draw(st.sampled_from(files)) if files else None

    @precondition(lambda self: self.written)
    @rule(data=st.data(), other=st.integers(1, 255))
    def change_a_byte(self, data, other):
        path = self.some_file(data)
        if path is not None and (content := path.read_bytes()):
            at = data.draw(st.integers(0, len(content) - 1))
            path.write_bytes(content[:at] + bytes([content[at] ^ other]) + content[at + 1 :])

    @precondition(lambda self: self.written)
    @rule(data=st.data(), how=st.sampled_from(["deleted", "cut", "longer", "empty", "a folder"]))
    def lose(self, data, how):
        path = self.some_file(data)
        if path is None:
            return
        content = path.read_bytes()
        path.unlink()
        if how == "a folder":
            path.mkdir()
        elif how != "deleted":
            path.write_bytes({"cut": content[:-1], "longer": content + b"\0", "empty": b""}[how])

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def lose_a_checkpoint(self, data):
        step = data.draw(st.sampled_from(sorted(self.written)))
        shutil.rmtree(self.place(step))
        del self.written[step]

    @rule(name=st.sampled_from(["checkpoint-x", "checkpoint-", "checkpoint-5.tmp", "xcheckpoint-99", ".unfinished/y"]))
    def leave_something_else(self, name):
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / name / FILES).write_text("{}")

    @rule()
    def resume(self):
        newest = newest_whole(self.folder)
        set_torn_aside(self.folder)
        left = {int(path.name.rpartition("-")[2]): path for path in checkpoints(self.folder)}
        step = max((number for number in self.written if self.is_whole(number)), default=0)
        # Those that are newer than the newest whole one, and no others.
        assert left.keys() == {number for number in self.written if number <= step}
        assert newest == (self.place(step) if step else None)
        self.written = {number: self.written[number] for number in left}

    @invariant()
    def the_newest_whole_one_is_found(self):
        whole = [step for step in self.written if self.is_whole(step)]
        assert newest_whole(self.folder) == (self.place(max(whole)) if whole else None)
        assert {step for step in self.written if damage(self.place(step)) is None} == set(whole)


def test_what_was_just_written_is_kept_where_a_higher_step_lies_there(tmp_path):
    for step in (2, 1):
        with mock.patch("resa_hf.checkpoints.check_finite"):
            Trainer(tmp_path, 1, step, {"weights": b"x"}, False, None)._save_checkpoint(None, None)
        (tmp_path / "checkpoint-2" / "weights").unlink(missing_ok=True)
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-1"


TestCheckpoints = Checkpoints.TestCase
TestCheckpoints.settings = settings(stateful_step_count=15)
