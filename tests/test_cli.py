"""The command line as a user meets it: exit status, message, and no trace."""

import json
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from resa_hf.cli import COMMANDS, main
from resa_hf.models import load_causal_lm, load_tokenizer
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.checkpoint import save_sae


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [
        {"frage": f"{a}*{b}+1-{b}+{a} mod 10", "antwort": str((a * b + 1 - b + a) % 10)}
        for a in range(8)
        for b in range(8)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def sae_folder(path, d_in=128, hookpoint="layers.2"):
    save_sae(TopKSAE(d_in, 256, 8, hookpoint=hookpoint), path)
    return path


def weights_of(path):
    return next(path.glob("**/*.safetensors"))


def put_nan(path):
    save_file(
        {name: value.index_fill(0, torch.tensor([1]), float("nan")) for name, value in load_file(path).items()}, path
    )


@pytest.fixture
def tune(tmp_path, rows, capsys):
    """Runs `resa-hf tune` on the tiny base with these flags; returns exit status and message."""

    def run(*flags, data=None):
        status = main(
            ["tune", "--model_name_or_path", "resa_hf/tiny/base", "--dtype", "float32", "--dataset", str(data or rows),
             "--question_column", "frage", "--answer_column", "antwort", "--held_out", "8", "--template", "chat",
             "--pack", "false", "--max_length", "64", "--max_steps", "1", "--report_to", "none",
             "--output_dir", str(tmp_path / "out"), *flags]
        )  # fmt: skip
        return status, capsys.readouterr().err

    return run


def test_tune_trains_an_adapter_and_says_where_it_is(tmp_path, tune, capsys):
    status, _ = tune("--sae", str(sae_folder(tmp_path / "sae")))
    assert status == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["held_out"]["eval_loss"] > 0 and "64 of 64 rows" in report["data"]["rows"]


def test_a_rerun_with_other_settings_or_data_is_refused(tmp_path, tune, rows):
    flags = ["--sae", str(sae_folder(tmp_path / "sae"))]
    assert tune(*flags)[0] == 0
    adapter = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    status, message = tune(*flags, "--kl_beta", "1")
    assert status == 2 and "other settings (settings.kl_beta)" in message
    rows.write_text(rows.read_text().replace('"antwort": "1"', '"antwort": "2"'))
    status, message = tune(*flags)
    assert status == 2 and "other settings (data)" in message
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == adapter
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["max_steps"] == 1 and "trl" in report["versions"]


def test_a_source_without_use_and_a_use_without_source(tmp_path, tune):
    status, message = tune("--kl_reference", "source")
    assert status == 2 and "a source model is not named" in message
    status, message = tune("--sae", str(sae_folder(tmp_path / "sae")), "--source_model", "resa_hf/tiny/source")
    assert status == 2 and "a source model is named" in message


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_dry_run_of_other_architectures(kind, make_model, tmp_path, capsys):
    make_model(kind).save_pretrained(tmp_path / kind)
    flags = ["--dataset", "d", "--model_name_or_path", str(tmp_path / kind), "--dry_run"]
    assert main(["tune", *flags, "--sae", "somewhere"]) == 0
    assert "Stage II:" in capsys.readouterr().out
    assert main(["train-sae", *flags, "--hookpoints", "1"]) == 0
    assert main(["train-sae", "--model_name_or_path", "resa_hf/tiny/source", "--dataset", "d", "--dry_run"]) == 0


def test_unknown_hookpoint(tmp_path, tune):
    status, message = tune("--sae", str(sae_folder(tmp_path / "sae")), "--hookpoint", "layers.9")
    assert status == 2 and "Unknown hookpoint 'layers.9'. Valid: layers.0 to layers.3" in message


def test_sae_of_another_width(tmp_path, tune):
    status, message = tune("--sae", str(sae_folder(tmp_path / "sae", d_in=96)))
    assert status == 2 and "width 96, but those of 'layers.2' have width 128" in message


def test_sae_of_an_mlp_output_in_the_residual_stream(tmp_path, tune):
    folder = str(sae_folder(tmp_path / "sae", hookpoint="layers.2.mlp"))
    status, message = tune("--sae", folder, "--hookpoint", "layers.2")
    assert status == 2 and "trained on 'layers.2.mlp' and is to be spliced into 'layers.2'" in message
    with pytest.warns(UserWarning, match=r"its FVU is \d"):
        assert tune("--sae", folder, "--hookpoint", "layers.2", "--allow_hookpoint_mismatch", "true")[0] == 0


def test_corrupt_and_truncated_and_nan_weights(tmp_path, tune):
    for name, damage in (
        ("truncated", lambda path: path.write_bytes(path.read_bytes()[:-100])),
        ("corrupt", lambda path: path.write_bytes(b"\xff" * 200)),
        ("nan", put_nan),
    ):  # fmt: skip
        folder = sae_folder(tmp_path / name)
        damage(weights_of(folder))
        status, message = tune("--sae", str(folder))
        assert status == 2 and "safetensors" in message, message
        assert ("NaN or infinite" if name == "nan" else "corrupt or cut short") in message


def test_an_sae_that_is_not_there(tmp_path, tune):
    status, message = tune("--sae", str(tmp_path / "nowhere"))
    assert status == 2 and "nowhere" in message


def test_empty_dataset_and_missing_column(tmp_path, tune, rows):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    sae = str(sae_folder(tmp_path / "sae"))
    status, message = tune("--sae", sae, data=empty)
    assert status == 2 and "empty.jsonl" in message
    status, message = tune("--sae", sae, "--answer_column", "loesung")
    assert status == 2 and "no column 'loesung'. Its columns: 'frage', 'antwort'" in message


def test_settings_that_contradict_each_other(tmp_path, tune):
    status, message = tune("--sae_in", "teacher", "--sae_gradient", "stop")
    assert status == 2 and "has no meaning with sae_in: teacher" in message
    status, message = tune()
    assert status == 2 and "the loss zero" in message


def test_completion_only_loss_counts_answers_alone(tmp_path, tune, rows):
    for dry in ([], ["--dry_run"]):
        status, told = tune("--completion_only_loss", "true", "--pack", "true", *dry)
        assert status == 2 and "completion_only_loss needs pack: false" in told
    flags = ["--kl_weight", "0", "--sft_weight", "1", "--learning_rate", "0", "--per_device_train_batch_size", "64"]
    assert tune(*flags, "--logging_steps", "1", "--completion_only_loss", "true", data=rows)[0] == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    (trained,) = (entry["loss"] for entry in report["log"] if "loss" in entry)
    # The seed says which 8 are held out. Every answer has as many tokens.
    assert (56 * trained + 8 * report["held_out"]["eval_loss"]) / 64 == pytest.approx(loss_of_answers(rows), rel=1e-5)


@torch.no_grad()
def loss_of_answers(rows):
    """The mean over all answers' tokens, their ends included, of the tiny base's cross-entropy, row by row."""
    model = load_causal_lm("resa_hf/tiny/base", dtype=torch.float32)
    tokenizer = load_tokenizer("resa_hf/tiny/base")
    losses = []
    for row in map(json.loads, rows.read_text().splitlines()):
        prompt = tokenizer(f"User: {row['frage']}\nAssistant: <think>")["input_ids"]
        answer = tokenizer(f"{row['antwort']}</think><answer>{row['antwort']}</answer>")["input_ids"]
        ids, begin = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]]), len(prompt)
        logits = model(ids).logits[0, begin - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, begin:], reduction="none"))
    return torch.cat(losses).mean().item()


def test_wrong_choice_and_unknown_key_in_yaml(tmp_path, tune):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("kl_reference: basis")
    assert "kl_reference is 'basis'; it must be one of base, adapted, source" in tune("--config", str(recipe))[1]
    recipe.write_text("kl_referenz: base")
    assert "unknown keys: kl_referenz" in tune("--config", str(recipe))[1]


def test_an_unwritable_folder(tmp_path, tune):
    (tmp_path / "file").write_text("")
    status, message = tune("--sae", str(sae_folder(tmp_path / "sae")), "--output_dir", str(tmp_path / "file" / "out"))
    assert status == 2 and "cannot be written" in message


def test_a_model_that_is_not_there(tune):
    status, message = tune("--model_name_or_path", "nobody/nothing")
    assert status == 2 and "nobody/nothing" in message


def test_usage_and_unknown_commands(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "75 after SIGTERM" in printed
    assert all(name in printed for name in COMMANDS)
    assert main(["tun"]) == 2
    assert "unknown command 'tun'" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert ("--folder" if command == "publish" else "--model_name_or_path") in capsys.readouterr().out


def test_dry_run_loads_nothing_and_predicts_memory(tmp_path, capsys):
    assert main(["demo", "--dry_run", "--output_dir", str(tmp_path / "x")]) == 0
    printed = capsys.readouterr().out
    assert "10 SAE trainings; 9 trained arms x 5 seeds" in printed and "Stage II: " in printed
    assert not (tmp_path / "x").exists()
    assert json.loads(printed[: printed.index("\n\n")])["run"]["model_name_or_path"] == "resa_hf/tiny/base"


def test_a_command_that_is_done_leaves_the_group_of_its_processes(tmp_path):
    code = (
        "import sys, torch.distributed as group; from resa_hf.cli import main\n"
        "group.init_process_group('gloo', store=group.HashStore(), rank=0, world_size=1)\n"
        "assert main(sys.argv[1:]) == 0 and not group.is_initialized()"
    )
    words = ["demo", "--dry_run", "--output_dir", str(tmp_path / "x")]
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)


def test_help_is_quick():
    def seconds():
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "resa_hf.cli", "--help"], check=True, capture_output=True)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 0.6


@pytest.mark.long
def test_without_the_extra_benchmarks_say_how_to_install_it(rows, tmp_path):
    model = ["--model_name_or_path", "resa_hf/tiny/base", "--output_dir", str(tmp_path / "out")]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"dataset: {rows}\nquestion_column: frage\nanswer_column: antwort\nheld_out: 8\ntemplate: chat\npack: false\n"
        "tasks: [resa:aime24]\nstage1: {hookpoints: [layers.1], max_length: 32}\n"
    )
    code = "import sys; sys.modules['lighteval'] = None; from resa_hf.cli import main; sys.exit(main(sys.argv[1:]))"
    for command in (["evaluate", "--tasks", "resa:aime24"], ["run", "--config", str(recipe)]):
        done = subprocess.run([sys.executable, "-c", code, *command, *model], capture_output=True, text=True)
        assert done.returncode == 2 and "pip install 'resa-hf[eval]'" in done.stderr
