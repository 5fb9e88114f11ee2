"""The engine that samples from a model in this process."""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import IncompatibleAdapterError
from ..guards import check_token_id
from ..hookpoints import causal_lm
from ..modes import evaluating
from ..out_of_memory import answers_explained
from ..quantization import is_in_4bit
from ..text import encode_prompt
from .decoding import Draw, decode
from .engine import Completion, Sampling
from .share import Share
from .store import Key, Store


class TransformersEngine:
    """Samples from a model in this process, on the device where it is.

    Nothing is taken from the model's own generation_config.json but its end tokens, and torch's global random state is
    not touched.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal LM. It is changed during `generate` only.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        adapter (`str` or `False`, *optional*):
            Which of a [`~peft.PeftModel`]'s LoRA adapters acts; any number of engines may share one model. `False`:
            none, which is the base. `None`: the model as it is set.
        name (`str`, *optional*):
            For reports. Default: the model's name and the adapter's.
        share ([`Share`], *optional*):
            This process' part, where several answer together: all call `generate` alike; the first keeps the store.

    Raises:
        `IncompatibleAdapterError`: if the model has no such adapter.
        `ValueError`: if the model has no key-value cache, as Mamba.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        adapter: str | Literal[False] | None = None,
        name: str | None = None,
        share: Share = Share(),  # noqa: B008  # frozen
    ) -> None:
        loaded = list(model.peft_config) if isinstance(model, PeftModel) else []
        if isinstance(adapter, str) and adapter not in loaded:
            raise IncompatibleAdapterError(f"There is no adapter {adapter!r} in the model; it has {loaded or 'none'}.")
        if "past_key_values" not in inspect.signature(_bare(model).forward).parameters:
            raise ValueError(f"{type(_bare(model)).__name__} has no key-value cache to sample with: use a server.")
        self.tokenizer = tokenizer
        self._model = model
        self._adapter = adapter
        self._name = name
        self._share = share

    @property
    def name(self) -> str:
        if self._name is not None:
            return self._name
        base = str(_bare(self._model).name_or_path) or type(_bare(self._model)).__name__
        with acting(self._model, self._adapter):
            return "+".join([base, *_active_adapters(self._model)])

    def generate(
        self, prompts: Sequence[str], sampling: Sampling, *, store: Path | None = None, progress: bool = True
    ) -> list[list[Completion]]:
        """As [`~resa_hf.evaluation.engine.Engine.generate`]. What is kept in `store` is kept batch by batch."""
        encoded = [tuple(encode_prompt(prompt, self.tokenizer)) for prompt in prompts]
        check_token_id(max(chain.from_iterable(encoded), default=0), _bare(self._model), "A prompt")
        keys = [(problem, sample) for problem in range(len(prompts)) for sample in range(sampling.samples)]
        # Prompts of like length need little padding. The longest come first, so that memory runs out early or never.
        keys.sort(key=lambda key: -len(encoded[key[0]]))
        with acting(self._model, self._adapter), evaluating(self._model), torch.no_grad():
            weights = weights_digest(self._model) if store is not None else {}
            share = self._share
            path = store if share.is_first else None
            kept = Store(path, {"engine": self.name, **weights}, prompts, sampling)
            kept.done = share.of_first(kept.done)
            hidden = not progress or not share.is_first
            at_once = sampling.batch_size * share.processes
            with tqdm(total=len(keys), desc="Answering", initial=len(kept.done), disable=hidden) as bar:
                for start in range(0, len(keys), at_once):
                    left = [key for key in keys[start : start + at_once] if key not in kept.done]
                    if left:
                        mine = share.part(left)
                        found = self._batch(mine, [encoded[problem] for problem, _ in mine], sampling, bar.update)
                        kept.add(share.of_all(found))
                        bar.update(len(left) - len(mine))
        return kept.answers()

    def _batch(
        self, batch: list[Key], prompts: list[tuple[int, ...]], sampling: Sampling, ended: Callable[[], object]
    ) -> dict[Key, Completion]:
        if not batch:
            return {}
        model, draw = _bare(self._model), seeded_draw(batch, sampling)
        ends = end_tokens(model, self.tokenizer)
        found = {}
        with answers_explained(sampling, is_in_4bit(model)):
            for row, tokens in decode(model, prompts, draw, ends=ends, limit=sampling.max_new_tokens):
                text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
                found[batch[row]] = Completion(text, len(tokens), tokens[-1] not in ends, tuple(tokens))
                ended()
        return found


def seeded_draw(keys: Sequence[Key], sampling: Sampling) -> Draw:
    """What draws the tokens of samples, one a row, for [`~resa_hf.evaluation.decoding.decode`].

    Args:
        keys (sequence of `tuple[int, int]`):
            Numbers of problem and sample. The draws of a sample are its own, so that they depend neither on the batch
            nor on where a run was stopped.
        sampling (`Sampling`):
            The settings.
    """
    uniform = np.stack(
        [np.random.default_rng((sampling.seed, *key)).random(sampling.max_new_tokens, np.float32) for key in keys]
    )

    def draw(logits: Tensor, rows: list[int], count: int) -> Tensor:
        return draw_tokens(logits, torch.from_numpy(uniform[rows, count]).to(logits.device), sampling)

    return draw


def draw_tokens(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Draws a token for each row by inverting its cumulative distribution.

    Args:
        logits (`torch.Tensor`):
            `[rows, vocabulary]`.
        uniform (`torch.Tensor`):
            `[rows]` float32, uniform in [0, 1).
        sampling (`Sampling`):
            Temperature and top-p: of the most likely tokens, as many as it takes to reach that probability.

    Returns:
        `torch.Tensor`: `[rows]` int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    likely = (logits.float() / sampling.temperature).softmax(-1)
    order = None
    if sampling.top_p < 1:
        likely, order = likely.sort(-1, descending=True)
        likely = likely.masked_fill(likely.cumsum(-1) - likely >= sampling.top_p, 0)
    total = likely.cumsum(-1)
    # 1 - uniform is never 0, so a token without probability is never drawn.
    place = torch.searchsorted(total, (1 - uniform).unsqueeze(1) * total[:, -1:])
    place = place.clamp(max=total.shape[1] - 1)  # where logits are NaN, which `decode` tells
    return (place if order is None else order.gather(1, place)).squeeze(1)


def _bare(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return causal_lm(model)  # type: ignore[return-value]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a completion: the model's own, or else the tokenizer's."""
    own: GenerationConfig | None = model.generation_config
    ends = own.eos_token_id if own is not None else None
    ends = tokenizer.eos_token_id if ends is None else ends
    return set(ends) if isinstance(ends, list) else {ends} - {None}


@contextmanager
def acting(model: PreTrainedModel | PeftModel, adapter: str | Literal[False] | None) -> Iterator[None]:
    """One adapter acts inside the block, or none; afterwards those that did before, and what was trained is again."""
    if adapter is None or not isinstance(model, PeftModel):
        yield
        return
    tuner: BaseTuner = model.base_model  # type: ignore[assignment]  # any module, for all that mypy can know
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = _active_adapters(model)
    try:
        if adapter is False:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            tuner.set_adapter(adapter)
        yield
    finally:
        if before:
            tuner.enable_adapter_layers()
            tuner.set_adapter(before)
        else:
            tuner.disable_adapter_layers()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])


def _active_adapters(model: PreTrainedModel | PeftModel) -> list[str]:
    if not isinstance(model, PeftModel) or not model.get_model_status().enabled:
        return []
    return list(model.active_adapters)


def weights_digest(model: PreTrainedModel | PeftModel) -> dict[str, str]:
    """Hashes that tell whether the weights are those that gave a stored answer.

    All of an adapter is read, of the base some numbers of each tensor: another training changes nearly all of them.
    """
    active = _active_adapters(model)
    base: list[tuple[str, Tensor]] = []
    adapters: list[tuple[str, Tensor]] = []
    for name, parameter in _bare(model).named_parameters():
        parts = name.split(".")
        if any(part.startswith("lora_") or part == "modules_to_save" for part in parts):
            if set(active) & set(parts):
                adapters.append((name, parameter))
        else:
            flat = parameter.detach().flatten()
            base.append((name.replace(".base_layer", ""), flat[:: max(1, len(flat) // 256)]))
    for name, module in _bare(model).named_modules():
        if isinstance(module, LoraLayer):
            adapters += [(name, torch.tensor(module.scaling[key])) for key in active if key in module.scaling]
    return {"base": _digest(base), "adapter": _digest(adapters) if active else "none"}


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
