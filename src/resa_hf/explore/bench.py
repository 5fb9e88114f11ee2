"""Models, adapters and SAEs that several visitors use at once."""

import copy
import gc
import logging
import re
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from ..adapters import WEIGHTS_FILE as ADAPTER_WEIGHTS
from ..adapters import load_reasoning_adapter
from ..errors import ExploreError
from ..lora_config import CONFIG_FILE as ADAPTER_CONFIG
from ..models import layer_counts, load_causal_lm, load_skeleton, load_tokenizer
from ..places import parse_place
from ..precision import runnable_device
from ..sae.autoencoder import SAELensSAE, TopKSAE
from ..sae.checkpoint import list_saes, load_sae, saes_among, without_checkpoints
from ..sae.layouts import CONFIG_FILE, SAE_LENS_WEIGHTS, SPARSIFY_WEIGHTS
from ..tiny import tiny_path
from ..untrusted import read_json_object
from .kept import Kept
from .names import hub_name, hub_uri
from .public import PublicFolder, public_folder

SAE = TopKSAE | SAELensSAE
MAX_ADAPTERS = 4
_MAX_LAYERS = 1_000
_KEPT_ADAPTERS = 8  # sets of them, on each model
_INDEX = "model.safetensors.index.json"
# What Transformers reads beside the weights.
_MODEL_FILES = (
    *("config.json", "generation_config.json", _INDEX, "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
)
_MAX_WITHOUT_WEIGHTS = 100_000_000  # bytes

# From a root, through a folder; addresses have one more slash before it.
_PATH = re.compile(r"(?<![\w./~-])/[\w.-]+/|[A-Za-z]:\\")
_logger = logging.getLogger(__name__)
_BYTES = 4  # of a parameter in float32, the widest in which weights are published


@dataclass(frozen=True)
class Opened:
    """A model as it is, and with adapters.

    Args:
        model_name (`str`):
            As asked for.
        base ([`~transformers.PreTrainedModel`]):
            The model without adapters, in evaluation mode.
        tuned ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Other modules with the same tensors, and the adapters; the base itself if there are none.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's.
        lock (`threading.Lock`):
            To be held by whoever runs `base` or `tuned`, or changes what they compute: both for a moment only.
        is_own (`bool`):
            Whether this server offers the model; otherwise a visitor has named it, and nothing in it is trusted.
        is_tiny_reasoner (`bool`):
            Whether the model is the shipped one, which reads arithmetic from left to right, modulo 10.
    """

    model_name: str
    base: PreTrainedModel
    tuned: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    lock: threading.Lock = field(repr=False)
    is_own: bool = True
    is_tiny_reasoner: bool = False

    @contextmanager
    def at_strengths(self, strengths: Sequence[float]) -> Iterator[PreTrainedModel | PeftModel]:
        """Inside the block `tuned` computes with W + strength * (what the adapter adds); afterwards with 1 each.

        Args:
            strengths (sequence of `float`):
                One an adapter, in the order in which they were opened: 1 is the adapter as trained, 0 the base.
        """
        try:
            self._scale(strengths)
            yield self.tuned
        finally:
            self._scale([1.0] * len(strengths))

    def _scale(self, strengths: Sequence[float]) -> None:
        for layer in self._lora_layers:
            for number, strength in enumerate(strengths):
                layer.set_scale(_adapter_name(number), strength)

    @cached_property
    def _lora_layers(self) -> list[LoraLayer]:
        return [module for module in self.tuned.modules() if isinstance(module, LoraLayer)]


class _Base(NamedTuple):
    """A model without adapters, and those with its tensors and adapters that were used last."""

    opened: Opened
    with_adapters: Kept[Opened]


class Workbench:
    """Models, adapters and SAEs that several visitors use at once.

    A visitor's string is one of this server's own names, or else that of a public repository on the Hub. No folder is
    ever read by it, and what the server's token may read beyond that is not.

    Args:
        local (`Mapping[str, str | Path]`, *optional*):
            What this server offers: a name, and the folder, `resa_hf/tiny/...` or Hub repository that it stands for,
            which may be private.
        device (`str`, *optional*):
            Where models run; the accelerator if there is one.
        kept (`int`, *optional*, defaults to `2`):
            How many of its own models, of the models that visitors name, and of SAEs, stay in memory: those used last.
            Of the models that visitors name there is never more than one beside these.
        max_parameters (`int`, *optional*, defaults to 4 billion):
            Of a model that is loaded from the Hub by a visitor. Adapters and SAEs may be as large in bytes.
    """

    def __init__(
        self,
        local: Mapping[str, str | Path] = MappingProxyType({}),
        *,
        device: str | None = None,
        kept: int = 2,
        max_parameters: int = 4_000_000_000,
    ) -> None:
        self._local = {name: _settled(str(place)) for name, place in local.items()}
        self._device = runnable_device() if device is None else torch.device(device)
        self._max_parameters = max_parameters
        self._kept = kept
        self._own: Kept[_Base] = Kept(kept)
        self._named: Kept[_Base] = Kept(kept)
        self._alive: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
        self._saes: Kept[tuple[str, SAE]] = Kept(kept)

    def open(self, model: str, adapters: Sequence[str] = ()) -> Opened:
        """Loads a model with adapters, or finds it loaded.

        Args:
            model (`str`), adapters (sequence of `str`): the server's own names, or names on the Hub.

        Raises:
            `ExploreError`: if one of them cannot be had, and why.
        """
        if len(adapters) > MAX_ADAPTERS or len(set(adapters)) < len(adapters):
            raise ExploreError(f"At most {MAX_ADAPTERS} adapters act at once, each given once; not {len(adapters)}.")
        model = self._plain(model, "model")
        names = tuple(self._plain(adapter, "adapter") for adapter in adapters)
        bases = self._own if model in self._local else self._named
        base = bases.get(model, lambda: _Base(self._load_model(model), Kept(_KEPT_ADAPTERS)))
        if not names:
            return base.opened
        return base.with_adapters.get(names, lambda: self._with_adapters(base.opened, names))

    def sae(self, name: str, hookpoint: str | None = None) -> tuple[str, SAE]:
        """Loads an SAE, or finds it loaded.

        Args:
            name (`str`): the server's own name, or one on the Hub; several SAEs may lie there, by hookpoint.
            hookpoint (`str`, *optional*): which of them. `None`: the only one or the first.

        Returns:
            `tuple[str, TopKSAE | SAELensSAE]`: the hookpoint, and the SAE in evaluation mode.

        Raises:
            `ExploreError`: if it cannot be had, and why; with the hookpoints that there are.
        """
        name = self._plain(name, "SAE")
        return self._saes.get((name, hookpoint), lambda: self._load_sae(name, hookpoint))

    def _plain(self, text: str, what: str) -> str:
        known = isinstance(text, str) and text in self._local
        return text if known else hub_name(text, what)

    def _with_adapters(self, opened: Opened, adapters: Sequence[str]) -> Opened:
        wanted = ADAPTER_CONFIG, ADAPTER_WEIGHTS
        folders = {adapter: self._fetched(adapter, "adapter", wanted) for adapter in adapters}
        # Modules of its own, so that adapters and hooks on one do not act on the other; the tensors are shared. Hooks
        # of a visitor who is in the middle of something would be copied, too.
        tensors = chain(opened.base.parameters(), opened.base.buffers())
        with opened.lock:
            tuned: Any = copy.deepcopy(opened.base, {id(tensor): tensor for tensor in tensors})
        for number, (adapter, folder) in enumerate(folders.items()):
            with _told(
                {folder: adapter, str(opened.base.name_or_path): opened.model_name}, f"The adapter {adapter!r}"
            ):
                tuned = load_reasoning_adapter(tuned, folder, name=_adapter_name(number))
        return replace(opened, tuned=tuned.eval())

    def _load_model(self, name: str) -> Opened:
        is_own = name in self._local
        place = self._local[name] if is_own else str(self._fetch_model(public_folder(name, "model")))
        with _told({place: name}, f"The model {name!r}"):
            # Models run as they are stored; the tiny reasoner as its reports were measured.
            is_tiny_reasoner = place == str(tiny_path("base").resolve())
            dtype = torch.float32 if is_tiny_reasoner else "auto"
            base = load_causal_lm(place, dtype=dtype).to(self._device).eval()  # type: ignore[arg-type]  # torch's
            tokenizer = load_tokenizer(place)
            if not is_own:
                # What tells which adapters were trained on it.
                base.config._name_or_path = base.name_or_path = hub_uri(name, "model").id
                self._alive.add(base)
        return Opened(name, base, base, tokenizer, threading.Lock(), is_own, is_tiny_reasoner)

    def _fetch_model(self, found: PublicFolder) -> Path:
        self._check_model(found)
        folder = found.fetch(_MODEL_FILES, _MAX_WITHOUT_WEIGHTS)
        index = folder / _INDEX
        if index.is_file():
            shards = read_json_object(index, folder, ExploreError).get("weight_map")
            # Transformers reads whatever file it names, also one outside the folder.
            if not isinstance(shards, dict) or not all(shard in found.sizes for shard in map(str, shards.values())):
                raise ExploreError(f"{_INDEX} of {found.name!r} names files that are not there.")
        if len(self._alive) > self._kept:
            gc.collect()
        if len(self._alive) > self._kept:
            raise ExploreError("Other visitors use as many models as this server can hold: try again in a minute.")
        weights = [name for name in found.sizes if re.fullmatch(r"model[^/]*\.safetensors", name)]
        return found.fetch(weights, _BYTES * self._max_parameters)

    def _check_model(self, found: PublicFolder) -> None:
        """Before weights are downloaded."""
        if ADAPTER_CONFIG in found.sizes:
            raise ExploreError(f"{found.name!r} is an adapter: choose it as one, and as the model that it belongs to.")
        if "config.json" not in found.sizes or not any(path.endswith(".safetensors") for path in found.sizes):
            raise ExploreError(
                f"{found.name!r} holds no model that is read here: config.json and weights as safetensors. Pickles "
                "such as pytorch_model.bin can run code."
            )
        folder = found.fetch(["config.json"], 2**20)
        with _told({str(folder): found.name}, f"The model {found.name!r}"):
            config = read_json_object(folder / "config.json", folder, ExploreError)
            kind = config.get("model_type")
            if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
                raise ExploreError(f"{found.name!r} is a {kind!r} model, which Transformers does not know by itself.")
            if (layers := max(layer_counts(config), default=0)) > _MAX_LAYERS:
                raise ExploreError(f"{found.name!r} has {layers:,} layers or experts; at most {_MAX_LAYERS:,} can be.")
            skeleton = load_skeleton(str(folder))
            # Buffers are not stored: what they take is known from the configuration alone, such as masks by position.
            count = max(skeleton.num_parameters(), sum(buffer.numel() for buffer in skeleton.buffers()))
            if count > self._max_parameters:
                raise ExploreError(
                    f"{found.name!r} has {count:,} parameters; this server takes models of up to "
                    f"{self._max_parameters:,}."
                )

    def _load_sae(self, name: str, hookpoint: str | None) -> tuple[str, SAE]:
        if name in self._local:
            place = self._local[name]
            with _told({place: name}, f"The SAE {name!r}"):
                sae_id = _chosen(name, list_saes(place), hookpoint)
        else:
            found = public_folder(name, "SAE")
            sae_id = _chosen(name, saes_among(map(PurePosixPath, found.sizes)), hookpoint)
            wanted = [str(PurePosixPath(sae_id, file)) for file in (CONFIG_FILE, SAE_LENS_WEIGHTS, SPARSIFY_WEIGHTS)]
            place = str(found.fetch(wanted, self._max_parameters))
        with _told({place: name}, f"The SAE {name!r}"):
            sae = load_sae(place, sae_id, device=self._device).eval()
        where = sae.hookpoint or PurePosixPath(sae_id).name
        if hookpoint is not None and sae_id == "." and hookpoint != where:
            raise ExploreError(f"{name!r} has no SAE at {hookpoint!r}. It has: {where}.")
        if not where:
            raise ExploreError(f"The SAE {name!r} does not say at which hookpoint it reads.")
        return where, sae

    def _fetched(self, name: str, what: str, wanted: Collection[str]) -> str:
        if name in self._local:
            return self._local[name]
        return str(public_folder(name, what).fetch(wanted, self._max_parameters))


def _settled(place: str) -> str:
    """A folder by its whole path, so that it can be told from other words in a message."""
    found = parse_place(place)
    return str(Path(found.name, found.subfolder or "").resolve()) if found.is_folder else str(found)


def _adapter_name(number: int) -> str:
    return f"adapter-{number}"


def _chosen(name: str, sae_ids: Sequence[str], hookpoint: str | None) -> str:
    """The SAE at a hookpoint, or the first."""
    by_layer = sorted(without_checkpoints(sae_ids), key=lambda sae_id: [part.zfill(4) for part in sae_id.split(".")])
    if not by_layer:
        raise ExploreError(f"{name!r} holds no SAE that is read here: cfg.json, and weights as safetensors.")
    for sae_id in by_layer:
        if hookpoint in (None, sae_id, PurePosixPath(sae_id).name) or by_layer == ["."]:
            return sae_id
    raise ExploreError(f"{name!r} has no SAE at {hookpoint!r}. It has: {', '.join(by_layer)}.")


@contextmanager
def _told(names: Mapping[str, str], what: str) -> Iterator[None]:
    """Turns what loading raises into errors for visitors, with names in the place of this machine's folders."""
    try:
        yield
    except Exception as error:  # a stranger's files may break any library in any way
        text = str(error)
        for folder, name in names.items():
            text = text.replace(folder, name)
        ours = isinstance(error, ExploreError)  # a path in it is what a visitor typed
        if not ours and (not isinstance(error, ValueError | OSError) or _PATH.search(text)):
            _logger.exception("%s cannot be loaded", what)
            raise ExploreError(f"{what} cannot be loaded ({type(error).__name__}).") from None
        raise ExploreError(text) from None
