"""Seconds of prompt-only extraction over all layers, and of the least that it needs: a forward and the encoders.

    OMP_NUM_THREADS=1 python benchmarks/feature_extraction.py [--layers 28] [--d_in 256] [--num_latents 4096] [--k 32]
        [--tokens 150 2000] [--repeats 3] [--device cuda]

A random Qwen2 model, an SAE behind each layer, all in memory. The baseline is the sum of one plain forward of the
model and of each encoder's matrix product, ReLU and top-k on the activations of that prompt. Both take turns.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from resa_hf.features.reasoning import CuedPrompt, reasoning_latents
from resa_hf.hookpoints import capture
from resa_hf.sae.autoencoder import TopKSAE

VOCABULARY = 4096


def timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def random_prompt(tokens: int) -> CuedPrompt:
    """Each of two cues stands in two places, as in the prompt of DeepSeek-R1."""
    ids = tuple(random.Random(0).choices(range(VOCABULARY), k=tokens))
    quarter = tokens // 4
    spans = (((quarter,), (2 * quarter,)), ((quarter + 2,), (3 * quarter,)))
    return CuedPrompt(ids, tuple(map(str, ids)), spans)


@torch.no_grad()
def encode_all(saes: list[TopKSAE], activations: list[torch.Tensor]) -> None:
    for sae, x in zip(saes, activations, strict=True):
        torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc).topk(sae.k, sorted=False)


def measure(model: nn.Module, saes: list[TopKSAE], tokens: int, repeats: int, device: torch.device) -> None:
    names = [f"layers.{index}" for index in range(len(saes))]
    prompt = random_prompt(tokens)
    ids = torch.tensor([prompt.input_ids], device=device)
    forward = torch.no_grad()(partial(model, input_ids=ids, use_cache=False))
    with capture(model, names) as hooked:
        forward()
    encoders = partial(encode_all, saes, [hooked[name].flatten(0, 1) for name in names])
    loaders = {name: (lambda sae=sae: sae) for name, sae in zip(names, saes, strict=True)}
    extraction = partial(reasoning_latents, model, loaders, prompt)
    calls = (extraction, forward, encoders)
    for call in calls:
        call()
    turns = [[timed(call, device) for call in calls] for _ in range(repeats)]
    ours, plain, bare = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
    ratio = statistics.median(turn[0] / (turn[1] + turn[2]) for turn in turns)
    print(
        f"{tokens:,} tokens: extraction {ours:.3f} s; forward {plain:.3f} + encoders {bare:.3f} s; ratio {ratio:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--d_in", type=int, default=256)
    parser.add_argument("--num_latents", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=[150, 2000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=args.d_in,
        intermediate_size=4 * args.d_in,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    model = Qwen2ForCausalLM(config).eval().to(device)
    saes = [TopKSAE(args.d_in, args.num_latents, args.k, device=device, seed=seed) for seed in range(args.layers)]
    print(f"{args.layers} layers, d_in {args.d_in}, {args.num_latents:,} latents, k {args.k}, {device}, float32.")
    print(f"Median of {args.repeats} turns; the ratio is the median of the turns' ratios.")
    for tokens in args.tokens:
        measure(model, saes, tokens, args.repeats, device)


if __name__ == "__main__":
    main()
