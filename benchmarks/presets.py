"""The shapes that are measured. Randomly initialised weights in real shapes give true speeds."""

from dataclasses import dataclass

import torch
from peft import LoraConfig
from transformers import Qwen2Config, Qwen2ForCausalLM

from resa_hf.arguments import LoraArguments


@dataclass(frozen=True)
class Preset:
    """A Qwen2 model, an SAE, and the tokens of a step."""

    hidden_size: int
    layers: int
    intermediate_size: int
    heads: int
    kv_heads: int
    vocabulary: int
    hookpoint: int
    latents: int
    tokens: int  # of a step of Stage II: one sequence
    sequences: int  # of that length in a step of Stage I
    dtype: torch.dtype
    k: int = 32

    def config(self) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=32768,
            tie_word_embeddings=False,
        )

    def model(self, device: torch.device | str = "cpu") -> Qwen2ForCausalLM:
        torch.manual_seed(0)
        with torch.device(device):
            return Qwen2ForCausalLM(self.config()).to(self.dtype).eval()


PRESETS = {
    "cpu": Preset(256, 8, 1024, 4, 4, 32_000, 3, 8192, 512, 8, torch.float32),
    "r1-distill-1.5b": Preset(1536, 28, 8960, 12, 2, 151_936, 12, 65_536, 2048, 16, torch.bfloat16),
    "qwen2.5-7b": Preset(3584, 28, 18_944, 28, 4, 152_064, 12, 65_536, 2048, 16, torch.bfloat16),
}


def lora() -> LoraConfig:
    """The paper's, without dropout, which would give each contestant other numbers."""
    return LoraArguments(lora_dropout=0.0).lora_config()
