"""What a card must not claim: of a few problems, of cut answers, of what is not on the Hub, of another SAE."""

import re

import pytest
from card_reports import COMMIT, OTHER, REVISIONS, SAES, record_of, run_report
from huggingface_hub import ModelCard

from resa_hf.cards import adapter_card, sae_card
from resa_hf.hub.licences import Licence
from resa_hf.hub.record import Record

CONFIG = {"r": 16, "lora_alpha": 64}


def card_of(record, licence=Licence("mit"), config=CONFIG):  # noqa: B008  # frozen
    return ModelCard(adapter_card("me/adapter", record, licence, adapter_config=config))


@pytest.mark.parametrize(
    ("p", "words"), [(0.9, "no difference found (too few problems to tell)"), (0.01, "equivalent to its base")]
)
def test_no_difference_in_a_few_problems_is_not_equivalence(tmp_path, p, words):
    report = run_report(tmp_path, {"mine": 0.5})
    report["arms"][1]["equivalence_p"] = p
    text = card_of(record_of(report, "mine")).text
    assert f"> **Verdict: {words}.**" in text and "exactly 0 in every pair" in text
    (row,) = re.findall(r"^\| \*\*`mine`\*\*.*", text, re.MULTILINE)
    assert ("equivalent" in row) == (p < 0.05)


@pytest.mark.parametrize("share", [0.5, 0.51])
def test_a_verdict_on_answers_that_were_cut_is_doubted_first(tmp_path, share):
    card = card_of(record_of(run_report(tmp_path, {"mine": 0.8}, truncated=share), "mine"))
    doubted = "More than half of its answers were cut" in card.text.split("**Verdict")[0]
    assert doubted == (card.data.eval_results is None) == (share > 0.5)


@pytest.mark.parametrize("points", [None, 1, 26])
def test_a_run_of_a_sweep_says_among_how_many_it_may_have_been_chosen(tmp_path, points):
    report = run_report(tmp_path, {"mine": 0.8}) | {"sweep_points": points}
    assert ("One of 26 runs of a sweep" in card_of(record_of(report, "mine")).text) == (points == 26)


@pytest.mark.parametrize("name", ["/home/me/own", "own", "tiny-reasoner", "resa_hf/tiny/base", "resa_hf/tiny"])
def test_what_is_not_on_the_hub_is_no_link_and_not_in_the_metadata(tmp_path, name):
    here = {"name": name, "commit": None}
    record = record_of(run_report(tmp_path, {"mine": 0.8}), "mine", revisions={"base": here, "dataset": here})
    card = card_of(record)
    assert card.data.base_model is card.data.datasets is card.data.eval_results is None
    assert "**Verdict: better" in card.text and "| not on the Hub |" in card.text
    links = re.findall(r"\]\((https://huggingface.co/[^)]*)", card.text)
    assert all(link.startswith("https://huggingface.co/papers/") or "docs/peft" in link for link in links)


@pytest.mark.parametrize("rank", ["<script>alert(1)</script>", None, {"a": 1}])
def test_a_rank_that_is_no_number_is_not_shown(rank):
    card = card_of(Record(revisions=REVISIONS), config={"r": rank, "lora_alpha": 1})
    assert "rank" not in card.text and "alert" not in card.text


def test_which_commit_of_the_base_each_way_of_loading_takes():
    text = card_of(Record(revisions=REVISIONS)).text
    assert text.count(f'from_pretrained("owner/base-1.5b", revision="{COMMIT}")  # or a sibling') == 1
    assert "This takes the newest commit of the base, not that above" in text


def test_a_name_without_a_commit_may_be_that_of_a_folder():
    revisions = {role: {"name": "models/mine", "commit": None} for role in ("base", "source", "sae", "dataset")}
    card = card_of(Record(revisions=revisions))
    assert "co/models/mine" not in card.text and "co/datasets/models/mine" not in card.text
    assert card.data.base_model is card.data.datasets is None and "from_pretrained" not in card.text
    assert card.text.count("| `models/mine` | not recorded |") == 4


@pytest.mark.parametrize(
    "recipe",
    [
        {"sae": "x/y", "sae_id": "layers.2"},
        {"sae": "x/y", "sae_id": "layers.2", "arms": {"mine": {"sae_from": "pretrained"}}},
        {"stage2": {"sae_id": "layers.2"}, "arms": {"mine": {"sae_from": "source"}}},
        {"stage2": {"sae_id": "layers.1"}, "arms": {"mine": {"sae_from": "source", "sae_id": "layers.2"}}},
    ],
)
def test_only_the_sae_that_it_was_trained_with_is_shown(recipe):
    saes = {name: {**sae, "ce_recovered": 1.01} for name, sae in SAES.items()}
    told = Record(revisions=REVISIONS, saes=saes, recipe=recipe, arm="mine")
    own, several = card_of(told).text, sae_card("me/sae", told, Licence())
    assert "| `layers.2` |" in own and "| `layers.1` |" not in own and "| `layers.1` |" in several
    for text in (own, several):
        assert text.count("above 1 if the spliced model predicts this text better than the clean one.") == 1


@pytest.mark.parametrize(
    ("kind", "count", "words"),
    [("cpu", 2, "on `Xeon`:"), ("cuda", 2, "on 2 × `Xeon`:"), ("cuda", "<b>", "on `Xeon`:")],
)
def test_gpus_are_counted_and_cores_are_not(tmp_path, kind, count, words):
    report = run_report(tmp_path, {"mine": 0.8})
    report["device"] = {"kind": kind, "name": "Xeon", "count": count}
    assert f"all arms and seeds, {words}" in card_of(record_of(report, "mine")).text


def test_a_llama_card_tells_what_must_be_added():
    record = Record(revisions={**REVISIONS, "dataset": {"name": "owner/q", "commit": OTHER}})
    assert "could not add: a copy of itself and a `Notice` file." in card_of(record, Licence("llama3.2")).text
    assert "could not add: a copy of itself." in card_of(record, Licence("llama3.2", files=["NOTICE"])).text
    for licence in (Licence("llama3.2", files=["LICENSE.txt", "NOTICE"]), Licence("mit")):
        assert "could not add" not in card_of(record, licence).text
