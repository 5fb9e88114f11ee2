"""Model cards: their tables and metadata say what the reports say, and a verdict is not to be overlooked."""

import inspect
import re
from dataclasses import replace

import httpx
import pytest
import yaml
from card_reports import COMMIT, OTHER, REVISIONS, SAES, record_of, run_report
from huggingface_hub import ModelCard

from resa_hf.cards import adapter_card, sae_card
from resa_hf.errors import PublishError
from resa_hf.evidence import evidence_of_run
from resa_hf.experiment.arms import Arm
from resa_hf.hub.licences import Licence
from resa_hf.hub.record import Record

CONFIG = {"r": 16, "lora_alpha": 64}
LICENCE = Licence("apache-2.0", datasets={"owner/questions": "mit"})
SEEDS = (3, 4, 5, 6, 7)


def card_of(record, licence=LICENCE, **options):
    return adapter_card("me/adapter", record, licence, adapter_config=CONFIG, **options)


def tables(text):
    """Every table as rows of cells, the head first, without bold and code."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        rows = [[cell.strip().strip("*`") for cell in line.strip("|").split("|")] for line in block.splitlines()]
        found.append([rows[0], *rows[2:]])
    return found


def same(cell, value, scale=100.0):
    """A cell is the value, rounded to one digit behind the point."""
    return abs(float(cell) - scale * value) < 0.0501


def check_line(cells, line):
    """Accuracy, interval, difference, interval, adjusted p, verdict against the report's JSON."""
    for (middle, interval), known in ((cells[:2], line["accuracy"]), (cells[2:4], line["difference"])):
        if known is None:
            assert middle == interval == ""
            continue
        low, high = interval.split(" to ")
        assert same(middle, known["estimate"]) and same(low, known["low"]) and same(high, known["high"])
    if line["adjusted_p"] is None:
        assert cells[4] == ""
    elif line["adjusted_p"] < 0.0001:
        assert cells[4] == "< 0.0001"
    else:
        assert float(cells[4]) == pytest.approx(line["adjusted_p"], rel=0.06)
    assert cells[5] == (line["verdict"] or {"word": ""})["word"]


def test_tables_say_what_the_report_says(tmp_path):
    report = run_report(tmp_path, {"mine": 0.7, "control noise": 0.6, "unrelated": 0.9}, seeds=SEEDS, tried=["a", "b"])
    lines = {line["name"]: line for line in report["arms"]}
    found = tables(card_of(record_of(report, "mine")))
    models, controls = found[0], found[1]
    # Another arm of the run, and no control of this one, is none of this card's business.
    assert [row[0] for row in models[1:]] == ["base", "mine", "control noise"]
    for name, *cells in models[1:]:
        check_line(cells, lines[name])
    ((name, difference, interval, p),) = controls[1:]
    known = lines["mine"]["controls"]["control noise"]
    low, high = interval.split(" to ")
    assert name == "control noise" and same(difference, known["difference"]["estimate"])
    assert same(low, known["difference"]["low"]) and same(high, known["difference"]["high"])
    assert p == "< 0.0001" or float(p) == pytest.approx(known["adjusted_p"], rel=0.06)
    costs = next(table for table in found if table[0][1] == "seconds")
    assert [row[:3] for row in costs[1:]] == [
        [part, f"{cost['seconds']:,.0f}", f"{cost['tokens']:,}"] for part, cost in report["costs"].items()
    ]


def test_tasks_have_lines_of_their_own_and_entries_in_the_metadata(tmp_path):
    tasks = ("resa:aime24", "resa:mine")
    report = run_report(tmp_path, {"mine": 0.7}, tasks=tasks)
    text = card_of(record_of(report, "mine"))
    line, base = report["arms"][1], report["arms"][0]
    by_task = tables(text)[1][1:]
    assert [row[0] for row in by_task] == list(tasks)
    for task, base_accuracy, *cells in by_task:
        assert same(base_accuracy, base["tasks"][task]["accuracy"]["estimate"])
        check_line([*cells, ""], {**line["tasks"][task], "verdict": None})
    (aime,) = yaml.safe_load(text.split("---")[1])["model-index"][0]["results"]
    # What the tasks table of the benchmarks pins.
    assert aime["dataset"]["type"] == "HuggingFaceH4/aime_2024" and aime["dataset"]["name"] == "aime24"
    assert aime["dataset"]["revision"] == "2fe88a2f1091d5048c0f36abc874fb997b3dd99a"
    # The benchmarks are no part of what it was made from.
    pinned = ["resa:aime24", r"[HuggingFaceH4/aime\_2024](https://huggingface.co/datasets/HuggingFaceH4/aime_2024)"]
    assert tables(text)[2] == [["task", "dataset", "commit"], [*pinned, aime["dataset"]["revision"]]]
    assert "resa:" not in text.split("## Made from")[1].split("##")[0]
    assert aime["task"] == {"type": "text-generation"} and aime["metrics"][0]["type"] == "accuracy"
    accuracy = line["tasks"]["resa:aime24"]["accuracy"]["estimate"]
    assert aime["metrics"][0]["value"] == pytest.approx(accuracy, abs=5e-5)


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({"mine": 0.8}, "better than its base"),
        ({"mine": 0.2}, "worse than its base"),
        ({"mine": 0.5}, "equivalent to its base"),
        ({"mine": 0.52}, "not distinguishable from its base"),
        ({"mine": 0.8, "control noise": 0.8}, "better than base but not than each control"),
    ],
)
def test_the_verdict_stands_first_whatever_it_is(tmp_path, shares, words):
    report = run_report(tmp_path, shares)
    body = ModelCard(card_of(record_of(report, "mine"))).text
    title, verdict, *_ = [line for line in body.splitlines() if line.strip()]
    assert title == "# adapter" and verdict.startswith(f"> **Verdict: {words}.** `mine` ")
    difference = report["arms"][1]["difference"]["estimate"]
    assert f"{100 * difference:+.1f} points" in verdict or "exactly 0 in every pair" in verdict
    assert verdict.endswith("A verdict on this adapter, not on the method.")


def test_whether_the_verdict_is_on_the_method_or_this_adapter(tmp_path):
    report = run_report(tmp_path / "five", {"mine": 0.7}, seeds=SEEDS)
    own = report["arms"][1]["by_seed"][2]
    text = card_of(record_of(report, "mine", seed=5))
    assert "on the method over 5 seeds, not on this adapter alone" in text
    assert f"With the seed of this adapter, 5, the accuracy was {100 * own:.1f}%." in text
    (result,) = ModelCard(text).data.eval_results
    assert result.metric_value == pytest.approx(own, abs=5e-5) and result.dataset_type == "owner/questions"
    assert (result.dataset_revision, result.dataset_split) == (OTHER, "train")
    # The arm that is the same with every seed has one adapter, and a random one has as many as there are seeds.
    known = [Arm("mine"), Arm("same", "none", "svd_of_source"), Arm("random", "none", "random_adapter", like="mine")]
    report = run_report(tmp_path / "known", {"mine": 0.7, "same": 0.7, "random": 0.6}, arms=known, seeds=SEEDS)
    assert "A verdict on this adapter, not on the method." in card_of(record_of(report, "same"))
    assert "on the method over 5 seeds" in card_of(record_of(report, "random"))
    few = run_report(tmp_path / "three", {"mine": 0.7}, seeds=(0, 1, 2), tasks=("resa:aime24", "resa:b"))
    text = card_of(record_of(few, "mine"))
    assert "on the adapters of 3 seeds together, not on the method" in text
    assert "mean of the adapters of 3 seeds" in ModelCard(text).data.eval_results[0].metric_name


def test_what_cannot_be_trusted_says_so_first_and_is_kept_out_of_the_metadata(tmp_path):
    on_test = run_report(
        tmp_path / "a", {"mine": 0.8}, tried=["lr 1", "lr 2"], choose_on_test=True, learning_rates=[1e-4, 1e-3]
    )
    arms = [Arm("mine"), Arm("loss", "none", "zero_adapter")]
    failed = run_report(tmp_path / "b", {"mine": 0.8, "loss": 0.1}, arms=arms)
    for report, reason in ((on_test, "Selected on the test set"), (failed, "`loss` should be equivalent, and got")):
        card = ModelCard(card_of(record_of(report, "mine")))
        first = card.text.split("**Verdict")[0]
        assert "> **No verdict here can be trusted.**" in first and reason in first
        assert card.data.eval_results is None
    assert "Harness check: FAILED; 0 of 1 arms" in card.text
    passed = run_report(tmp_path / "c", {"mine": 0.8}, arms=[Arm("mine"), Arm("zero", "none", "zero_adapter")])
    text = card_of(record_of(passed, "mine"))
    assert "Harness check: passed; 1 of 1 arms" in text and "can be trusted" not in text


def test_without_an_evaluation_no_number_is_told():
    for report in (None, {"settings": {}, "seconds": 12.0, "held_out": {"eval_loss": 0.4321}}):
        card = ModelCard(card_of(Record(report=report, revisions=REVISIONS)))
        assert "> **Not evaluated.**" in card.text and card.data.eval_results is None
        body = re.sub(r"```.*?```|`[^`]*`|\(http[^)]*\)", "", card.text, flags=re.DOTALL)
        numbers = re.findall(r"\d+(?:\.\d+)?", body.replace("owner/base-1.5b", ""))
        assert set(numbers) <= {"16", "64", "12"}, "rank, alpha and seconds"
        assert "%" not in body and "0.4321" not in card.text


def test_limits_tell_of_answers_cut_and_problems_known(tmp_path):
    report = run_report(tmp_path, {"mine": 0.8}, truncated=0.25)
    counts = {"resa:x": {"exact": 2, "near": 0}}
    report["overlap"] = {"benchmark_problems": {"resa:x": 30}, "counts": counts}
    text = card_of(record_of(report, "mine"))
    assert "- 25.0% of its answers were cut at" in text
    assert "- Overlap with the training data: 2 exact of 30 questions of `resa:x`." in text


def test_an_arm_that_is_not_in_the_report_is_refused(tmp_path):
    report = run_report(tmp_path, {"mine": 0.8})
    with pytest.raises(PublishError, match="says nothing of 'other'; it has 'mine'"):
        card_of(record_of(report, "other"))


def test_adapters_moved_to_a_sibling_say_so(tmp_path):
    report = run_report(tmp_path, {"mine": 0.8}, evaluate_on="owner/sibling")
    sibling = {"name": "owner/sibling", "commit": COMMIT}
    text = card_of(record_of(report, "mine", revisions={**REVISIONS, "evaluate_on": sibling}))
    assert "moved to `owner/sibling`, the base here" in text
    assert f'AutoModelForCausalLM.from_pretrained("owner/sibling", revision="{COMMIT}")' in text
    assert "moved to owner/sibling" in ModelCard(text).data.eval_results[0].metric_name


@pytest.mark.parametrize(
    ("changes", "arm", "words"),
    [
        ({}, {}, "with [SAE-Tuning](https://huggingface.co/papers/2506.09967): a frozen"),
        ({"kl_reference": "source"}, {}, "what the source predicts"),
        ({}, {"control": "noise"}, "`noise` stood in for the sparse autoencoder"),
        ({}, {"sae_from": "none", "kl_weight": 0.0}, "without a sparse autoencoder."),
        ({}, {"sae_from": "none", "known": "svd_of_source"}, "made, not trained, by"),
    ],
)
def test_what_it_is_follows_from_how_it_was_made(changes, arm, words):
    recipe = {"stage2": changes, "arms": {"mine": {"sae_from": "source", **arm}}}
    assert words in card_of(Record(arm="mine", recipe=recipe, revisions=REVISIONS))


def test_what_is_not_known_of_its_making_is_not_claimed():
    def made(recipe):
        return card_of(Record(recipe=recipe, revisions=REVISIONS)).split("## How to use it")[0]

    assert "a frozen sparse autoencoder (SAE) was spliced into the model at `layers.3`" in made(
        {"sae": "owner/sae", "sae_id": "layers.3"}
    )
    assert "without a sparse autoencoder." in made({"kl_weight": 0.0})
    # Only where it was used is it known that the base has a chat template.
    recipes = ({"template": "chat"}, {"template": "paper"}, {})
    cards = [card_of(Record(recipe=recipe, revisions=REVISIONS)) for recipe in recipes]
    assert ["apply_chat_template" in card for card in cards] == [True, False, False]
    # The SAE may have been given to the trainer as a module.
    unknown = made({"seed": 1})
    assert "trained by" in unknown and "sparse" not in unknown and "SAE" not in unknown
    # An adapter of a plain folder may come from anywhere.
    assert "trained by" not in made({}) and ModelCard(made({})).data.tags == ["resa-hf", "lora"]
    assert "trained by" not in sae_card("me/sae", Record(saes=SAES), Licence())
    untold = adapter_card("me/x", Record(), Licence(), adapter_config={**CONFIG, "base_model_name_or_path": "owner/b"})
    assert "for `owner/b` (rank 16, alpha 64)." in untold


def test_metadata_of_an_adapter_and_a_merged_model():
    revisions = {**REVISIONS, "trigger_dataset": {"name": "/home/me/own.jsonl", "commit": None}}
    record = Record(revisions=revisions, recipe={"seed": 1})
    data = ModelCard(card_of(record)).data.to_dict()
    assert data == {
        "base_model": "owner/base-1.5b", "base_model_relation": "adapter", "datasets": ["owner/questions"],
        "library_name": "peft", "license": "apache-2.0", "pipeline_tag": "text-generation",
        "tags": ["resa-hf", "sae-tuning", "trl", "lora"],
    }  # fmt: skip
    text = card_of(record, merged=True)
    merged = ModelCard(text).data
    assert (merged.library_name, merged.base_model_relation) == ("transformers", "finetune")
    assert "lora" not in merged.tags and "PeftModel" not in text and "merged into its weights" in text


def test_commits_and_licences_of_all_that_it_was_made_from():
    found = {row[0]: row[1:] for row in tables(card_of(Record(revisions=REVISIONS)))[0][1:]}
    assert found["base"] == ["[owner/base-1.5b](https://huggingface.co/owner/base-1.5b)", COMMIT, "apache-2.0"]
    assert found["source"][1:] == [OTHER, ""]
    assert found["dataset"] == ["[owner/questions](https://huggingface.co/datasets/owner/questions)", OTHER, "mit"]


def test_licences_are_inherited_or_unknown():
    record = Record(revisions=REVISIONS)
    unknown = ModelCard(card_of(record, Licence()))
    assert unknown.data.license is None and "The licence of the base is unknown" in unknown.text
    other = ModelCard(card_of(record, Licence("other", "qwen-research", "https://example.org/LICENSE")))
    assert (other.data.license, other.data.license_name) == ("other", "qwen-research")
    assert other.data.license_link == "https://example.org/LICENSE" and "`qwen-research`" in other.text
    assert "Built with Llama." in card_of(record, Licence("llama3.2")) and "Built with" not in other.text


def test_an_sae_card_has_what_was_measured_and_nothing_else():
    record = Record(revisions=REVISIONS, saes=SAES)
    text = sae_card("me/sae", record, LICENCE)
    head, *rows = tables(text)[0]
    assert head == ["hookpoint", "d_in", "latents", "k", "FVU", "L0"]
    assert rows == [["layers.1", "32", "1,024", "16", "0.1235", ""], ["layers.2", "32", "1,024", "16", "", "15.5"]]
    assert ModelCard(text).data.to_dict() == {
        "base_model": "owner/source", "datasets": ["owner/questions"], "library_name": "saelens",
        "license": "apache-2.0", "tags": ["resa-hf", "sparse-autoencoder", "topk"],
    }  # fmt: skip
    assert "sparsify" not in text and "SparseCoder" in sae_card("me/sae", record, LICENCE, sparsify=True)
    bare = sae_card("me/sae", Record(saes={"layers.1": {"d_in": 4, "num_latents": 8, "k": None}}), Licence())
    assert "was not measured" in bare and "FVU" not in bare and "| d_in | latents |" in bare
    assert "base_model" not in bare and "licence of the model is unknown" in bare


def test_an_sae_of_the_base_in_a_run_with_a_source_names_the_base():
    recipe = {"arms": {"mine": {"sae_from": "base"}}}
    adapted = {**REVISIONS, "base_adapter": {"name": "owner/lora", "commit": OTHER, "subfolder": "checkpoint-9"}}
    text = sae_card("me/sae", Record(arm="mine", recipe=recipe, revisions=adapted), LICENCE)
    assert ModelCard(text).data.base_model == ["owner/base-1.5b", "owner/lora"]
    assert "with [owner/lora/checkpoint-9](https://huggingface.co/owner/lora) merged into it" in text


def test_the_hub_accepts_the_metadata(tmp_path, hub):
    report = run_report(tmp_path / "run", {"mine": 0.7}, tasks=("resa:aime24", "held_out"))
    record = record_of(report, "mine")
    llama, other = Licence("llama3.2"), Licence("other", "mine", "https://example.org/x")
    cards = [card_of(record, licence, merged=merged) for licence in (llama, other, Licence()) for merged in (0, 1)]
    cards.append(sae_card("me/sae", record, LICENCE))
    by_the_client = "ENDPOINT" in inspect.getsource(ModelCard.validate)  # huggingface_hub < 2 asks huggingface.co only
    for text in cards:
        answer = httpx.post(f"{hub.endpoint}/api/validate-yaml", json={"repoType": "model", "content": text})
        assert answer.status_code == 200 and answer.json() == {"errors": [], "warnings": []}
        if by_the_client:
            ModelCard(text).validate()
        # huggingface_hub writes back what it has read.
        assert str(ModelCard(text)) == text
    broken = cards[0].replace("license: llama3.2", "license: not-a-licence")
    answer = httpx.post(f"{hub.endpoint}/api/validate-yaml", json={"repoType": "model", "content": broken})
    assert answer.status_code == 400


def test_a_better_evaluation_does_not_hide_a_worse_run(tmp_path):
    run = run_report(tmp_path / "run", {"mine": 0.2})
    line = {**run_report(tmp_path / "eval", {"as": 0.9})["arms"][1], "tasks_detail": {"held_out": {"truncated": 0.0}}}
    evaluation = {
        "settings": {
            "model_name_or_path": "owner/base-1.5b", "samples": 4, "temperature": 0.6, "top_p": 0.95, "seed": 0,
            "max_new_tokens": 64, "margin": 0.02,
        },
        "models": [run["arms"][0], line], "revisions": REVISIONS, "tasks": {}, "overlap": {},
    }  # fmt: skip
    record = replace(record_of(run, "mine"), evaluation=evaluation, evaluated_as="as")
    text = card_of(record)
    assert text.index("Verdict: worse") < text.index("Verdict: better")
    # What was asked of this very adapter goes before what the run says.
    (result,) = ModelCard(text).data.eval_results
    assert result.metric_value == pytest.approx(line["accuracy"]["estimate"], abs=5e-5)


def test_an_adapter_of_rl_is_called_one():
    recipe = {"reward_funcs": ["accuracy", "cosine"], "learning_rate": 1e-6}
    text = card_of(Record(recipe=recipe, revisions={"base": REVISIONS["base"]}, report={"settings": recipe}))
    assert ModelCard(text).data.tags == ["resa-hf", "grpo", "trl", "lora"]
    assert "with GRPO, as in [Tina](https://huggingface.co/papers/2504.15777), rewarded for" in text
    assert "accuracy, cosine" in text and "SAE-Tuning" not in text and "autoencoder" not in text


def test_an_adapter_that_learned_from_the_source_says_on_what(tmp_path):
    arm = Arm("taught", "none", tuning={"kl_reference": "source"}, text="student")
    text = card_of(record_of(run_report(tmp_path, {"taught": 0.7}, arms=[arm]), "taught"))
    assert "without a sparse autoencoder, to predict what the source predicts on text of the student." in text


@pytest.mark.parametrize(
    ("adapter", "scope"),
    [
        ("runs/{seed}/adapter", "A verdict on the method over 5 seeds, not on this adapter alone."),
        ("runs/0/adapter", "A verdict on this adapter, not on the method."),
    ],
)
def test_what_the_verdict_on_adapters_that_were_taken_is_about(tmp_path, adapter, scope):
    arm = Arm("taken", "none", adapter=adapter)
    report = run_report(tmp_path, {"taken": 0.9}, arms=[arm], seeds=SEEDS)
    assert evidence_of_run(report, "taken", None).scope == scope
