"""Whether an adapter acts at all, and as its weights say. To be asked before each evaluation of one.

A server or a loader that ignores an adapter answers as the base does, and the verdict would be "no difference":
https://github.com/EleutherAI/lm-evaluation-harness/issues/2432, https://github.com/vllm-project/vllm/issues/10798.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import IncompatibleAdapterError
from ..hookpoints import causal_lm
from ..quantization import compute_in, is_in_4bit
from ..text import encode_prompt
from .in_process import acting
from .movement import LoraUpdate, lora_updates
from .server import ServerEngine


@dataclass(frozen=True)
class AdapterCheck:
    """What was seen of an adapter's logits, on the prompts asked.

    Args:
        change (`float`): largest difference from the base's.
        merge_error (`float`): largest difference from the merged model's.
    """

    change: float
    merge_error: float


@torch.no_grad()
def check_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, allow_zero: bool = False
) -> AdapterCheck:
    """Checks that the active LoRA adapter changes the base's logits, and gives those of the merged model.

    It is asked of a copy in float32 (float64 where the model is), since half precision rounds away what a small
    adapter does: beside the model, 4 bytes a parameter, which is twice a bfloat16 model's own. The copy of a 4-bit
    model keeps its 4-bit weights, which no adapter can be merged into: there its update is added to each module's
    output. The model itself is not changed.

    Args:
        model ([`~peft.PeftModel`]):
            With the adapter set.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (sequence of `str`):
            One or two real ones.
        allow_zero (`bool`, *optional*, defaults to `False`):
            Whether an adapter of zeros, which is the base, is meant.

    Raises:
        `IncompatibleAdapterError`: if the adapter is all zeros, is ignored, or differs from the merged model by more
            than a tenth of its change and more than rounding, 1e-5 of the largest logit.
    """
    name = repr(model.active_adapter)
    is_zero = all(update.norm() == 0 for update in lora_updates(model))
    if is_zero and not allow_zero:
        raise IncompatibleAdapterError(
            f"Adapter {name} is all zeros: its update of every weight is 0, so it is the base. Was it saved before "
            "training, or does it belong to another base, whose tensors have other names?"
        )
    wide, in_4bit = torch.promote_types(model.dtype, torch.float32), is_in_4bit(model)
    probe = copy.deepcopy(model).eval()
    if in_4bit:
        compute_in(probe, wide)
    else:
        probe.to(wide)
    adapted = _logits(probe, tokenizer, prompts)
    with acting(probe, False):
        base = _logits(probe, tokenizer, prompts)
    if in_4bit:
        with _adding_updates(probe), acting(probe, False):
            merged = _logits(probe, tokenizer, prompts)
    else:
        merged = _logits(probe.merge_and_unload(), tokenizer, prompts)
    check = AdapterCheck(_largest(adapted, base), _largest(adapted, merged))
    seen = f"On {len(prompts)} prompts its logits differ from the base's by {check.change:.3g} at most"
    if not is_zero and check.change == 0:
        raise IncompatibleAdapterError(f"Adapter {name} is ignored, though it is not zero. {seen}.")
    tolerance = max(1e-5 * max(float(logits.abs().max()) for logits in merged), 0.1 * check.change)
    if not check.merge_error <= tolerance:
        raise IncompatibleAdapterError(
            f"Adapter {name} does not act as its weights say. {seen}, and from those of the model with the adapter "
            f"merged by {check.merge_error:.3g}; {tolerance:.3g} would be tolerated."
        )
    return check


@contextmanager
def _adding_updates(model: PeftModel) -> Iterator[None]:
    """Adds scaling * B A x to the output of each base layer while the block runs, without PEFT's own code."""

    def adding(update: LoraUpdate) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + update.scaling * (inputs[0] @ update.A.T) @ update.B.T

        return hook

    bare = model.get_base_model()
    with ExitStack() as stack:
        for update in list(lora_updates(model)):
            layer = bare.get_submodule(f"{update.name}.base_layer")
            stack.callback(layer.register_forward_hook(adding(update)).remove)
        yield


def check_served_adapter(
    base: ServerEngine, adapter: ServerEngine, prompts: Sequence[str], *, max_new_tokens: int = 64
) -> None:
    """Checks that a server answers otherwise under an adapter's name than under the base's.

    Args:
        base, adapter (`ServerEngine`):
            One server under two names.
        prompts (sequence of `str`):
            A few real ones.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Of the greedy answers that are compared, with their log-probabilities where the server tells them.

    Raises:
        `IncompatibleAdapterError`: if all answers and all log-probabilities are the same. Without log-probabilities,
        as from `transformers serve`, equal answers are a warning: greedy ones often stay the same.
    """
    pairs = zip(base.logprobs(prompts, max_new_tokens), adapter.logprobs(prompts, max_new_tokens), strict=True)
    told = False
    for (base_text, base_logprobs), (text, logprobs) in pairs:
        # vLLM's own rounding differs between batches by less than this.
        if text != base_text or any(abs(a - b) > 1e-3 for a, b in zip(base_logprobs, logprobs, strict=True)):
            return
        told = told or bool(logprobs)
    message = (
        f"The server gives the same greedy answers to {len(prompts)} prompts as {adapter.name!r} and as {base.name!r}"
    )
    if told:
        raise IncompatibleAdapterError(f"{message}, with the same log-probabilities: it serves the base for both.")
    warnings.warn(f"{message}. Make sure that it does not serve the base for both, or ask more.", stacklevel=2)


def _logits(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[Tensor]:
    """By prompt `[tokens, vocabulary]`."""
    bare = causal_lm(model)
    ids = [torch.tensor([encode_prompt(prompt, tokenizer)], device=model.device) for prompt in prompts]
    return [bare(input_ids=row).logits[0] for row in ids]


def _largest(some: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(some, other, strict=True))
