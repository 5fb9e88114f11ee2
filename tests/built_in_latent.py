"""A model with an answer built in by hand, and an SAE in which one latent carries it.

The task: letters, then `=`; the answer is 1 if a `k` is among them, else 0. Each token's embedding is a direction of
its own, one that it shares with some others, and one that all share. Layer 0 does nothing. Layer 1 attends to all
tokens alike, and writes down whether there was a `k`. The LM head reads that; without it, it says 0. The SAE at
layer 0 has a latent for each token's own direction and for each that some share: that of `k` carries the answer, all
others are as long, and those of other letters fire as often.
"""

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from resa_hf.sae.autoencoder import TopKSAE

HOOKPOINT = "layers.0"
D, TOKENS, GROUPS = 64, 56, 6
COMMON, WRITTEN, FIRST_GROUP = TOKENS, TOKENS + 1, TOKENS + 2
LETTERS = "seritanmodbcfghjlpqvwxyz"
CUE = "k"


def _directions() -> torch.Tensor:
    """Orthonormal rows: one a token, the common one, the one that is written, one a group."""
    return torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))[0]


def _order() -> torch.Tensor:
    """Which latent is which direction."""
    return torch.randperm(D, generator=torch.Generator().manual_seed(1))


def built_in_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    ids: dict[str, int] = tokenizer.get_vocab()
    rows, noise = _directions(), torch.Generator().manual_seed(2)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=TOKENS,
        hidden_size=D,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        eos_token_id=ids["<eos>"],
        bos_token_id=None,
        pad_token_id=ids["<pad>"],
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        groups = rows[FIRST_GROUP + torch.arange(TOKENS) % GROUPS]
        model.model.embed_tokens.weight.copy_(rows[:TOKENS] + 0.4 * groups + 0.5 * rows[COMMON])
        attention = model.model.layers[1].self_attn
        attention.v_proj.weight[0] = 2 * rows[ids[CUE]]
        attention.o_proj.weight[:, 0] = rows[WRITTEN]
        head = model.lm_head.weight
        head.copy_(0.1 * torch.randn(TOKENS, D, generator=noise))
        head[ids["0"]] += 3 * rows[COMMON]
        head[ids["1"]] += 6 * rows[WRITTEN]
        for now, then in {"=": "<answer>", "0": "</answer>", "1": "</answer>", "</answer>": "<eos>"}.items():
            head[ids[then]] += 6 * rows[ids[now]]
    return model


def built_in_sae() -> TopKSAE:
    rows = _directions()
    with torch.no_grad():
        shuffled = rows[_order()]
    # Below the threshold lies what is rounding; it leaves part of each direction to the error term.
    return TopKSAE.from_weights(shuffled, torch.full((D,), -0.1), shuffled.clone(), 0.5 * rows[COMMON], k=8)


def latent_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The latent of a token's own direction."""
    return int((_order() == tokenizer.get_vocab()[token]).nonzero())


def make_problems(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Prompts of 12 letters and `=`, 2 in 5 with a cue, and their answers."""
    rng = np.random.default_rng(seed)
    problems = []
    for index in range(count):
        letters = rng.choice(list(LETTERS), 12, replace=False)
        cued = index % 5 < 2
        if cued:
            letters[rng.integers(12)] = CUE
        problems.append(("".join(letters) + "=", str(int(cued))))
    return problems


def make_rows(tokenizer: PreTrainedTokenizerBase, problems: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Up to where the answer is the next token."""
    return [{"input_ids": tokenizer(prompt + "<answer>")["input_ids"]} for prompt, _ in problems]
