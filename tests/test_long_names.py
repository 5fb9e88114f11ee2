"""Names of more letters than a file may have: whether they lie on the disk is answered by no, not by an error."""

import pytest

from resa_hf.data import load_qa
from resa_hf.errors import DataError, IncompatibleSAEError
from resa_hf.evaluation.arguments import EvaluateArguments
from resa_hf.experiment.inputs import check_inputs
from resa_hf.prose import load_prose
from resa_hf.provenance import commit_of, local_name
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.checkpoint import load_sae, save_sae

LONG = "a" * 300


def test_data_of_that_name_are_not_there():
    with pytest.raises(DataError, match=rf"There is no file {LONG}\.jsonl"):
        load_qa(f"{LONG}.jsonl")
    with pytest.raises(DataError, match=LONG):
        load_prose(LONG)


def test_an_sae_of_that_name_is_not_there(tmp_path):
    save_sae(TopKSAE(8, 16, 2, hookpoint="layers.0"), tmp_path / "layers.0")
    with pytest.raises(IncompatibleSAEError, match=f"has no folder '{LONG}'. SAEs there: layers.0"):
        load_sae(tmp_path, LONG)


def test_models_and_adapters_of_that_name_are_on_the_hub_if_anywhere(tmp_path):
    assert commit_of(LONG) is None and local_name(LONG) == LONG
    assert EvaluateArguments.name_and_place(f"mine={LONG}") == ("mine", LONG)
    check_inputs(tmp_path, {"base": {"name": LONG, "commit": None}})
