"""The two files of an adapter that is to be published, checked as those of a stranger are before they are loaded."""

from pathlib import Path

from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..errors import IncompatibleAdapterError, PublishError
from ..lora_config import read_lora_config
from ..untrusted import read_shapes, read_tensors


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The settings of a plain LoRA adapter, and its tensors on the CPU.

    Args:
        folder (`Path`): with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        `PublishError`: if it is something else than plain LoRA; if a file is missing, corrupt or no safetensors; if a
            tensor is not finite, or an A has no B.
    """
    try:
        config = read_lora_config(folder / CONFIG_NAME, folder)
    except IncompatibleAdapterError as error:
        raise PublishError(f"{error} Others could not load it either.") from error
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    shapes = read_shapes(weights, folder, PublishError)
    for name in shapes:
        other = name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        if other not in shapes:
            raise PublishError(f"{weights} holds {name}, and no {other}. Save or download the adapter again.")
    return config, read_tensors(weights, PublishError)
