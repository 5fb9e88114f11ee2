"""The local Hub's check of a card's metadata, against what is documented or has been seen of the Hub's own."""

from typing import Any

import pytest
import yaml
from hub_cards import card_errors, card_warnings
from huggingface_hub import EvalResult, ModelCard, ModelCardData

RESULT: dict[str, Any] = {
    "task": {"type": "text-generation"},
    "dataset": {"type": "HuggingFaceH4/MATH-500", "name": "MATH-500", "config": "default", "split": "test"},
    "metrics": [{"type": "accuracy", "value": 0.5, "name": "Pass@1"}],
    "source": {"name": "resa-hf", "url": "https://example.com"},
}


def card(**metadata: object) -> str:
    return f"---\n{yaml.safe_dump({name.replace('_index', '-index'): v for name, v in metadata.items()})}---\n# Card\n"


def test_huggingface_hubs_own_cards_pass() -> None:
    """What its classes write is what the Hub takes; the template has every documented field."""
    data = ModelCardData(
        language=["en", "zh"],
        license="other",
        license_name="my-license-1.0",
        license_link="LICENSE",
        library_name="peft",
        tags=["resa", "sparse autoencoder"],
        datasets=["agentica-org/DeepScaleR-Preview-Dataset", "imdb"],
        metrics=["accuracy"],
        base_model=["Qwen/Qwen2.5-1.5B"],
        base_model_relation="adapter",
        pipeline_tag="text-generation",
        model_name="me/adapter",
        eval_results=[EvalResult("text-generation", "HuggingFaceH4/MATH-500", "MATH-500", "accuracy", 0.5)],
        unknown_field={"is": "allowed"},
    )
    text = str(ModelCard.from_template(data, model_id="me/adapter"))
    assert card_errors(text) == [] and card_warnings(text) == []


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("---\nlicense: [\n---\n", "Invalid YAML in README.md"),
        ("---\nhello\n---\n", "The YAML metadata of your README.md is invalid."),
        (card(license="asdf"), '"license" must be one of'),
        (card(license=["mit", "asdf"]), '"license[1]" must be one of'),
        (card(language="noinfo"), '"language" with value "noinfo" is not valid'),
        (card(tags="one"), '"tags" must be an array'),
        (card(tags=["one", 2]), '"tags[1]" must be a string'),
        (card(datasets=[None]), '"datasets[0]" must be a string'),
        (card(datasets=["librispeech 960h"]), '"datasets[0]" with value "librispeech 960h" is not valid'),
        (card(base_model="Kokoro 82M"), '"base_model" with value "Kokoro 82M" is not valid. Use a model id from'),
        (card(base_model="/home/me/model"), '"base_model" with value'),
        (card(base_model_relation="lora"), '"base_model_relation" must be one of'),
        (card(pipeline_tag=["text-generation"]), '"pipeline_tag" must be a string'),
        (card(license="other", license_name="My License"), '"license_name"'),
        (card(license_link="here"), '"license_link"'),
        (card(model_index="x"), '"model-index" must be an array'),
        (card(model_index=[{"results": []}]), '"model-index[0].name" is required'),
        (card(model_index=[{"name": "x"}]), '"model-index[0].results" is required'),
    ],
)
def test_what_the_hub_refuses(text: str, error: str) -> None:
    assert any(message.startswith(error) for message in card_errors(text)), card_errors(text)


@pytest.mark.parametrize(
    ("part", "value", "error"),
    [
        ("task", {}, 'task.type" is required'),
        ("dataset", {"type": "x"}, 'dataset.name" is required'),
        ("dataset", {**RESULT["dataset"], "config": {"a": 1}}, 'dataset.config" must be a string'),
        ("dataset", {**RESULT["dataset"], "revision": 12345678}, 'dataset.revision" must be a string'),
        ("metrics", {"type": "x"}, 'metrics" must be an array'),
        ("metrics", [{"type": "x"}], 'metrics[0].value" is required'),
        ("metrics", [{"value": 1}], 'metrics[0].type" is required'),
        ("metrics", [{"type": "x", "value": 1, "config": {"n": 1}}], 'metrics[0].config" must be a string'),
        ("source", {"name": "x"}, 'source.url" is required'),
    ],
)
def test_results_that_the_hub_refuses(part: str, value: object, error: str) -> None:
    assert card_errors(card(model_index=[{"name": "x", "results": [RESULT]}])) == []
    bad = card(model_index=[{"name": "x", "results": [{**RESULT, part: value}]}])
    assert card_errors(bad) == [f'"model-index[0].results[0].{error}']


@pytest.mark.parametrize(
    "text", ["no metadata", "---\n---\n", "---\nlicense: mit\n---oops", "text\n---\nlicense: mit\n---"]
)
def test_missing_metadata_are_warned_about(text: str) -> None:
    assert card_errors(text) == []
    assert card_warnings(text) == ["empty or missing yaml metadata in repo card"]
