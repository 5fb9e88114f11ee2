"""The decoding loop against Transformers' `generate`, on architectures whose caches differ."""

import pytest
import torch
from transformers import GenerationConfig

from resa_hf.evaluation.decoding import decode, decode_steps

ENDS = [2, *range(50, 64)]


def prompts():
    generator = torch.Generator().manual_seed(1)
    some = [tuple(torch.randint(3, 64, (length,), generator=generator).tolist()) for length in (5, 9, 3, 12, 7)]
    return [prompt for prompt in some for _ in range(2)]


def spread_out(model):
    """Random weights large enough for greedy answers that differ and end."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


@torch.no_grad()
def generated(model, rows, limit):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    config = GenerationConfig(do_sample=False, max_new_tokens=limit, eos_token_id=ENDS, pad_token_id=0)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ENDS), len(row))] for row in output]


HYBRID = {
    **{"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    **{"shared_expert_intermediate_size": 16, "num_hidden_layers": 4},
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen2", {}),
        ("qwen3", {}),
        ("llama", {}),
        ("gpt2", {}),
        ("mistral", {"sliding_window": 6}),
        ("gemma3_text", {"head_dim": 8, "sliding_window": 6}),
        ("qwen3_next", HYBRID),  # three layers of four are linear attention
    ],
)
def test_greedy_tokens_are_those_of_generate(make_model, kind, settings):
    model, rows = spread_out(make_model(kind, **settings)), prompts()
    expected = generated(model, rows, 24)
    assert len({len(row) for row in expected}) > 1  # rows are dropped on the way
    with torch.no_grad():
        found = list(decode(model, rows, lambda logits, rows, count: logits.argmax(-1), ends=set(ENDS), limit=24))
    assert dict(found) == dict(enumerate(expected))
    assert [len(tokens) for _, tokens in found] == sorted(len(row) for row in expected)


def test_long_completions_outgrow_the_caches_room(make_model):
    model, rows = spread_out(make_model("llama", max_position_embeddings=512)), prompts()[:3]
    with torch.no_grad():
        found = dict(decode(model, rows, lambda logits, rows, count: logits.argmax(-1), ends=set(), limit=200))
    until_the_end = generated(model, rows, 200)
    for row, tokens in enumerate(until_the_end):
        assert found[row][: len(tokens)] == tokens
    assert all(len(tokens) == 200 for tokens in found.values())


def test_draw_is_told_which_row_and_how_far_it_is(make_model):
    seen = []

    def draw(logits, rows, count):
        assert logits.shape == (len(rows), 64)
        seen.append((tuple(rows), count))
        # Row r ends after r + 1 tokens.
        return torch.tensor([2 if count == row else 5 for row in rows])

    with torch.no_grad():
        found = dict(decode(make_model("qwen2"), prompts()[:3], draw, ends={2}, limit=9))
    assert seen == [((0, 1, 2), 0), ((1, 2), 1), ((2,), 2)]
    assert found == {0: [2], 1: [5, 2], 2: [5, 5, 2]}


def test_the_model_runs_only_when_the_next_step_is_asked_for(make_model):
    model, rows, calls = make_model("qwen2"), prompts()[:2], []
    model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    steps = decode_steps(
        model, rows, lambda logits, rows, count: torch.full((len(rows),), 5 + count), ends={7}, limit=9
    )
    assert not calls
    for count in range(3):
        with torch.no_grad():
            assert next(steps) == [(0, 5 + count), (1, 5 + count)]
        assert calls == [False] * (count + 1)
        assert torch.is_grad_enabled()
    assert next(steps, None) is None
    assert len(calls) == 3
