"""Memory and time of top activating examples over many tokens of the tiny reasoner.

    OMP_NUM_THREADS=1 python benchmarks/top_examples_memory.py [--tokens 1000000] [--latents 64]

The rows are chains with their traces, made while they are read; the SAE is random, of 1,024 latents at layer 2. Ten
times on the way it prints tokens, seconds and the peak of the process's resident memory so far: after the first tenth
that should stand still.
"""

import argparse
import random
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import datasets
import torch

from resa_hf.features.examples import top_examples
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.tiny import load_tiny_base, load_tiny_tokenizer
from resa_hf.tiny.task import make_problem


def peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def rows(tokenizer: Any, tokens: int) -> Iterator[dict[str, Any]]:
    rng, seen, started = random.Random(0), 0, time.perf_counter()
    report = tokens // 10
    while seen < tokens:
        problem = make_problem(rng)
        text = f"{problem.question}<think>{problem.trace}</think><answer>{problem.answer}</answer>"
        ids = tokenizer(text)["input_ids"]
        seen += len(ids)
        yield {"input_ids": ids}
        if seen >= report:
            print(f"| {seen:,} | {time.perf_counter() - started:.0f} | {peak_mb():,.0f} |", flush=True)
            report += tokens // 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="To read, at least.")
    parser.add_argument("--latents", type=int, default=64, help="To keep examples of.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_tiny_base(), load_tiny_tokenizer()
    sae = TopKSAE(model.config.hidden_size, 1024, 16)
    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"tokenizer": tokenizer, "tokens": args.tokens})
    print(f"before reading: {peak_mb():,.0f} MB\n\n| tokens | seconds | peak RSS, MB |\n|---|---|---|")
    found = top_examples(
        model,
        "layers.2",
        sae,
        stream,
        range(args.latents),
        excluded_token_ids=tokenizer.all_special_ids,
        batch_size=32,
    )
    print(f"\n{sum(map(len, found.values()))} examples of {len(found)} latents")


if __name__ == "__main__":
    main()
