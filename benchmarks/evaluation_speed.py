"""Tokens a second of our in-process engine and of lighteval's accelerate backend, on the tiny reasoner.

    OMP_NUM_THREADS=1 python -m benchmarks evaluate [--problems 64] [--repeats 5]

Same model, prompts, temperature and limit; the two take turns. Counted are the tokens up to and with the end token,
over the seconds from the documents to the decoded texts; loading and scoring are left out. "At once" is the number of
completions in a batch: lighteval's batch size is in problems, each with all of its samples. Its default is to look for
the largest batch that fits, and the time for that counts, as every user of the default waits for it.

lighteval's backend samples only if generation_config.json has `do_sample: true`, so it is given such a copy. With one
problem a batch it stops all samples when the first has ended, so that is not compared.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

with torch.set_grad_enabled(torch.is_grad_enabled()):  # importing it switches autograd off
    from lighteval.models.model_input import GenerationParameters
    from lighteval.models.transformers.transformers_model import TransformersModel, TransformersModelConfig
    from lighteval.tasks.requests import Doc, SamplingMethod

from resa_hf.evaluation.engine import Sampling
from resa_hf.evaluation.in_process import TransformersEngine
from resa_hf.models import load_causal_lm, load_tokenizer
from resa_hf.text import evaluation_prompt
from resa_hf.tiny import tiny_path
from resa_hf.tiny.task import make_rows

LIMIT = 256
Measured = tuple[int, float]  # tokens, seconds


def sampling_base(folder: Path) -> Path:
    """A copy of the base whose generation_config.json lets lighteval sample."""
    shutil.copytree(tiny_path("base"), folder / "base")
    path = folder / "base" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True}))
    return folder / "base"


def stock(folder: Path, problems: list[str], temperature: float, samples: int, at_once: int | None) -> Measured:
    config = TransformersModelConfig(
        model_name=str(folder),
        batch_size=None if at_once is None else at_once // samples,
        device="cpu",
        dtype="float32",
        model_parallel=False,
        cache_dir=tempfile.mkdtemp(dir=folder.parent),
        generation_parameters=GenerationParameters(temperature=temperature, top_p=1.0),
    )
    model = TransformersModel(config)
    shared = {
        "task_name": "speed|0",
        "choices": ["0"],
        "gold_index": 0,
        "generation_size": LIMIT,
        "stop_sequences": [],
    }
    docs = [
        Doc(query=text, id=str(i), num_samples=samples, sampling_methods=[SamplingMethod.GENERATIVE], **shared)
        for i, text in enumerate(problems)
    ]
    started = time.perf_counter()
    responses = TransformersModel.greedy_until.__wrapped__(model, docs)  # without the cache of predictions
    seconds = time.perf_counter() - started
    end = model.tokenizer.eos_token_id
    rows = [row.tolist() for response in responses for row in response.output_tokens]
    return sum(row.index(end) + 1 if end in row else len(row) for row in rows), seconds


def ours(folder: Path, problems: list[str], temperature: float, samples: int, at_once: int | None) -> Measured:
    engine = TransformersEngine(load_causal_lm(str(folder), dtype=torch.float32), load_tokenizer(str(folder)))
    size = {} if at_once is None else {"batch_size": at_once}
    sampling = Sampling(temperature=temperature, samples=samples, max_new_tokens=LIMIT, **size)
    started = time.perf_counter()
    prompts = [evaluation_prompt(text, template="chat", tokenizer=engine.tokenizer) for text in problems]
    completions = engine.generate(prompts, sampling, progress=False)
    seconds = time.perf_counter() - started
    return sum(completion.length for row in completions for completion in row), seconds


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks evaluate", description=__doc__)
    parser.add_argument("--preset", choices=["cpu"], default="cpu", help="The tiny reasoner needs no GPU.")
    parser.add_argument("--problems", type=int, default=64, help="Of the tiny reasoner's task.")
    parser.add_argument("--repeats", type=int, default=5, help="Turns of each.")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = sampling_base(Path(folder))
        for temperature, samples, many in ((1.0, 16, 1), (0.0, 1, 4)):
            problems = [row["problem"] for row in make_rows(many * args.problems, seed=7)]
            for at_once in (64, 256, None):
                rates: dict[str, list[float]] = {"stock": [], "ours": []}
                for _ in range(args.repeats):
                    for name, run in (("stock", stock), ("ours", ours)):
                        tokens, seconds = run(base, problems, temperature, samples, at_once)
                        rates[name].append(tokens / seconds)
                middle = {name: statistics.median(found) for name, found in rates.items()}
                cells = [f"{middle[name]:,.0f} (best {max(rates[name]):,.0f})" for name in ("stock", "ours")]
                ratio = f"{middle['ours'] / middle['stock']:.2f}"
                rows.append([f"{temperature:g}", f"{samples}", str(at_once or "default"), *cells, ratio])
    print("| temperature | samples | at once | lighteval, tokens/s | ours, tokens/s | ratio of medians |")
    print("|---|---|---|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
