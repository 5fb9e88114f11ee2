"""Files of models: SAEs, adapters, models, checkpoints, the teacher's states, cards."""

import copy
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from adapter_files import save_adapter
from conftest import _make_model
from fuzz_parsers import Parser
from hypothesis import strategies as st
from mutations import weights_change
from sae_files import make_sae, write_sparsify
from safetensors.torch import save_file
from transformers import PreTrainedModel
from tree_mutations import byte_changes, card_changes, json_changes

from resa_hf.adapters import load_reasoning_adapter
from resa_hf.checkpoints import FILES, _seal, newest_whole, set_torn_aside
from resa_hf.hub.adapter_files import read_adapter
from resa_hf.hub.licences import licence_of
from resa_hf.hub.upload import MANIFEST, _stale
from resa_hf.models import load_causal_lm, load_skeleton, load_tokenizer
from resa_hf.sae.checkpoint import load_sae, save_sae
from resa_hf.sae.resume import PROGRESS_FILE, ResumableSAEs
from resa_hf.sae.totals import TrainingProgress
from resa_hf.tiny import tiny_path
from resa_hf.tuning.teacher_cache import TeacherCache, row_key

_ROWS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
_CARD = "---\nlicense: other\nlicense_name: Some Licence\nlicense_link: LICENSE\ntags: [a, b]\n---\n# A model\n"


def weights() -> "st.SearchStrategy[list[Any]]":
    return st.lists(weights_change(), min_size=1, max_size=2)


def _sae_lens(folder: Path) -> None:
    save_sae(make_sae(), folder)


def _sparsify(folder: Path) -> None:
    folder.rmdir()
    write_sparsify(folder)


def _load_sae(folder: Path) -> None:
    sae = load_sae(folder, ".")
    sae(torch.ones(2, sae.d_in, dtype=next(sae.parameters()).dtype))


@cache
def _base() -> PreTrainedModel:
    return _make_model("qwen2", num_hidden_layers=1)


def _adapter(folder: Path) -> None:
    save_adapter(folder, _base())


@torch.no_grad()
def _load_adapter(folder: Path) -> None:
    load_reasoning_adapter(copy.deepcopy(_base()), folder)(input_ids=torch.tensor([[1, 2]]))


def _model(folder: Path) -> None:
    _make_model("llama", num_hidden_layers=1).save_pretrained(folder)
    for path in tiny_path("base").glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())


def _load_tokenizer(folder: Path) -> None:
    load_tokenizer(str(folder))("12+3=")


def _checkpoints(folder: Path) -> None:
    for step in (1, 2):
        place = folder / f"checkpoint-{step}"
        (place / "layers.1").mkdir(parents=True)
        (place / "layers.1" / "cfg.json").write_text("{}")
        (place / "optimizer.pt").write_bytes(bytes(range(64)))
        _seal(place)


def _resume(folder: Path) -> None:
    found = newest_whole(folder)
    assert found is not None, "the first checkpoint is whole"
    set_torn_aside(folder)
    assert found.is_dir()


def _progress(folder: Path) -> None:
    save_file(TrainingProgress({"layers.1": make_sae()}).tensors(), folder / PROGRESS_FILE)


class _Trainer:
    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
        pass


class _Resumed(ResumableSAEs, _Trainer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.progress = TrainingProgress({"layers.1": make_sae()})


def _load_progress(folder: Path) -> None:
    _Resumed()._load_optimizer_and_scheduler(str(folder))


def _cache(folder: Path) -> TeacherCache:
    return TeacherCache(folder, "f", _ROWS, [torch.zeros(1, 1, 4), torch.zeros(1, 1, 2, dtype=torch.bfloat16)])


def _states(folder: Path) -> None:
    states = [torch.ones(3, 4, 4), torch.ones(3, 4, 2, dtype=torch.bfloat16)]
    made = _cache(folder)
    made.write([row_key(row) for row in _ROWS], states)
    made.path.rename(folder / "states.bin")  # whatever its name will be


def _read_states(folder: Path) -> None:
    (folder / "states.bin").replace(_cache(folder).path)
    made = _cache(folder)
    read = made.read([row_key(row) for row in _ROWS], 4)
    assert read is None or [state.shape for state in read] == [(3, 4, 4), (3, 4, 2)]


def _card(folder: Path) -> None:
    (folder / "README.md").write_text(_CARD)


def _pushed(folder: Path) -> None:
    (folder / MANIFEST).write_text(json.dumps({"files": ["a.json", "b.md"], "more": {"x": [1, 2]}}))


def _read_pushed(folder: Path) -> None:
    api: Any = SimpleNamespace(hf_hub_download=lambda *args, **kwargs: str(folder / MANIFEST))
    there: Any = {MANIFEST: None, "a.json": None}
    assert set(_stale(api, "you/repo", "c" * 40, there, "model")) <= there.keys()


def _named(files: Sequence[tuple[Any, ...]]) -> list[Parser]:
    return [Parser(*one) for one in files]


ARTIFACTS = _named([
    ("SAE, sae-lens: cfg.json", _sae_lens, "cfg.json", _load_sae, json_changes),
    ("SAE, sae-lens: weights", _sae_lens, "sae_weights.safetensors", _load_sae, weights),
    ("SAE, sparsify: cfg.json", _sparsify, "cfg.json", _load_sae, json_changes),
    ("SAE, sparsify: weights", _sparsify, "sae.safetensors", _load_sae, weights),
    ("adapter: adapter_config.json", _adapter, "adapter_config.json", _load_adapter, json_changes),
    ("adapter: weights", _adapter, "adapter_model.safetensors", _load_adapter, weights),
    ("adapter to publish: adapter_config.json", _adapter, "adapter_config.json", read_adapter, json_changes),
    ("adapter to publish: weights", _adapter, "adapter_model.safetensors", read_adapter, weights),
    ("model: config.json", _model, "config.json", lambda folder: load_causal_lm(str(folder)), json_changes),
    ("model without weights: config.json", _model, "config.json", lambda folder: load_skeleton(str(folder)),
     json_changes),
    ("model: weights", _model, "model.safetensors", lambda folder: load_causal_lm(str(folder)), weights),
    ("model: generation_config.json", _model, "generation_config.json", lambda folder: load_causal_lm(str(folder)),
     json_changes),
    ("tokenizer: tokenizer.json", _model, "tokenizer.json", _load_tokenizer, json_changes),
    ("tokenizer: tokenizer_config.json", _model, "tokenizer_config.json", _load_tokenizer, json_changes),
    ("checkpoints: files.json", _checkpoints, f"checkpoint-2/{FILES}", _resume, json_changes),
    ("checkpoints: another file", _checkpoints, "checkpoint-2/optimizer.pt", _resume, byte_changes),
    ("Stage I's progress", _progress, PROGRESS_FILE, _load_progress, weights),
    ("teacher's states", _states, "states.bin", _read_states, byte_changes),
    ("card of a base: README.md", _card, "README.md", lambda folder: licence_of(str(folder)), card_changes),
    ("what was pushed before", _pushed, MANIFEST, _read_pushed, json_changes),
])  # fmt: skip
