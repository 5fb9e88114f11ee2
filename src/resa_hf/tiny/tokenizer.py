"""The tiny reasoner's tokenizer: one token a character, one token a reasoning tag."""

from typing import Final

from tokenizers import AddedToken
from transformers import Qwen2Tokenizer

SPECIAL_TOKENS: Final = ("<pad>", "<eos>", "<unk>")
TAGS: Final = ("<think>", "</think>", "<answer>", "</answer>")
# Those of the task and of its prompts, and the other lower-case letters; Ġ and Ċ are a byte-level vocabulary's space
# and newline.
CHARACTERS: Final = "0123456789+-*=;:ĠĊUserAitanmod.bcfghjklpqvwxyz?()"

CHAT_TEMPLATE: Final = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- 'User: ' + message.content + '\n' -}}
{%- elif message.role == 'assistant' -%}
{{- 'Assistant: ' + message.content + '<eos>' -}}
{%- else -%}
{{- raise_exception("the tiny reasoner knows the roles 'user' and 'assistant', got '" + message.role + "'") -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant: <think>' -}}
{%- endif -%}"""


def build_tokenizer() -> Qwen2Tokenizer:
    """Make the tokenizer from nothing.

    It is a `Qwen2Tokenizer` because `AutoTokenizer` makes one for every Qwen2 model, and with it drops any other
    pre-tokenizer and decoder that a tokenizer.json may hold. Without merges, its byte-level BPE is one token a
    character.

    Returns:
        `Qwen2Tokenizer`: 56 tokens, padded on the left, with a chat template for the roles `user` and `assistant`
        whose generation prompt opens `<think>`. Characters outside the vocabulary are dropped when encoding.
    """
    tokens = list(dict.fromkeys([*SPECIAL_TOKENS, *TAGS, *CHARACTERS]))
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
    )
    # Not special: they are part of the answer's text and must survive `skip_special_tokens=True`.
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
