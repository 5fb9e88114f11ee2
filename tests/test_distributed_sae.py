"""Stage I in two processes: what one process gives with the same batches, and every token once an epoch."""

import pytest
from distributed_runs import assert_logs_agree, assert_weights_agree, run_jobs, told
from distributed_worker import train_saes

from resa_hf.sae.checkpoint import list_saes
from resa_hf.sae.config import SAETrainingConfig
from resa_hf.sae.spread import HookpointShare

HOOKPOINTS = ["layers.0", "layers.1", "layers.2", "layers.3"]
# 18 rows: two whole rounds of 8, and one of 2, in which the second process has none. A large epsilon, because Adam's
# step for a gradient near zero has the size of its rounding.
SETTINGS = {
    "hookpoints": HOOKPOINTS,
    "rows": 18,
    "sae_optimizer": "adam",
    "adam_epsilon": 0.01,
    "learning_rate": 0.02,
    "auxk_alpha": 0.1,
    "dead_after_tokens": 100,
    "num_train_epochs": 2,
    "max_steps": -1,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
}
TOKENS = sum(16 - row % 5 for row in range(18))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One process; two with all SAEs on each; two with half of them; and that, resumed from the replicated run."""
    root = tmp_path_factory.mktemp("stage1")
    names = ("alone", "replicated", "spread", "resumed", "resumed-alone")
    made = {name: root / name for name in names}
    half = {**SETTINGS, "per_device_train_batch_size": 4}
    train_saes("alone", made["alone"], {**SETTINGS, "per_device_train_batch_size": 8})
    jobs = [
        ("train_saes", made["replicated"], half),
        ("train_saes", made["spread"], {**half, "spread_hookpoints": True}),
        (
            "train_saes",
            made["resumed"],
            {**half, "spread_hookpoints": True, "resume": str(made["replicated"] / "checkpoint-2")},
        ),
    ]
    run_jobs("ddp", jobs)
    back = {**SETTINGS, "per_device_train_batch_size": 8, "resume": str(made["spread"] / "checkpoint-4")}
    train_saes("alone", made["resumed-alone"], back)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["replicated", "spread"])
def test_two_processes_give_what_one_gives(folders, name):
    assert_logs_agree(folders[name], folders["alone"])
    for hookpoint in HOOKPOINTS:
        assert_weights_agree(folders[name], folders["alone"], f"{hookpoint}/*.safetensors")
    assert list_saes(folders[name]) == list_saes(folders["alone"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alone", "replicated", "spread"])
def test_every_token_counts_once_an_epoch(folders, name):
    seen = [entry["tokens_seen"] for entry in told(folders[name])["log"] if "tokens_seen" in entry]
    assert seen[2] == TOKENS and seen[5] == 2 * TOKENS and len(seen) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resumed", "resumed-alone"])
def test_a_checkpoint_goes_on_however_the_saes_are_held(folders, name):
    # Of two processes that hold all, in two that hold half each; of those, in one.
    assert_weights_agree(folders[name], folders["alone"], "layers.*/*.safetensors")
    assert_weights_agree(folders[name], folders["alone"], "checkpoint-6/**/*.safetensors")


@pytest.mark.slow
def test_checkpoints_have_the_same_files(folders):
    def files(name):
        found = (folders[name] / "checkpoint-4").rglob("*")
        return {path.relative_to(folders[name]).as_posix() for path in found if path.is_file()}

    assert files("spread") == files("replicated")


def test_more_processes_than_hookpoints_are_refused():
    with pytest.raises(ValueError, match="3 processes would share 2 hookpoints"):
        HookpointShare(["layers.0", "layers.1"], True, 0, 3)


def test_hookpoints_are_dealt_out_in_turn():
    shares = [HookpointShare(HOOKPOINTS[:3], True, index, 2) for index in range(2)]
    assert [share.mine for share in shares] == [["layers.0", "layers.2"], ["layers.1"]]
    assert HookpointShare(HOOKPOINTS, False, 1, 2).mine == HOOKPOINTS


def test_clipping_needs_all_gradients_in_one_place(tmp_path):
    with pytest.raises(ValueError, match="max_grad_norm: 0"):
        SAETrainingConfig(output_dir=str(tmp_path), hookpoints=["0"], spread_hookpoints=True, max_grad_norm=1.0)
