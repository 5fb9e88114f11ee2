"""Arms whose verdict is known by how they are made. A harness that gets them wrong is not to be trusted."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

NOISE = 0.3  # of each weight matrix's own size, measured to cost the tiny reasoner most of its accuracy


def make_known(
    known: str, model: PreTrainedModel, lora: LoraConfig, source: PreTrainedModel | None, seed: int
) -> PreTrainedModel | PeftModel:
    """The model of a known arm, made from the target (which is changed in place).

    Args:
        known (`str`):
            `"zero_adapter"`: a LoRA whose update is exactly zero (no difference). `"svd_of_source"`: a LoRA cut by
            singular value decomposition from the source's weights minus the target's (a gain, if the source is
            better).
            `"weight_noise"`: Gaussian noise on every linear layer of the decoder (a loss).
        model, source ([`~transformers.PreTrainedModel`]):
            Target and source, of one shape.
        lora ([`~peft.LoraConfig`]):
            Shape of the adapter, as for the trained arms.
        seed (`int`):
            Of the noise.
    """
    if known == "weight_noise":
        return _with_noise(model, seed)
    peft = get_peft_model(model, lora)
    if known == "svd_of_source":
        assert source is not None, "checked with the settings"
        _set_to_difference(peft, source)
    return peft


@torch.no_grad()
def _set_to_difference(peft: PeftModel, source: PreTrainedModel) -> None:
    for name, module in peft.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        base: torch.Tensor = module.get_base_layer().weight  # type: ignore[assignment]
        wanted: torch.Tensor = source.get_submodule(name).weight  # type: ignore[assignment]
        difference = wanted.to(base) - base
        u, s, v = torch.linalg.svd(difference.float(), full_matrices=False)
        rank = module.r["default"]
        root = s[:rank].sqrt() / module.scaling["default"] ** 0.5
        lora_a: torch.Tensor = module.lora_A["default"].weight  # type: ignore[assignment]
        lora_b: torch.Tensor = module.lora_B["default"].weight  # type: ignore[assignment]
        torch.nn.init.zeros_(lora_a)[: len(root)] = root.unsqueeze(1) * v[:rank]
        torch.nn.init.zeros_(lora_b)[:, : len(root)] = u[:, :rank] * root


@torch.no_grad()
def _with_noise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            noise = torch.randn(module.weight.shape, generator=generator).to(module.weight)
            module.weight += NOISE * module.weight.std() * noise
    return model
