"""Stage II on answers alone: prompts that are marked, and left out of the loss."""

import itertools
import json

import datasets
import pytest
import torch
import torch.nn.functional as F
from test_sampled_text import STAGE2, settings_of

from resa_hf.errors import DataError
from resa_hf.experiment.folder import RunFolder
from resa_hf.experiment.pipeline import prepare_run
from resa_hf.experiment.response_only import mark_responses
from resa_hf.experiment.sampled_text import sample_text
from resa_hf.experiment.stages import tune
from resa_hf.tiny import load_tiny_base


def test_prompts_are_left_out_of_the_loss(tmp_path, tiny_tokenizer):
    """The loss of the first step is the mean cross-entropy of the tokens behind `<think>`, by a plain forward."""
    sft = {"sae_from": "none", "kl_weight": 0.0, "sft_weight": 1.0, "completion_only_loss": True}
    arms = {"SFT on the answers": sft, "on traces": sft | {"text": "source"}}
    stage2 = STAGE2 | {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 4}
    settings = settings_of(tmp_path, arms=arms, stage2=stage2, train_rows=8, lora_dropout=0.0)
    folder = RunFolder(tmp_path / "run")
    prepare_run(folder, settings)
    sample_text(folder, settings, "source", 0)
    base = load_tiny_base()
    for arm in settings.arms:
        tune(folder, settings, arm, settings.candidates[0], 0)
        place = folder.training(arm, settings.candidates[0], 0)
        log = json.loads((place / "tuning.json").read_text())["log"]
        loss = next(entry["loss"] for entry in log if "loss" in entry)
        rows = folder.data("train") if arm.text == "dataset" else folder.text("source", 0) / "tokens"
        means = {}
        for number, ids in enumerate(datasets.load_from_disk(rows)["input_ids"]):
            opened = ids.index(tiny_tokenizer.convert_tokens_to_ids("<think>"))
            with torch.no_grad():
                logits = base(torch.tensor([ids])).logits[0, opened:-1]
            means[number] = F.cross_entropy(logits, torch.tensor(ids[opened + 1 :]), reduction="none")
        # One of the batches of 4 rows that there are.
        batches = itertools.combinations(means, 4)
        expected = [torch.cat([means[i] for i in batch]).mean().item() for batch in batches]
        assert min(abs(loss - value) for value in expected) < 2e-4
        everything = [
            F.cross_entropy(base(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:])).item()
            for ids in datasets.load_from_disk(rows)["input_ids"]
        ]
        assert loss < min(everything)  # the base has not learned questions


def test_what_cannot_be_left_out_of_the_loss(tmp_path, tiny_tokenizer):
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [9, 9]]})
    marked = mark_responses(rows.select([0]), ["", "x"], tiny_tokenizer)
    assert marked["completion_mask"][0] == [1, 1, 1]
    with pytest.raises(DataError, match="row 2 does not begin with the tokens of its prompt"):
        mark_responses(rows, ["", tiny_tokenizer.decode([5])], tiny_tokenizer)
    with pytest.raises(ValueError, match="completion_only_loss needs pack: false"):
        settings_of(tmp_path, pack=True, stage2=STAGE2 | {"completion_only_loss": True})
