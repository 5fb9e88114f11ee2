"""How far an adapter has moved its model: the divergence of its predictions, and the size of its weights' change."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import datasets
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from ..errors import IncompatibleAdapterError
from ..hookpoints import backbone, causal_lm
from ..modes import evaluating
from ..tuning.loss import frozen_head
from ..tuning.mean_divergence import mean_divergence


class LoraUpdate(NamedTuple):
    """One module's dW = scaling * B @ A; the tensors are the adapter's own.

    Args:
        name (`str`): the module's, in the base model.
        A (`torch.Tensor`): `[rank, in_features]`.
        B (`torch.Tensor`): `[out_features, rank]`.
        scaling (`float`): `lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA.
    """

    name: str
    A: torch.Tensor
    B: torch.Tensor
    scaling: float

    @torch.no_grad()
    def norm(self) -> float:
        """||dW||_F, from tr((A A^T)(B^T B)): dW itself is never made."""
        a, b = self.A.cpu().double(), self.B.cpu().double()
        return self.scaling * float(((a @ a.T) * (b.T @ b)).sum().clamp_min(0).sqrt())


def lora_updates(model: PeftModel) -> Iterator[LoraUpdate]:
    """The updates of the model's active adapter, module by module.

    Raises:
        `IncompatibleAdapterError`: if the adapter is something else than LoRA on linear layers, so that its change is
        not dW = scaling * B @ A alone.
    """
    adapter = model.active_adapter
    config = model.peft_config[adapter]
    if not isinstance(config, LoraConfig) or config.use_dora or config.bias != "none" or config.modules_to_save:
        raise IncompatibleAdapterError(
            f"The adapter {adapter!r} is not plain LoRA (without DoRA, trained biases and modules_to_save), so its "
            "change of the weights is not scaling * B @ A."
        )
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.scaling:
            continue
        if adapter not in module.lora_A or module.lora_A[adapter].weight.ndim != 2:
            raise IncompatibleAdapterError(f"The adapter {adapter!r} is LoRA on {name!r}, which is no linear layer.")
        A: torch.Tensor = module.lora_A[adapter].weight  # type: ignore[assignment]
        B: torch.Tensor = module.lora_B[adapter].weight  # type: ignore[assignment]
        yield LoraUpdate(name, A, B, module.scaling[adapter])


@torch.no_grad()
def movement(model: PeftModel, rows: datasets.Dataset, batch_size: int = 8) -> dict[str, Any]:
    """How far the active adapter has moved the model, measured on held-out rows, without an SAE.

    Modes, and what is trainable, are afterwards as they were.

    Args:
        model ([`~peft.PeftModel`]):
            The base with a LoRA adapter.
        rows (`datasets.Dataset`):
            Tokenised, in the column `input_ids`, of any lengths. Every position but a row's last one counts.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows at once.

    Returns:
        `dict`: `kl`, the mean KL(base || tuned) of the next token's distribution, in nats; `tokens`, the positions
        that it is the mean of; `update_norm`, ||dW||_F of all modules together; `update_norms`, by module.

    Raises:
        `IncompatibleAdapterError`: if the adapter is not plain LoRA on linear layers.
        `ValueError`: if the LM head is not a plain frozen one.
    """
    norms = {update.name: update.norm() for update in lora_updates(model)}
    head = frozen_head(causal_lm(model))  # type: ignore[arg-type]  # a PreTrainedModel, inside PEFT
    inner = backbone(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def states(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        tuned = inner(**batch, use_cache=False).last_hidden_state
        with model.disable_adapter():
            return tuned, inner(**batch, use_cache=False).last_hidden_state

    with evaluating(model):
        divergence, tokens = mean_divergence(rows, batch_size, states, (head, head))
    # PEFT makes an adapter trainable when it is switched on again, also one that was loaded frozen.
    model.requires_grad_(False)
    for parameter in trainable:
        parameter.requires_grad_(True)
    return {
        "kl": divergence,
        "tokens": tokens,
        "update_norm": math.hypot(*norms.values()),
        "update_norms": norms,
    }
