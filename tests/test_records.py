"""What the commands write down for a model card: commits, quality of SAEs, cost, hardware; and older folders."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file

from resa_hf.cli import main
from resa_hf.evaluation.cost import current_device
from resa_hf.models import load_causal_lm

TINY = {"name": "resa_hf/tiny/base", "commit": None}
SOURCE = {"name": "resa_hf/tiny/source", "commit": None}


@pytest.fixture
def data(tmp_path: Path) -> str:
    pairs = [(a, b) for a in range(9) for b in range(9)]
    lines = [{"problem": f"{a}+{b}*2 mod 10", "answer": str((a + b) * 2 % 10)} for a, b in pairs]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(tmp_path / "mine.jsonl")


def flags(data: str, folder: Path, **more: Any) -> list[str]:
    settings = {"model_name_or_path": "resa_hf/tiny/base", "dtype": "float32", "dataset": data, "template": "chat"}
    settings |= {"pack": "false", "held_out": 12, "output_dir": folder, **more}
    return [word for key, value in settings.items() for word in (f"--{key}", *str(value).split())]


def stage(**more: Any) -> dict[str, Any]:
    return {"max_length": 96, "max_steps": 2, "report_to": "none", "per_device_train_batch_size": 4, **more}


def report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return content


def metadata(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "cfg.json").read_text())["metadata"]
    return content


def test_reports_of_the_single_stages(data: str, tmp_path: Path) -> None:
    sae = tmp_path / "sae"
    more = stage(hookpoints="layers.1 layers.2", num_latents=256, k=8)
    assert main(["train-sae", *flags(data, sae, **{**more, "model_name_or_path": "resa_hf/tiny/source"})]) == 0
    first = report(sae)
    # The shipped source is an adapter.
    assert first["revisions"] == {"base": TINY, "base_adapter": SOURCE, "dataset": {"name": data, "commit": None}}
    measured = {f"eval_{name}/layers.{n}" for name in ("fvu", "l0", "dead_share", "ce_recovered") for n in (1, 2)}
    assert measured <= first["held_out"].keys()
    # 2 steps of 4 documents, each shorter than 96 tokens and longer than 20.
    assert 160 < first["tokens"] < 768 and first["device"] == current_device()
    assert first["costs"]["Stage I"]["seconds"] == first["seconds"] > 0
    told = metadata(sae / "layers.2")
    assert (told["model_name"], told["model_adapter"], told["dataset_path"]) == ("resa_hf/tiny/base", SOURCE, data)

    tuned = tmp_path / "tuned"
    assert main(["tune", *flags(data, tuned, **stage(sae=sae / "layers.2", lora_r=4, learning_rate=1e-3))]) == 0
    second = report(tuned)
    assert second["revisions"]["sae"] == {"name": str(sae / "layers.2"), "commit": None}
    assert second["revisions"]["base"] == TINY and second["costs"]["Stage II"]["tokens"] == second["tokens"]
    model = PeftModel.from_pretrained(load_causal_lm("resa_hf/tiny/base"), tuned)
    weights = load_file(tuned / "adapter_model.safetensors")
    squares = [
        (32 * weights[name.replace("lora_A", "lora_B")] @ A).square().sum().item()  # lora_alpha / r = 128 / 4
        for name, A in weights.items()
        if "lora_A" in name
    ]
    assert second["moved"]["update_norm"] == pytest.approx(sum(squares) ** 0.5, rel=1e-4) and model is not None
    assert second["moved"]["kl"] > 0


@pytest.mark.slow
def test_a_run_and_a_folder_from_before(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(
        "source_model: resa_hf/tiny/source\nseeds: [0, 1]\nlora_r: 4\n"
        "stage1: {hookpoints: [layers.2], num_latents: 256, k: 8, max_length: 96, max_steps: 2}\n"
        "stage2: {max_length: 96, max_steps: 2}\nsampling: {max_new_tokens: 4, batch_size: 12}\n"
        "arms: {mine: {sae_from: source}, its own: {sae_from: base}}\n"
    )
    command = ["run", "--config", str(tmp_path / "run.yaml"), *flags(data, folder)]
    assert main(command) == 0
    told = report(folder)
    dataset = {"name": data, "commit": None}
    source = {"source": TINY, "source_adapter": SOURCE}
    assert told["revisions"] == {"base": TINY, **source, "dataset": dataset} and told["tasks"] == {}
    stages = [folder / "sae" / "source" / f"seed-{seed}" / "stage1.json" for seed in (0, 1)]
    by_seed = [json.loads(path.read_text())["quality"]["eval_ce_recovered/layers.2"] for path in stages]
    assert told["sae_quality"]["source"]["ce_recovered/layers.2"] == pytest.approx(sum(by_seed) / 2)
    assert "ce_recovered/layers.2" in capsys.readouterr().out
    merged = [metadata(folder / "sae" / kind / "seed-0" / "layers.2")["model_adapter"] for kind in ("source", "base")]
    assert merged == [SOURCE, None]

    # One seed from before any of this was written down, then all of it.
    for paths in (stages[:1], [*folder.glob("sae/*/*/stage1.json"), *folder.glob("arms/**/tuning.json")]):
        for path in paths:
            content = json.loads(path.read_text())
            content.pop("revisions", None)
            content["quality"] = {k: v for k, v in content.get("quality", {}).items() if "ce_recovered" not in k}
            path.write_text(json.dumps(content))
        assert main(command) == 0
        assert "ce_recovered/layers.2" not in report(folder)["sae_quality"]["source"]
    for path in folder.glob("arms/**/revisions.json"):
        path.unlink()
    assert main(command) == 0
    assert report(folder)["revisions"] == {"base": TINY, "dataset": dataset}
