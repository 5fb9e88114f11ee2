"""transformers, peft, sae-lens and datasets, none of them changed, with the local Hub of the tests."""

import io
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import ModelFactory
from hub_server import HubServer
from huggingface_hub import ModelCard, upload_file
from sae_files import make_sae, make_x

ROWS = [{"problem": f"{n} + 1?", "answer": str(n + 1), "meta": {"level": n % 3}} for n in range(7)]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
IDS = torch.tensor([[1, 5, 9, 3, 7]])


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {
            "data/train-00000-of-00002.parquet": parquet(ROWS[:4]),
            "data/train-00001-of-00002.parquet": parquet(ROWS[4:]),
        },
        {"train.jsonl": JSON_LINES},
        {"train.json": json.dumps(ROWS)},
    ],
    ids=["parquet", "jsonl", "json"],
)
def test_data_sets(hub: HubServer, files: dict[str, bytes | str], streaming: bool) -> None:
    hub.create_repo("me/data", "dataset", files={"README.md": "---\nlicense: mit\n---\n", **files})
    dataset = datasets.load_dataset("me/data", split="train", streaming=streaming)
    assert list(dataset) == ROWS


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_with_configs_and_revisions(hub: HubServer, streaming: bool) -> None:
    configs = {"configs": [{"config_name": name, "data_files": f"{name}/*.jsonl"} for name in ("main", "hard")]}
    old = hub.create_repo(
        "me/data",
        "dataset",
        files={
            "README.md": f"---\n{json.dumps(configs)}\n---\n",
            "main/a.jsonl": JSON_LINES,
            "hard/b.jsonl": JSON_LINES.splitlines()[1],
        },
    )
    hub.commit("me/data", {"hard/b.jsonl": JSON_LINES.splitlines()[0]}, "dataset")
    load = datasets.load_dataset
    assert list(load("me/data", "main", split="train", streaming=streaming)) == ROWS
    assert list(load("me/data", "hard", split="train", streaming=streaming)) == ROWS[:1]
    assert list(load("me/data", "hard", split="train", streaming=streaming, revision=old)) == ROWS[1:2]
    with pytest.raises(ValueError, match="BuilderConfig 'easy' not found"):
        load("me/data", "easy")


def test_a_gated_data_set_needs_access(hub: HubServer) -> None:
    hub.create_repo("me/data", "dataset", files={"train.jsonl": JSON_LINES}, gated=True)
    with pytest.raises(datasets.exceptions.DatasetNotFoundError, match="gated"):
        datasets.load_dataset("me/data", token=hub.stranger)
    assert len(datasets.load_dataset("me/data", split="train")) == len(ROWS)


def test_pushed_data_sets_come_back(hub: HubServer) -> None:
    datasets.Dataset.from_list(ROWS).push_to_hub("me/pushed", private=True)
    assert list(datasets.load_dataset("me/pushed", split="train")) == ROWS


def test_models_and_tokenizers(hub: HubServer, make_model: ModelFactory, tiny_tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make_model("qwen2")
    model.push_to_hub("me/model")
    tiny_tokenizer.push_to_hub("me/model")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files("me/model"))
    loaded = AutoModelForCausalLM.from_pretrained("me/model", dtype=torch.float32)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    text = "3 * 4 + 1"
    assert AutoTokenizer.from_pretrained("me/model")(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]


def test_adapters(hub: HubServer, make_model: ModelFactory) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = make_model("qwen2")
    base.push_to_hub("me/base")
    before = base(IDS).logits
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    adapted.peft_config["default"].base_model_name_or_path = "me/base"
    adapted.push_to_hub("me/adapter")
    expected = adapted(IDS).logits
    assert not torch.allclose(expected, before)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/base"), "me/adapter")
    assert torch.equal(loaded(IDS).logits, expected)
    assert torch.equal(AutoModelForCausalLM.from_pretrained("me/adapter")(IDS).logits, expected)


def test_saes(hub: HubServer, tmp_path: Path) -> None:
    import sae_lens

    from resa_hf import save_sae

    sae = make_sae()
    save_sae(sae, tmp_path / "sae" / "layers.1")
    hub.create_repo("me/sae", folder=tmp_path / "sae")
    loaded = sae_lens.SAE.from_pretrained("me/sae", "layers.1")
    torch.testing.assert_close(loaded(make_x()), sae(make_x()))


def test_cards_are_validated_before_an_upload(hub: HubServer) -> None:
    hub.create_repo("me/model", files={"a.txt": "a"})
    with pytest.raises(ValueError, match='"license" must be one of'):
        upload_file(path_or_fileobj=b"---\nlicense: my-own\n---", path_in_repo="README.md", repo_id="me/model")
    assert hub.files("me/model") == {"a.txt": b"a"}
    with pytest.warns(UserWarning, match="empty or missing yaml metadata in repo card"):
        upload_file(path_or_fileobj=b"# No metadata", path_in_repo="README.md", repo_id="me/model")


@pytest.mark.skipif(version("huggingface_hub") < "2", reason="until 2.0 it asks huggingface.co, whatever the endpoint")
def test_cards_validate_themselves(hub: HubServer) -> None:
    ModelCard("---\nlicense: mit\n---\n# Fine").validate()
    with pytest.raises(ValueError, match='- Error: "license" must be one of'):
        ModelCard("---\nlicense: my-own\n---\n# Not").validate()


def test_fresh_processes_load_too(hub: HubServer, tmp_path: Path) -> None:
    hub.create_repo("me/data", "dataset", files={"train.jsonl": JSON_LINES})
    code = "import datasets; print(len(datasets.load_dataset('me/data', split='train')))"
    env = hub.env(tmp_path / "fresh")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "7"
    assert (tmp_path / "fresh" / "datasets").is_dir()
