"""`resa-hf features` as users run it, on the tiny reasoner with SAEs that have learned nothing."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from features_by_hand import dense
from test_readme import ROOT

from resa_hf.cli import main
from resa_hf.commands.recipe import parse_flat, read_yaml
from resa_hf.experiment import features_report
from resa_hf.experiment.feature_tests import _same_start, own_answers
from resa_hf.experiment.features import load_subject
from resa_hf.features.arguments import FeatureArguments
from resa_hf.features.causal import ablate, amplify, edited
from resa_hf.features.effects import next_token_kl
from resa_hf.hookpoints import capture
from resa_hf.models import load_causal_lm, load_tokenizer
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.checkpoint import load_sae, save_sae

PROMPT = "think in <think> and </think> then answer in <answer> and </answer>"
LAYERS = ("layers.0", "layers.2")


@pytest.fixture(scope="module")
def saes(tmp_path_factory):
    """Two SAEs of the source, one of them in a folder with a name of its own; and a checkpoint of the training."""
    folder = tmp_path_factory.mktemp("saes")
    width = load_causal_lm("resa_hf/tiny/source").config.hidden_size
    for seed, (name, hookpoint) in enumerate(zip(("early", LAYERS[1]), LAYERS, strict=True)):
        sae = TopKSAE(width, 256, 40, hookpoint=hookpoint, seed=seed)
        save_sae(sae, folder / name)
        save_sae(sae, folder / "checkpoint-10" / name)
    return folder


def features(saes, out, *flags):
    return main(
        ["features", "--model_name_or_path", "resa_hf/tiny/source", "--saes", str(saes), "--dtype", "float32",
         "--prompt", PROMPT, "--dataset", "tiny-reasoner", "--limit", "120", "--held_out", "12", "--template", "chat",
         "--pack", "false", "--max_length", "128", "--temperature", "1.0", "--max_new_tokens", "48", "--passages", "6",
         "--problems", "6", "--nulls", "4", "--answer_nulls", "2", "--tested", "2", "--examples", "2",
         "--output_dir", str(out), *flags]
    )  # fmt: skip


@torch.no_grad()
def by_hand(saes, name, hookpoint):
    """Latents active at some `<think>` and some `</think>` of the prompt, and at no other token."""
    model, tokenizer = (load("resa_hf/tiny/source") for load in (load_causal_lm, load_tokenizer))
    ids = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    with capture(model.float(), [hookpoint]) as hooked:
        model(torch.tensor([ids]))
    active = dense(load_sae(saes / name), hooked[hookpoint][0]) > 0
    words = [tokenizer.decode([token]) for token in ids]
    found = []
    for latent in range(active.shape[1]):
        at = {words[i] if words[i] in ("<think>", "</think>") else "" for i in range(len(ids)) if active[i, latent]}
        if at == {"<think>", "</think>"}:
            found.append(latent)
    return found


@pytest.mark.slow
def test_the_whole_way_and_a_rerun_that_does_only_what_is_missing(saes, tmp_path, capsys):
    out = tmp_path / "out"
    assert features(saes, out, "--other_model", "resa_hf/tiny/base", "--other_saes", str(saes)) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    found = {layer["hookpoint"]: layer["latents"] for layer in report["layers"]}
    wanted = {
        hookpoint: by_hand(saes, name, hookpoint)
        for name, hookpoint in zip(("early", "layers.2"), LAYERS, strict=True)
    }
    assert found == wanted and any(wanted.values())
    total = sum(map(len, wanted.values()))
    assert f"at no other token of the prompt: {total}, at" in printed and str(out / "report.html") in printed
    # By decoder the same SAEs are the same: the other model's are the first's.
    decoder = report["matching"]["decoder"]
    both = [
        one for one, first in zip(decoder["similarity"], decoder["first"], strict=True) if first in decoder["second"]
    ]
    assert len(both) > 100 and both == pytest.approx([1.0] * len(both), abs=1e-5)
    assert not report["matching"]["same_start"]  # these do not tell their seeds
    assert report["revisions"]["sae"]["name"] == report["revisions"]["other_sae"]["name"] == str(saes)
    assert report["revisions"]["other"]["name"] == "resa_hf/tiny/base"
    tested, edits = report["tested"], report["effects"]["edits"]
    assert set(tested["latents"]) <= set(wanted[tested["hookpoint"]]) and len(tested["latents"]) <= 2
    for edit in edits:
        assert edit["kl"]["estimate"] >= 0 and edit["nulls"]["kl"]["p_value"] >= 1 / (1 + edit["nulls"]["kl"]["n"])
    assert all(text in (out / "report.md").read_text() for text in ("layers.0", "layers.2", "(pictures/counts.png)"))
    assert_stands_alone(out / "report.html")
    for name in ("counts", "counts-dark", "quality", "prompt", "matching"):
        assert (out / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    (out / "parts" / "examples.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in (out / "parts").glob("*.json")}
    assert features(saes, out, "--other_model", "resa_hf/tiny/base", "--other_saes", str(saes)) == 0
    assert re.findall(r"^\[(\w+)\]$", capsys.readouterr().out, re.MULTILINE) == ["examples"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again = json.loads((out / "report.json").read_text())
    assert again == report
    assert features(saes, out, "--seed", "1") == 2
    assert re.search(r"other settings \(.*settings\.other_model, .*settings\.seed\)", capsys.readouterr().err)


def assert_stands_alone(page):
    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, dict(attrs)))

    found = []
    Tags().feed(page.read_text())
    images = [attrs for tag, attrs in found if tag == "img"]
    assert len(images) >= 3 and all(image["src"].startswith("data:") and image["alt"] for image in images)
    assert not [tag for tag, attrs in found if tag in ("script", "link", "iframe") or "href" in attrs]


@pytest.mark.long
def test_without_problems_and_with_latents_of_ones_own(saes, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ("--problems", "0", "--test_hookpoint", "2", "--test_latents", "3", "9")
    assert features(saes, out, *flags) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["tested"]["hookpoint"] == "layers.2" and report["tested"]["latents"] == [3, 9]
    assert all(edit["accuracy"] is None for edit in report["effects"]["edits"])
    assert not (out / "answers.jsonl").exists()
    printed = capsys.readouterr().out
    assert "The SAE of layers.2" in printed and "the latents that the settings name: 3, 9." in printed
    assert "held-out text" in printed


@pytest.mark.long
def test_latents_that_attribution_chooses_are_tested_on_the_other_half(tmp_path, capsys):
    out, folder = tmp_path / "out", tmp_path / "saes"
    width = load_causal_lm("resa_hf/tiny/source").config.hidden_size
    save_sae(TopKSAE(width, 64, 4, hookpoint="layers.1"), folder / "layers.1")
    assert by_hand(folder, "layers.1", "layers.1") == []
    assert features(folder, out, "--problems", "7", "--tested", "1", "--max_new_tokens", "24") == 0
    report = json.loads((out / "report.json").read_text())
    args = FeatureArguments(**report["settings"])
    subject = load_subject(args)
    answers = own_answers(subject)
    assert len(answers.rows) == 7 and report["attribution"]["answers"] in (sum(answers.right[:3]), 3)
    sae, latents = subject.saes["layers.1"](), report["tested"]["latents"]
    first, second = (
        [row for row, right in zip(answers.rows[:3], answers.right, strict=False) if right] or answers.rows[:3],
        answers.rows[3:],
    )
    drop = []
    for row in first:
        ids, start = torch.tensor([row["input_ids"]]), row["prompt_length"]
        for change in (amplify(1.0), ablate):
            with torch.no_grad(), edited(subject.model, 1, sae, latents, change):
                logits = subject.model(ids.to(subject.model.device)).logits[0].float().cpu()
            drop.append(-torch.nn.functional.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum"))
    (line,) = [line for line in report["attribution"]["checked"] if line["latent"] == latents[0]]
    assert line["ablation"] == pytest.approx(float(sum(drop[::2]) - sum(drop[1::2])) / len(first), abs=1e-3)
    ablated = next(edit for edit in report["effects"]["edits"] if edit["change"] == "ablate")
    kl = next_token_kl(subject.model, "layers.1", sae, latents, ablate, second)
    assert ablated["kl"]["estimate"] == pytest.approx(kl.mean(), rel=1e-4)
    assert ablated["kl"]["estimate"] != pytest.approx(
        next_token_kl(subject.model, "layers.1", sae, latents, ablate, answers.rows).mean(), rel=1e-4
    )
    assert ablated["accuracy"]["n"] == 4
    text = (out / "report.md").read_text()
    assert "largest attribution on the first half of the texts are tested, on the other half" in text
    assert re.search(rf"^\| sae +\| {re.escape(str(folder))} +\|", text, re.MULTILINE)
    assert re.search(r"^\| dataset +\| tiny-reasoner +\|", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--hookpoints", "layers.1"), "has no SAE at layers.1. It has: layers.0, layers.2."),
        (("--hookpoints", "layers.9"), "Unknown hookpoint 'layers.9'"),
        (("--cues", "<reflect>"), "no tokens for the cue '<reflect>'"),
        (("--problems", "13"), "only 12 are held out"),
        (("--problems", "1"), "at least 2"),
        (("--other_saes", "mine"), "other_saes needs other_model"),
        (("--nulls", "1"), "nulls is 1"),
        (("--component", "3"), "component"),
    ],
)
def test_bad_settings_end_with_a_message(saes, tmp_path, capsys, flags, said):
    assert features(saes, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_saes_of_one_seed_are_known_to_be_alike_for_that_reason(saes):
    def with_metadata(**metadata):
        sae = load_sae(saes / "early")
        sae.metadata |= metadata
        return sae

    seed = with_metadata(seed=3)
    assert _same_start(seed, with_metadata(seed=3))
    others = (with_metadata(seed=4), with_metadata(), with_metadata(seed=3, initial_sae="someone/sae"))
    assert not any(_same_start(seed, other) for other in others)


def test_an_interrupted_part_is_not_taken_for_a_finished_one(saes, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr(features_report, "quality_part", interrupted)
    assert features(saes, out) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in (out / "parts").iterdir()] == ["layers.json"]


def test_a_dry_run_tells_what_it_would_load_and_writes_nothing(saes, tmp_path, capsys):
    assert features(saes, tmp_path / "out", "--dry_run") == 0
    printed = capsys.readouterr().out
    assert f"Would load: resa_hf/tiny/source, {saes}, tiny-reasoner." in printed and "Predicted memory" in printed
    assert not (tmp_path / "out").exists()


def test_the_recipe_is_what_the_settings_know():
    path = ROOT / "recipes/tiny-reasoner/features/layers.yaml"
    (args,), _ = parse_flat((FeatureArguments,), ["--config", str(path)], "features", "")
    assert {key: getattr(args, key) for key in read_yaml(path)} == read_yaml(path)
