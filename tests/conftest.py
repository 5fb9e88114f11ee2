"""What all tests share: no network, one thread, and tiny models made in memory."""

import gc
import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from hub_server import HubServer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

pytest_plugins = ["fault_table"]

# HYPOTHESIS_PROFILE=long tries property tests on thousands of other examples, which differ from run to run.
settings.register_profile("short", max_examples=20, derandomize=True, deadline=None, database=None)
settings.register_profile(
    "long", max_examples=3_000, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage() -> None:
    """What all test modules have imported is not looked through again and again: that was a quarter of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _silent_garbage() -> None:
    """
    Progress bars that an error left open write nothing when they are collected.

    wandb, which sae-lens imports, keeps a note of each write in a `ContextVar`, and Python 3.11 may collect garbage
    while another `ContextVar` is set or reset: transformers' then fails in a forward that has nothing to do with it
    (https://github.com/python/cpython/issues/148891).
    """
    from tqdm import tqdm

    tqdm.__del__ = lambda bar: None


ModelFactory = Callable[..., "PreTrainedModel"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _make_model(kind: str, seed: int = 0, **overrides: Any) -> "PreTrainedModel":
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "gpt2":
        # GPT-2's dropout is on by default, and would make two forwards differ.
        sizes |= {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        sizes |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128}
        if kind == "qwen3":
            sizes |= {"head_dim": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **{**sizes, **overrides})
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def make_model() -> ModelFactory:
    """`make_model(kind, seed=0, **overrides)`: a random causal LM, `kind` one of qwen2, qwen3, llama, gpt2.

    3 layers, hidden size 32, 64 tokens, float32, in eval mode; `overrides` go to the architecture's own config.
    """
    return _make_model


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "PreTrainedTokenizerBase":
    """The tiny reasoner's tokenizer, as it ships. Shared: do not change it."""
    from transformers import AutoTokenizer

    from resa_hf.tiny import tiny_path

    return AutoTokenizer.from_pretrained(tiny_path("base"))


@pytest.fixture
def tiny_base() -> "PreTrainedModel":
    """The tiny reasoner's base, as it ships, in float32; a fresh one for each test."""
    import torch
    from transformers import AutoModelForCausalLM

    from resa_hf.tiny import tiny_path

    return AutoModelForCausalLM.from_pretrained(tiny_path("base"), dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real training sets and benchmarks; tests that need it are skipped where it is not."""
    folder = Path(os.environ.get("RESA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("set RESA_SHARED_DATA to the folder with the real benchmarks")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Iterator[HubServer]":
    """A local Hub; this process is online, uses it and its owner's token, and has an empty cache."""
    from hub_client import point_clients_at
    from hub_server import HubServer

    with HubServer() as server:
        point_clients_at(server, tmp_path / "hf_home", monkeypatch)
        yield server
