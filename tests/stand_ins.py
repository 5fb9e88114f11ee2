"""Tiny stand-ins under the names of real repos: models, SAEs and Tina's adapters, for the local Hub.

Architecture, number of layers, special tokens, RoPE base, tied or untied head, commit ids, file names and numbers of
latents are the real ones; widths and vocabularies are tiny, and weights random.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpqa_rows import gpqa_rows
from hub_server import HubServer
from lighteval.tasks.tasks.aime import MATH_PROMPT_TEMPLATE
from lighteval.tasks.tasks.gpqa import gpqa_instruct_prompt
from peft import LoraConfig, get_peft_model
from safetensors.torch import save
from stand_in_data import ONE_ANSWER
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from resa_hf.text import R1_PROMPT

R1_DISTILL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
TINA = ("Tina-Yi/R1-Distill-Qwen-1.5B-STILL", "Tina-Yi/R1-Distill-Qwen-1.5B-DeepScaleR")
# Latents, layers.
SAES = {
    "EleutherAI/sae-DeepSeek-R1-Distill-Qwen-1.5B-65k": (65_536, 28),
    "EleutherAI/sae-Llama-3.2-1B-131k": (131_072, 16),
}
_CHAT_ML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
_DEEPSEEK_CHAT = (
    "{{bos_token}}{% for message in messages %}{{'<｜User｜>' + message['content']}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\n'}}{% endif %}"
)
# Byte-level BPE of GPT-4's kind, as all of these models have; here learned from what the texts below are made of.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SAMPLE = ["User: There are apples and more. What is their sum? Assistant: think answer Answer: "]
# Lines of the prompts, a token each: they would be most of the text.
_PROMPTS = [R1_PROMPT, MATH_PROMPT_TEMPLATE.format(prompt=""), gpqa_instruct_prompt(gpqa_rows(1)[0], "").query]
_ANSWER = f" Counting. </think>\n<answer> Answer: {ONE_ANSWER}</answer>"
_LINES = [line for prompt in _PROMPTS for line in prompt.splitlines() if len(line) > 20]


@dataclass(frozen=True)
class _Model:
    """What is real of a model: its kind, commit, tokens behind the vocabulary in their order, and configuration."""

    kind: str
    commit: str
    licence: str
    specials: tuple[str, ...]
    eos: str
    bos: str | None = None
    tokenizer_class: str = "Qwen2Tokenizer"
    chat_template: str | None = _CHAT_ML
    gated: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """How wide a stand-in is, and beside transformers' initialisation how large its embeddings and MLP inputs are.

    Args:
        width (`int`): of the residual stream.
        spread, gain (`float`): of the embeddings, and of the MLPs' gates and inputs.
        end (`float`): how far the logit of the end stands above the others.
        answer (`float`, *optional*): the same of a token that is a whole answer, `stand_in_data.ONE_ANSWER`. `None`:
            there is no such token.
    """

    width: int = 16
    spread: float = 1.0
    gain: float = 1.0
    end: float = 6.0
    answer: float | None = None


# An SAE of 65,536 latents, 32 active, begins far worse than the mean in 16 dimensions, where the 32 point one way. In
# 128 it learns in some dozen steps, if there is more to learn than the mean.
WIDE = Size(width=128, spread=3.0, gain=2.0, end=16.0)
# For what is trained on its own answers: some are right, and some only end.
ANSWERING = Size(answer=6.0)

_LLAMA_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8_192,
}
_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|vision_pad|>")
MODELS: Mapping[str, _Model] = {
    R1_DISTILL: _Model(
        *("qwen2", "ad9f0ae0864d7fbcd1cd905e3c6c5b069cc8b562", "mit"),
        (
            "<｜end▁of▁sentence｜>",
            "<｜User｜>",
            "<｜Assistant｜>",
            "<｜begin▁of▁sentence｜>",
            "<|EOT|>",
            "<think>",
            "</think>",
        ),
        eos="<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        tokenizer_class="LlamaTokenizerFast",
        chat_template=_DEEPSEEK_CHAT,
        config={"num_hidden_layers": 28, "rope_theta": 10_000.0, "max_position_embeddings": 131_072},
    ),
    "Qwen/Qwen2.5-Math-1.5B": _Model(
        *("qwen2", "4a83ca6e4526a4f2da3aa259ec36c259f66b2ab2", "apache-2.0", _QWEN, "<|endoftext|>"),
        config={"num_hidden_layers": 28, "rope_theta": 10_000.0, "max_position_embeddings": 4_096}
        | {"tie_word_embeddings": True},
    ),
    "Qwen/Qwen2.5-1.5B": _Model(
        *("qwen2", "8faed761d45a263340a0528343f099c05c9a4323", "apache-2.0", _QWEN, "<|endoftext|>"),
        config={"num_hidden_layers": 28, "rope_theta": 1_000_000.0, "max_position_embeddings": 131_072}
        | {"tie_word_embeddings": True},
    ),
    "Qwen/Qwen2.5-7B-Instruct": _Model(
        *("qwen2", "a09a35458c702b33eeacc393d103063234e8bc28", "apache-2.0", _QWEN, "<|im_end|>"),
        config={"num_hidden_layers": 28, "rope_theta": 1_000_000.0, "max_position_embeddings": 32_768}
        | {"tie_word_embeddings": False},
    ),
    "Qwen/Qwen3-1.7B": _Model(
        *("qwen3", "70d244cc86ccca08cf5af4e1e306ecf908b1ad5e", "apache-2.0"),
        *((*_QWEN, "<tool_call>", "</tool_call>", "<think>", "</think>"), "<|im_end|>"),
        config={"num_hidden_layers": 28, "rope_theta": 1_000_000.0, "max_position_embeddings": 40_960, "head_dim": 8}
        | {"tie_word_embeddings": True},
    ),
    "meta-llama/Llama-3.2-1B": _Model(
        *("llama", "4e20de362430cd3b72f300e6b0f18e50e7166e08", "llama3.2"),
        ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|eot_id|>"),
        eos="<|end_of_text|>",
        bos="<|begin_of_text|>",
        tokenizer_class="PreTrainedTokenizerFast",
        chat_template=None,
        gated=True,
        config={"num_hidden_layers": 16, "max_position_embeddings": 131_072, "tie_word_embeddings": True}
        | {"rope_theta": 500_000.0, "rope_scaling": _LLAMA_ROPE},
    ),
}


def serve_models(hub: HubServer, folder: Path, recipe: str, size: Size = Size()) -> None:
    """Puts the models, SAEs and adapters that a recipe names on the Hub, and R1-Distill, which adapters are for.

    Args:
        hub (`HubServer`): where.
        folder (`Path`): scratch space.
        recipe (`str`): its text.
        size ([`Size`], *optional*): of the models.
    """
    for number, (name, model) in enumerate(MODELS.items()):
        if name in recipe:
            place = folder / name
            _write_model(place, model, size, seed=number)
            card = {"README.md": f"---\nlicense: {model.licence}\n---\n# {name}\n"}
            hub.create_repo(name, folder=place, files=card, commit=model.commit, gated=model.gated)
    for name, (latents, layers) in SAES.items():
        if name in recipe:
            hub.create_repo(name, files=_sae_files(latents, layers, size.width, recipe))
    for name in TINA:
        if steps := {int(step) for step in re.findall(rf"{re.escape(name)}/checkpoint-(\d+)", recipe)}:
            hub.create_repo(name, files=_adapter_files(folder / R1_DISTILL, steps | {500}))


def _write_model(folder: Path, model: _Model, size: Size, seed: int) -> None:
    tokenizer = _tokenizer(model)
    if size.answer is not None:
        tokenizer.add_tokens([AddedToken(_ANSWER, normalized=False)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": model.bos is not None,
        "bos_token": model.bos,
        "chat_template": model.chat_template,
        "eos_token": model.eos,
        "model_max_length": 131_072,
        "pad_token": None if model.kind == "llama" else model.specials[0],
        "tokenizer_class": model.tokenizer_class,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    _random_model(model, tokenizer, size, seed).save_pretrained(folder)


def _tokenizer(model: _Model) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(_SAMPLE, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    tokenizer.add_tokens([AddedToken(line, normalized=False) for line in _LINES])
    # DeepSeek's tags are no special tokens: they are part of the answer.
    is_special = [not token.endswith(("User｜>", "Assistant｜>", "think>", "tool_call>")) for token in model.specials]
    for token, special in zip(model.specials, is_special, strict=True):
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special)])
    if model.bos is not None:
        place = (model.bos, tokenizer.token_to_id(model.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{model.bos} $A", pair=f"{model.bos} $A {model.bos} $B", special_tokens=[place]
        )
    return tokenizer


def _random_model(model: _Model, tokenizer: Tokenizer, size: Size, seed: int) -> PreTrainedModel:
    """Random but for one thing: nearly every response is a single token, the end, so that answering takes no time, or
    one more before it, an answer."""
    end = tokenizer.token_to_id(model.eos)
    likely = {end: size.end} | ({} if size.answer is None else {tokenizer.token_to_id(_ANSWER): size.answer})
    config = AutoConfig.for_model(
        model.kind,
        # The real embeddings have rows to spare, too.
        vocab_size=tokenizer.get_vocab_size() + 16,
        bos_token_id=tokenizer.token_to_id(model.bos or model.eos),
        eos_token_id=end,
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_attention_heads=2,
        num_key_value_heads=1,
        **model.config,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        embeddings, head = made.get_input_embeddings().weight, made.get_output_embeddings().weight
        embeddings *= size.spread
        for name, weight in made.named_parameters():
            if "gate_proj" in name or "up_proj" in name:
                weight *= size.gain
        # Every hidden state has a large first component, and the rows of what is likely answer to it.
        for rows in (embeddings, head):
            rows[:, 0] = 1.0
            for token, above in likely.items():
                rows[token, 0] = 1.0 + above / size.width**0.5
    return made.to(torch.bfloat16)


def _sae_files(latents: int, layers: int, width: int, recipe: str) -> dict[str, bytes | str]:
    """sparsify's layout; weights for the hookpoints that the recipe names, since all of them are many."""
    settings = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": latents}
    settings |= {"k": 32, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": width}
    files: dict[str, bytes | str] = {"config.json": json.dumps({"sae": settings, "hookpoints": []})}
    for layer in range(layers):
        hookpoint = f"layers.{layer}.mlp"
        if hookpoint not in recipe:
            continue
        generator = torch.Generator().manual_seed(layer)
        decoder = torch.nn.functional.normalize(torch.randn(latents, width, generator=generator), dim=1)
        tensors = {"encoder.weight": decoder.clone(), "encoder.bias": torch.zeros(latents)}
        tensors |= {"W_dec": decoder, "b_dec": torch.zeros(width)}
        files[f"{hookpoint}/cfg.json"] = json.dumps(settings)
        files[f"{hookpoint}/sae.safetensors"] = save(tensors)
    return files


def _adapter_files(base: Path, steps: set[int]) -> dict[str, bytes | str]:
    """Tina's layout: a folder a checkpoint, and the name of the base as it was on the authors' cluster."""
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    files: dict[str, bytes | str] = {}
    for step in sorted(steps):
        torch.manual_seed(step)
        config = LoraConfig(r=32, lora_alpha=128, lora_dropout=0.05, target_modules=seven, task_type="CAUSAL_LM")
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config, adapter_name="default")
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        place = base.parent / f"tina-{step}"
        adapted.save_pretrained(place)
        settings = json.loads((place / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = "/ckpts/models/DeepSeek-R1-Distill-Qwen-1.5B/base"
        files[f"checkpoint-{step}/adapter_config.json"] = json.dumps(settings)
        files[f"checkpoint-{step}/adapter_model.safetensors"] = (place / "adapter_model.safetensors").read_bytes()
    return files
