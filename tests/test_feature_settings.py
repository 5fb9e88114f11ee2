"""What `resa-hf features` finds wrong before any work is done, and that nothing is in the way of the next try."""

import numpy as np
import pytest
from test_features import features, saes  # noqa: F401
from transformers import Qwen2Tokenizer

from resa_hf.errors import IncompatibleSAEError
from resa_hf.experiment.feature_tests import matching_part, own_answers
from resa_hf.experiment.features import find_saes, load_subject
from resa_hf.experiment.features_text import _effects_intro, _verdict
from resa_hf.features.arguments import FeatureArguments
from resa_hf.features.firings import read_firings
from resa_hf.models import load_causal_lm, load_tokenizer
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.checkpoint import save_sae

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
    assert not list(out.glob("*"))


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
        (99, 0.01, False, "**No test**, since the latents were chosen by their attribution on the same text."),
    ],
)
def test_the_verdict_claims_no_more_than_was_tested(nulls, p_value, reasoning, said):
    args = FeatureArguments(**SETTINGS)
    assert said in _verdict(args, found_with(nulls, p_value, [3, 4], [3, 4] * reasoning, reasoning=reasoning))


def test_one_latent_and_some_of_many_are_called_that():
    args = FeatureArguments(**SETTINGS)
    one, some = found_with(19, 1.0, [3], [3]), found_with(19, 1.0, [3, 4], [3, 4, 5])
    assert "Ablating the tested reasoning latent of layers.1 moves" in _verdict(args, one)
    assert "Ablating the 2 tested reasoning latents of layers.1 together moves" in _verdict(args, some)
    assert "the first 2 of 3: 3, 4." in _effects_intro(args, some) and "the first" not in _effects_intro(args, one)
