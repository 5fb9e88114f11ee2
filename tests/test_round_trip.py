"""What is published loads elsewhere: in another process, with an empty cache, and without resa-hf."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelFactory
from hub_server import HubServer
from peft import PeftModel
from sae_files import make_sae, make_x
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from resa_hf.cli import main
from resa_hf.hub.sae_repo import push_sae_to_hub
from resa_hf.sae.checkpoint import load_sae
from resa_hf.tiny import tiny_path

pytest_plugins = ("publishable",)
pytestmark = pytest.mark.long  # each fresh process imports all libraries

IDS = [[1, 5, 9, 3, 7, 2]]
# `import resa_hf` fails, as where it is not installed.
WITHOUT_RESA = """
import sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "resa_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NotInstalled())
"""


def fresh_process(hub: HubServer, home: Path, code: str, *, with_resa: bool = False) -> dict[str, torch.Tensor]:
    """Runs code in a process of its own, with an empty cache; returns the tensors that it puts into `out`."""
    home.mkdir()
    begin = "import torch\ntorch.set_num_threads(1)\n" + ("" if with_resa else WITHOUT_RESA)
    end = f"\nfrom safetensors.torch import save_file\nsave_file(out, {str(home / 'out.safetensors')!r})"
    done = subprocess.run(
        [sys.executable, "-c", begin + code + end],
        env={**os.environ, **hub.env(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(home / "out.safetensors")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits


LOGITS = f"""
def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor({IDS})).logits.clone()
"""


@pytest.fixture
def published(hub: HubServer, run: Path) -> Path:
    """The tiny run's adapter and SAEs on the local Hub, which holds their base; the run's folder."""
    hub.create_repo("you/base", folder=tiny_path("base"))
    status = main(
        ["publish", "--folder", str(run), "--repo_id", "me/adapter", "--sae_repo_id", "me/saes", "--base", "you/base"]
    )
    assert status == 0
    return run


def test_peft_and_transformers_load_the_adapter_without_resa_hf(
    hub: HubServer, published: Path, tmp_path: Path
) -> None:
    code = f"""{LOGITS}
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
wide = {{"dtype": torch.float32}}  # transformers' own loader would round the adapter to the base's bfloat16
base = AutoModelForCausalLM.from_pretrained("you/base", **wide)
out = {{"base": logits(base)}}
out["peft"] = logits(PeftModel.from_pretrained(base, "me/adapter"))
out["auto_peft"] = logits(AutoPeftModelForCausalLM.from_pretrained("me/adapter", **wide))
out["auto"] = logits(AutoModelForCausalLM.from_pretrained("me/adapter", **wide))
assert AutoTokenizer.from_pretrained("me/adapter")("1").input_ids
"""
    loaded = fresh_process(hub, tmp_path / "home", code)
    (adapter,) = published.glob("arms/*/*/seed-0/adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_path("base"), dtype=torch.float32).eval()
    assert torch.equal(loaded["base"], logits(base))
    here = logits(PeftModel.from_pretrained(base, adapter).eval())
    assert not torch.equal(here, loaded["base"])
    for how in ("peft", "auto_peft", "auto"):
        assert torch.equal(loaded[how], here), how


def test_the_adapter_names_its_base_and_the_commit_of_it(hub: HubServer, published: Path) -> None:
    config = json.loads(hub.files("me/adapter")["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("you/base", hub.commits("you/base")[0])
    # The base moves on, and the adapter is loaded on the old one.
    moved = {"model.safetensors": (tiny_path("base") / "model.safetensors").read_bytes()[:-8] + bytes(8)}
    hub.commit("you/base", moved)
    assert config["revision"] == hub.commits("you/base")[1]


def test_sae_lens_and_resa_hf_load_the_saes(hub: HubServer, published: Path, tmp_path: Path) -> None:
    code = """
x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
from sae_lens import SAE
sae = SAE.from_pretrained("me/saes", "layers.1")
assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post", sae.cfg.metadata
out = {name: tensor.clone().contiguous() for name, tensor in sae.state_dict().items()}
with torch.no_grad():
    out |= {"x": x, "z": sae.encode(x), "y": sae(x)}
"""
    without = fresh_process(hub, tmp_path / "one", code)
    code = """
from resa_hf import load_sae
from resa_hf.sae.checkpoint import list_saes
assert list_saes("me/saes") == ["layers.1", "layers.2"]
sae = load_sae("me/saes", "layers.1")
x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    out = {"z": sae.encode(x), "y": sae(x)}
"""
    ours = fresh_process(hub, tmp_path / "two", code, with_resa=True)
    here = load_sae(published / "sae" / "source" / "seed-0", "layers.1")
    with torch.no_grad():
        assert torch.equal(ours["y"], here(without["x"])) and torch.equal(ours["z"], here.encode(without["x"]))
    for name, tensor in here.state_dict().items():
        assert torch.equal(without[name], tensor), name
    torch.testing.assert_close(without["y"], ours["y"])  # sae-lens' own arithmetic, dense
    assert torch.equal(without["z"] > 0, ours["z"] > 0)


def test_one_commit_each_and_the_card_links_the_saes(hub: HubServer, published: Path) -> None:
    saes, *made = hub.commits("me/saes")
    assert len(made) == len(hub.commits("me/adapter")[1:]) == 1  # the Hub's own first commit
    assert saes in hub.files("me/adapter")["README.md"].decode()
    names = {*hub.files("me/adapter"), *hub.files("me/saes")}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    assert not [name for name, data in hub.files("me/adapter").items() if b"hf_secret" in data]


def test_a_merged_model_loads_as_any_other(hub: HubServer, run: Path, tmp_path: Path) -> None:
    # A private repository, on a branch.
    flags = ["--folder", str(run), "--repo_id", "me/merged", "--merge", "--private", "--branch", "v1"]
    assert main(["publish", *flags]) == 0
    assert hub.repos["model", "me/merged"].private
    assert set(hub.files("me/merged")) == {".gitattributes"} and len(hub.commits("me/merged", branch="v1")) == 2
    code = f"""{LOGITS}
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("me/merged", revision="v1")
out = {{"dtype": torch.zeros(1, dtype=model.dtype), "logits": logits(model), "double": logits(model.double())}}
generation = model.generation_config
assert generation.eos_token_id is not None and generation.pad_token_id is not None
tokenizer = AutoTokenizer.from_pretrained("me/merged", revision="v1")
assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (generation.eos_token_id, generation.pad_token_id)
"""
    loaded = fresh_process(hub, tmp_path / "home", code)
    # The low-rank update of every module, rounded to the base's dtype.
    base = AutoModelForCausalLM.from_pretrained(tiny_path("base")).eval()
    assert loaded["dtype"].dtype == base.dtype
    (adapter,) = run.glob("arms/*/*/seed-0/adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            module = base.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            update = tensors[key.replace("lora_A", "lora_B")] @ tensors[key] * config["lora_alpha"] / config["r"]
            module.weight.data = (module.weight.data.float() + update).to(base.dtype)
    assert torch.equal(loaded["logits"], logits(base))
    torch.testing.assert_close(loaded["double"], logits(base.double()))


def test_sparsify_reads_the_same_folders(hub: HubServer, tmp_path: Path) -> None:
    """Its own loader, rewritten from its source: `SparseCoder.load_from_disk` and `encode`."""
    sae = make_sae()
    sae.metadata = {}
    push_sae_to_hub({"layers.1": sae}, "me/both", sparsify=True)
    assert set(hub.files("me/both")) >= {f"layers.1/{name}" for name in ("cfg.json", "sae.safetensors")}
    config = json.loads(hub.files("me/both")["layers.1/cfg.json"])
    (tmp_path / "sae.safetensors").write_bytes(hub.files("me/both")["layers.1/sae.safetensors"])
    tensors, x = load_file(tmp_path / "sae.safetensors"), make_x()
    assert set(tensors) == {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
    assert config["activation"] == "topk" and not config["transcode"] and not config["skip_connection"]
    assert tensors["W_dec"].shape == (config["num_latents"], config["d_in"])
    pre = torch.relu((x - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"])
    acts, indices = pre.topk(config["k"], sorted=False)
    z = torch.zeros_like(pre).scatter(-1, indices, acts)
    with torch.no_grad():
        torch.testing.assert_close(z @ tensors["W_dec"] + tensors["b_dec"], sae(x))
        # Each reader finds one SAE: the second copy of the weights is not a second SAE.
        assert torch.equal(load_sae("me/both")(x), sae(x))
    code = """
from sae_lens import SAE
out = {"b_dec": SAE.from_pretrained("me/both", "layers.1").b_dec.detach().clone()}
"""
    assert torch.equal(fresh_process(hub, tmp_path / "home", code)["b_dec"], sae.b_dec)


def test_a_plain_adapter_of_any_architecture(hub: HubServer, make_model: ModelFactory, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = make_model("llama")
    base.save_pretrained(tmp_path / "base")
    hub.create_repo("you/llama", folder=tmp_path / "base", files={"README.md": "---\nlicense: mit\n---\n"})
    base.name_or_path = base.config._name_or_path = "you/llama"
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    noise = torch.Generator().manual_seed(0)
    changed = {key: torch.randn(value.shape, generator=noise) for key, value in tensors.items()}
    save_file(changed, tmp_path / "plain" / "adapter_model.safetensors")
    assert main(["publish", "--folder", str(tmp_path / "plain"), "--repo_id", "me/plain"]) == 0
    code = f"""{LOGITS}
from peft import AutoPeftModelForCausalLM
out = {{"logits": logits(AutoPeftModelForCausalLM.from_pretrained("me/plain"))}}
"""
    here = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "plain")
    assert torch.equal(fresh_process(hub, tmp_path / "home", code)["logits"], logits(here.eval()))
