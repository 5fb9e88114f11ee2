"""What `resa-hf features` finds wrong before any work is done, and that nothing is in the way of the next try."""

import os
import shutil

import numpy as np
import pytest
from huggingface_hub import constants
from test_features import features, saes  # noqa: F401
from transformers import Qwen2Tokenizer

from resa_hf.errors import DataError, IncompatibleSAEError
from resa_hf.experiment import feature_tests
from resa_hf.experiment.feature_tests import OwnAnswers, _within, matching_part, own_answers
from resa_hf.experiment.features import claim_folder, find_saes, load_subject, saes_digest
from resa_hf.experiment.features_text import _effects_intro, _survive, _verdict
from resa_hf.features.arguments import FeatureArguments
from resa_hf.features.firings import read_firings
from resa_hf.features.matching import match_activations
from resa_hf.features.nulls import compare
from resa_hf.models import load_causal_lm, load_tokenizer
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.checkpoint import load_sae, save_sae

SETTINGS = {"model_name_or_path": "resa_hf/tiny/source", "dataset": "tiny-reasoner", "held_out": 100, "saes": "mine"}


@pytest.fixture(scope="module")
def other_letters(tmp_path_factory):
    """The tiny base with a tokenizer in which two letters have changed places."""
    folder = str(tmp_path_factory.mktemp("other"))
    load_causal_lm("resa_hf/tiny/base").save_pretrained(folder)
    vocabulary = load_tokenizer("resa_hf/tiny/base").get_vocab()
    swapped = vocabulary | {"a": vocabulary["b"], "b": vocabulary["a"]}
    special = {f"{name}_token": f"<{name}>" for name in ("unk", "eos", "pad")}
    Qwen2Tokenizer(vocab=swapped, merges=[], **special).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--dataset", "missing.jsonl"), "missing.jsonl"),
        (("--limit", "5"), "Cannot hold out 12"),
        (("--max_length", "20"), "max_length is 20, but a problem's prompt alone has"),
        (("--saes", "nowhere/at-all"), "nowhere/at-all"),
        (("--test_hookpoint", "1"), "SAEs are read at layers.0, layers.2 only"),
        (("--other_model", "OTHER"), "tokenizers differ"),
    ],
)
def test_what_cannot_be_used_leaves_the_folder_free(saes, other_letters, tmp_path, capsys, flags, said):  # noqa: F811
    out = tmp_path / "out"
    flags = tuple(other_letters if flag == "OTHER" else flag for flag in flags)
    assert features(saes, out, *flags) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in out.glob("*")] == [".lock"]


def test_a_latent_that_the_sae_does_not_have(saes, tmp_path, capsys):  # noqa: F811
    assert features(saes, tmp_path / "out", "--test_hookpoint", "2", "--test_latents", "256") == 2
    assert "latents 0 to 255, but no latent 256" in capsys.readouterr().err


def test_a_folder_named_after_another_hookpoint_is_no_reason_to_read_there(tmp_path):
    model = load_causal_lm("resa_hf/tiny/source")
    save_sae(TopKSAE(model.config.hidden_size, 8, 2, hookpoint="layers.2.mlp"), tmp_path / "layers.2")
    save_sae(TopKSAE(model.config.hidden_size, 8, 2, hookpoint="layers.1"), tmp_path / "1")
    found = find_saes(model, str(tmp_path))
    assert found["layers.1"]().num_latents == 8
    with pytest.raises(IncompatibleSAEError, match=r"layers\.2 .*trained at layers\.2\.mlp"):
        found["layers.2"]()
    save_sae(TopKSAE(model.config.hidden_size, 8, 2), tmp_path / "mine")
    with pytest.raises(IncompatibleSAEError, match="SAE mine of .* tells no hookpoint"):
        find_saes(model, str(tmp_path))


def test_two_saes_of_one_layer_are_not_drawn_over_each_other(tmp_path, capsys):
    width = load_causal_lm("resa_hf/tiny/source").config.hidden_size
    for name in ("layers.1.mlp", "layers.1", "layers.2.mlp"):
        save_sae(TopKSAE(width, 8, 2, hookpoint=name), tmp_path / "saes" / name)
    assert features(tmp_path / "saes", tmp_path / "out") == 2
    assert "layers.1 and layers.1.mlp lie in one layer" in capsys.readouterr().err
    args = FeatureArguments(**SETTINGS | {"saes": str(tmp_path / "saes")}, hookpoints=["layers.2.mlp", "layers.1"])
    assert list(load_subject(args).saes) == ["layers.1", "layers.2.mlp"]


def test_saes_with_more_latents_than_can_be_paired_are_matched_by_those_that_fire(tmp_path):
    width = load_causal_lm("resa_hf/tiny/source").config.hidden_size
    for seed, name in enumerate(("mine", "theirs")):
        save_sae(TopKSAE(width, 4200, 2, hookpoint="layers.1", seed=seed), tmp_path / name / "layers.1")
    subject = load_subject(
        FeatureArguments(
            model_name_or_path="resa_hf/tiny/source", dtype="float32", dataset="tiny-reasoner", limit=40, held_out=6,
            template="chat", pack=False, problems=0, saes=str(tmp_path / "mine"), other_model="resa_hf/tiny/base",
            other_saes=str(tmp_path / "theirs"),
        )
    )  # fmt: skip
    answers = own_answers(subject)
    part = matching_part(subject, "layers.1", answers)
    firing = read_firings(
        subject.model, "layers.1", subject.saes["layers.1"](), answers.rows, excluded_token_ids=(), batch_size=8
    )
    assert 2 < len(part["decoder"]["first"]) < 1000
    assert set(part["decoder"]["first"]) <= set(np.flatnonzero(firing.counts))
    assert sorted(part["decoder"]["first"]) == sorted(part["activation"]["first"])


def test_activations_are_matched_on_so_many_tokens_at_most():
    rows = [{"input_ids": list(range(length)), "prompt_length": 1} for length in (5, 3, 4)]
    for most, lengths in ((4, [4]), (8, [5, 3]), (9, [5, 3, 1]), (99, [5, 3, 4])):
        assert [row["input_ids"] for row in _within(rows, most)] == [list(range(length)) for length in lengths]


def test_matching_reads_no_more_tokens_than_the_null_can_hold(saes, monkeypatch):  # noqa: F811
    args = FeatureArguments(
        **SETTINGS | {"saes": str(saes), "problems": 0, "limit": 40, "held_out": 6, "pack": False, "template": "chat"},
        other_model="resa_hf/tiny/base", other_saes=str(saes), dtype="float32",
    )  # fmt: skip
    given = []

    def match(*args, **kwargs):
        given.append(sum(len(row["input_ids"]) for row in args[4]))
        return match_activations(*args, **kwargs)

    monkeypatch.setattr(feature_tests, "match_activations", match)
    monkeypatch.setattr(feature_tests, "_MATCHED_TOKENS", 50)
    subject = load_subject(args)
    answers = own_answers(subject)
    matching_part(subject, "layers.2", answers)
    assert given == [50] and sum(len(row["input_ids"]) for row in answers.rows) > 50


def test_other_saes_at_the_same_place_are_not_taken_for_those_that_were_read(saes, tmp_path):  # noqa: F811
    mine, width = tmp_path / "mine", load_sae(saes / "early").d_in
    shutil.copytree(saes, mine)
    args = FeatureArguments(**SETTINGS | {"saes": str(mine), "output_dir": str(tmp_path / "out")})
    claim_folder(args)
    shutil.rmtree(mine)
    shutil.copytree(saes, mine)
    claim_folder(args)  # the same ones
    weights, there = mine / "early" / "sae_weights.safetensors", (mine / "early" / "sae_weights.safetensors").stat()
    save_sae(TopKSAE(width, 256, 40, hookpoint="layers.0", seed=9), mine / "early")
    os.utime(weights, ns=(there.st_atime_ns, there.st_mtime_ns))
    assert weights.stat().st_size == there.st_size
    with pytest.raises(DataError, match=r"other settings \(files of saes\.early\)"):
        claim_folder(args)
    shutil.copytree(saes, mine, dirs_exist_ok=True)
    claim_folder(args)
    config = mine / "layers.2" / "cfg.json"
    config.write_text(config.read_text().replace('"k": 40', '"k": 41'))
    with pytest.raises(DataError, match=r"\(files of saes\.layers\.2\)"):
        claim_folder(args)


def test_of_saes_on_the_hub_the_commit_counts(saes, hub, monkeypatch):  # noqa: F811
    first = hub.create_repo("me/saes", folder=saes)
    assert saes_digest("me/saes") == {"commit": first}
    load_sae("me/saes", "early")
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert saes_digest("me/saes") == {"commit": first}
    second = hub.commit("me/saes", {"early/cfg.json": (saes / "layers.2" / "cfg.json").read_bytes()})
    assert saes_digest("me/saes") == {"commit": second} != {"commit": first} == saes_digest(f"me/saes@{first}")


def test_of_few_answers_no_half_is_left_to_test_on():
    rows = [{"input_ids": [number], "prompt_length": 1} for number in range(5)]
    questions = [{"answer": str(number)} for number in range(5)]
    chosen_on, tested_on = OwnAnswers(questions, [True, False, True, True, False], rows).halves()
    assert chosen_on == OwnAnswers(questions[:2], [True, False], rows[:2])
    assert tested_on == OwnAnswers(questions[2:], [True, True, False], rows[2:])
    with pytest.raises(DataError, match="3 texts are too few"):
        OwnAnswers([], [], rows[:3]).halves()


def found_with(nulls, p_value, latents, all_of_layer, *, reasoning=True):
    null = {"mean": 0.01, "low": 0.0, "high": 0.02, "p_value": p_value, "n": nulls}
    edit = {
        "latents": latents, "change": "ablate", "together": True, "length": None, "accuracy": None,
        "kl": {"estimate": 0.5, "low": 0.4, "high": 0.6}, "nulls": {"kl": null},
    }  # fmt: skip
    return {
        "layers": [{"hookpoint": "layers.1", "latents": all_of_layer}],
        "tested": {"hookpoint": "layers.1", "latents": latents, "reasoning": reasoning},
        "effects": {"edits": [edit], "silent": [], "without_null": []},
    }


@pytest.mark.parametrize(
    ("nulls", "p_value", "reasoning", "said"),
    [
        (19, 0.05, True, "**More than random latents do**"),
        (19, 0.1, True, "**Not distinguishable from random latents**"),
        (18, 1 / 19, True, "**Too few random latents to tell**"),
        (99, 0.01, False, "**More than random latents do**"),
    ],
)
def test_the_verdict_claims_no_more_than_was_tested(nulls, p_value, reasoning, said):
    assert said in _verdict(found_with(nulls, p_value, [3, 4], [3, 4] * reasoning, reasoning=reasoning))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ((0.0, 0.0, 0.0), "layers.1 changes no answer from right to wrong or back; 19 random latents"),
        ((0.0, -0.01, 0.01), "layers.1 changes accuracy by +0.0 points (95%: -1.0 to +1.0); 19 random"),
    ],
)
def test_where_no_answer_changes_there_is_no_interval(line, said):
    found = found_with(19, 1.0, [3], [3])
    (edit,) = found["effects"]["edits"]
    edit["accuracy"] = dict(zip(("estimate", "low", "high"), line, strict=True))
    edit["nulls"]["accuracy"] = edit["nulls"]["kl"]
    assert said in _verdict(found) and "change accuracy by +1.0 points" in _verdict(found)


def test_a_null_whose_correlations_are_tied_tells_nothing():
    rng = np.random.default_rng(0)
    for tokens, tell in ((3, False), (400, True)):
        # Pairs of latents that fire at one token of three are often at the same one: their correlation is 1.
        fires = rng.random((2, 60, tokens)).argsort(axis=-1) < max(1, tokens // 20)
        drawn = np.stack([
            [np.corrcoef(one, other)[0, 1] for one, other in zip(fires[0], rng.permutation(fires[1]), strict=True)]
            for _ in range(39)
        ])  # fmt: skip
        threshold, share, null_share = compare(drawn[0], drawn)
        text = _survive({"threshold": threshold, "share": vars(share), "null_share": null_share}, "pairs are alike")
        assert ("too few tokens to tell how many of the pairs are alike" in text) != tell
        assert ("of the pairs are alike more than 95% of the null do" in text) == tell


def test_one_latent_and_some_of_many_are_called_that():
    args = FeatureArguments(**SETTINGS)
    one, some = found_with(19, 1.0, [3], [3]), found_with(19, 1.0, [3, 4], [3, 4, 5])
    assert "Ablating the tested reasoning latent of layers.1 moves" in _verdict(one)
    assert "Ablating the 2 tested reasoning latents of layers.1 together moves" in _verdict(some)
    assert "the first 2 of 3: 3, 4." in _effects_intro(args, some) and "the first" not in _effects_intro(args, one)
