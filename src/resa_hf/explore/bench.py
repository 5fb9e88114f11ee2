"""Models, adapters and SAEs that several visitors use at once."""

import copy
import logging
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path, PurePosixPath
from types import MappingProxyType

import torch
from huggingface_hub import constants
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from ..adapters import WEIGHTS_FILE as ADAPTER_WEIGHTS
from ..adapters import load_reasoning_adapter
from ..errors import ExploreError
from ..lora_config import CONFIG_FILE as ADAPTER_CONFIG
from ..models import load_causal_lm, load_skeleton, load_tokenizer
from ..places import parse_place
from ..precision import runnable_device
from ..sae.autoencoder import SAELensSAE, TopKSAE
from ..sae.checkpoint import list_saes, load_sae, saes_among, without_checkpoints
from ..sae.layouts import CONFIG_FILE, SAE_LENS_WEIGHTS, SPARSIFY_WEIGHTS
from ..tiny import tiny_path
from ..untrusted import read_json_object
from .kept import Kept
from .names import hub_name
from .public import PublicFolder, public_folder

SAE = TopKSAE | SAELensSAE
MAX_ADAPTERS = 4

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
        is_tiny_reasoner (`bool`):
            Whether the model is the shipped one, which reads arithmetic from left to right, modulo 10.
    """

    model_name: str
    base: PreTrainedModel
    tuned: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    lock: threading.Lock = field(repr=False)
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
            How many models with their adapters, and how many SAEs, stay in memory: those used last.
        max_parameters (`int`, *optional*, defaults to 4 billion):
            Of a model that is loaded from the Hub by a visitor. Adapters and SAEs may be as large in bytes.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`):
            Of models; `"auto"` as stored.
    """

    def __init__(
        self,
        local: Mapping[str, str | Path] = MappingProxyType({}),
        *,
        device: str | None = None,
        kept: int = 2,
        max_parameters: int = 4_000_000_000,
        dtype: torch.dtype | str = "auto",
    ) -> None:
        self._local = {name: _settled(str(place)) for name, place in local.items()}
        self._device = runnable_device() if device is None else torch.device(device)
        self._max_parameters = max_parameters
        self._dtype = dtype
        self._models: Kept[Opened] = Kept(kept)
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
        return self._models.get((model, names), lambda: self._open(model, names))

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
        return text if text in self._local else hub_name(text, what)

    def _open(self, model: str, adapters: Sequence[str]) -> Opened:
        opened = next((opened for opened in self._models.values() if opened.model_name == model), None)
        opened = opened or self._load_model(model)
        tuned: PreTrainedModel | PeftModel = opened.base
        if adapters:
            # Modules of its own, so that adapters and hooks on one do not act on the other; the tensors are shared.
            tensors = chain(opened.base.parameters(), opened.base.buffers())
            tuned = copy.deepcopy(opened.base, {id(tensor): tensor for tensor in tensors})
        for number, adapter in enumerate(adapters):
            folder = self._fetched(adapter, "adapter", (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
            with _told({folder: adapter, str(opened.base.name_or_path): model}, f"The adapter {adapter!r}"):
                tuned = load_reasoning_adapter(tuned, folder, name=_adapter_name(number))
        return Opened(
            model, opened.base, tuned.eval(), opened.tokenizer, opened.lock, is_tiny_reasoner=opened.is_tiny_reasoner
        )

    def _load_model(self, name: str) -> Opened:
        if name in self._local:
            place = self._local[name]
        else:
            found = public_folder(name, "model")
            self._check_model(found)
            place = str(found.fetch(_model_files(found.sizes), _BYTES * self._max_parameters))
        with _told({place: name}, f"The model {name!r}"):
            base = load_causal_lm(place, dtype=self._dtype).to(self._device).eval()  # type: ignore[arg-type]  # torch's
            tokenizer = load_tokenizer(place)
            if name not in self._local:
                # What tells which adapters were trained on it.
                base.config._name_or_path = base.name_or_path = found.repo
            is_tiny_reasoner = place == str(tiny_path("base").resolve())
        return Opened(name, base, base, tokenizer, threading.Lock(), is_tiny_reasoner)

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
            kind = read_json_object(folder / "config.json", folder, ExploreError).get("model_type")
            if kind not in CONFIG_MAPPING:
                raise ExploreError(f"{found.name!r} is a {kind!r} model, which Transformers does not know by itself.")
            count = load_skeleton(str(folder)).num_parameters()
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


def _model_files(paths: Collection[str]) -> list[str]:
    """What Transformers reads: no checkpoints in folders, and no second copy of the weights in another format."""
    names = [path for path in paths if "/" not in path]
    return [
        name
        for name in names
        if name.endswith((".json", ".txt", ".jinja", ".model"))
        or (name.startswith("model") and name.endswith(".safetensors"))
    ]


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
        if not isinstance(error, ValueError | OSError):
            _logger.exception("%s cannot be loaded", what)
            raise ExploreError(f"{what} cannot be loaded ({type(error).__name__}).") from None
        text = str(error)
        for folder, name in {**names, constants.HF_HOME: "the cache"}.items():
            text = text.replace(folder, name)
        raise ExploreError(text) from None
