"""Build the tiny reasoner's weights anew.

Usage:

    python -m resa_hf.tiny.build [--output_dir DIR] [--seed 0]

It trains the base and then, by GRPO, the source, and measures both from the stored bfloat16 weights. One thread of a
busy two-core machine took 16 minutes. Other machines, versions or thread counts may round otherwise and give other
weights.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Final

import torch
import transformers
import trl
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, Qwen2ForCausalLM, Qwen2Tokenizer

from resa_hf.tiny import pretrain, reinforce, task
from resa_hf.tiny.measure import Accuracy, measure
from resa_hf.tiny.tokenizer import build_tokenizer

# A name, not a path: the adapter's folder must mean the same on every machine.
BASE_NAME: Final = "resa_hf/tiny/base"


def save_base(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Write the model in bfloat16 and its tokenizer. `model` is cast in place."""
    model.bfloat16()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # safetensors writes 0600; packaged so, the weights could not be read by other users of an installation.
    (folder / "model.safetensors").chmod(0o644)


def save_source(model: PeftModel, folder: Path) -> None:
    """Write the adapter in bfloat16, naming its base by `BASE_NAME`."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    # PEFT writes a card with this machine's paths; the one for both folders is written beside them.
    (folder / "README.md").unlink(missing_ok=True)
    weights = folder / "adapter_model.safetensors"
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = BASE_NAME
    # A set in PEFT: without an order of our own the file would differ between equal builds.
    config["target_modules"] = sorted(config["target_modules"])
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _load_base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _measure_all(
    output_dir: Path, tokenizer: Qwen2Tokenizer, count: int, exclude: frozenset[str]
) -> dict[str, Accuracy]:
    """Accuracies of the stored weights in float32, by a row's label in the card."""
    problems = task.make_problems(count, task.MEASURE_SEED, exclude)
    base = _load_base(output_dir / "base")
    source = PeftModel.from_pretrained(_load_base(output_dir / "base"), str(output_dir / "source")).merge_and_unload()
    results = {}
    for name, model in (("base", base), ("source", source)):
        for label, temperature in (("temperature 1", 1.0), ("greedy", 0.0)):
            results[f"{name}, {label}"] = measure(model, tokenizer, problems, temperature=temperature)
            print(f"{name}, {label}: {results[f'{name}, {label}']}", flush=True)
    return results


def model_card(results: dict[str, Accuracy], seed: int, base_count: int, source_count: int) -> str:
    """The card of both folders, as Markdown."""
    rows = "\n".join(
        f"| {label} | {r.accuracy:.4f} | {r.standard_error:.4f} | {r.traced:.2f} | {r.count} |"
        for label, r in results.items()
    )
    return f"""# The tiny reasoner

Two models for trying SAE-Tuning (huggingface.co/papers/2506.09967) without network or GPU. They do modular arithmetic
such as `7*4-2+8 mod 10`, read from left to right, and nothing else.

- `base/`: a Qwen2 model of about 1M parameters (hidden 128, 4 layers, 4 heads, 2 key-value heads), bfloat16, with its
  tokenizer. {pretrain.SKIP_TRACE:.0%} of its training text skips the trace, so it reasons only sometimes.
- `source/`: a LoRA adapter on that base (r 16, alpha 64, bfloat16), trained by GRPO with a reward for correct answers
  alone, as Tina does (huggingface.co/papers/2504.15777).

Both were trained on single documents only, never on text with other documents packed before it.

Built by `python -m resa_hf.tiny.build --seed {seed}` (CPU, OMP_NUM_THREADS={torch.get_num_threads()}, torch
{torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}). Problems of `resa_hf.tiny.task`:

| used for | made by | problems |
|---|---|---|
| training the base | `base_problems(seed={seed})`: seed {task.BASE_SEED + seed} | {base_count} |
| training the source | `source_problems(seed={seed})`: seed {task.SOURCE_SEED + seed} | {source_count} |
| the table below | seed {task.MEASURE_SEED}, without the questions above | see n |

`training_questions()` gives the questions of the first two rows for seed 0; keep them out of any test.

Accuracy of the stored weights, loaded in float32, one reply of at most 64 tokens a problem. "Traced" is the share of
replies that write partial results out.

| model | accuracy | standard error | traced | n |
|---|---|---|---|---|
{rows}
"""


def build(
    output_dir: Path,
    seed: int = 0,
    base_count: int = task.BASE_COUNT,
    source_count: int = task.SOURCE_COUNT,
    measure_count: int = 2000,
) -> dict[str, Accuracy]:
    """Train, store and measure base and source.

    Args:
        output_dir (`Path`): gets `base/`, `source/` and `README.md`; what they held before is replaced.
        seed (`int`, *optional*, defaults to `0`): of the problems, initialisations and sampling.
        base_count (`int`, *optional*, defaults to `64000`): problems to train the base on, 64 a step.
        source_count (`int`, *optional*, defaults to `800`): problems to train the source on, 8 a step.
        measure_count (`int`, *optional*, defaults to `2000`): problems to measure each model on.

    Returns:
        `dict[str, Accuracy]`: accuracies by model and decoding, for example `"base, temperature 1"`.

    Raises:
        `ValueError`: if a count is less than one training step, or no problem is left to measure on.
    """
    for name, count, least in (
        ("base_count", base_count, pretrain.BATCH_SIZE),
        ("source_count", source_count, reinforce.PROMPTS_PER_STEP),
        ("measure_count", measure_count, 1),
    ):
        if count < least:
            raise ValueError(f"{name} must be at least {least}, got {count}")
    started = time.monotonic()
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    base_problems = task.base_problems(base_count, seed)
    source_problems = task.source_problems(source_count, seed)

    save_base(pretrain.train_base(tokenizer, base_problems, seed), tokenizer, output_dir / "base")
    # From the stored weights, so that the adapter is trained on the very base that ships.
    source = reinforce.train_source(_load_base(output_dir / "base"), tokenizer, source_problems, seed)
    save_source(source, output_dir / "source")

    seen = frozenset(problem.question for problem in base_problems + source_problems)
    results = _measure_all(output_dir, tokenizer, measure_count, seen)
    card = model_card(results, seed, base_count, source_count)
    (output_dir / "README.md").write_text(card, encoding="utf-8")
    print(f"built in {time.monotonic() - started:.0f} s: {output_dir}", flush=True)
    return results


def make_parser() -> argparse.ArgumentParser:
    """The command line: where to write, and the seed."""
    parser = argparse.ArgumentParser(
        prog="python -m resa_hf.tiny.build", description="Build the tiny reasoner's weights."
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("tiny-reasoner"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of problems, training and sampling (default: %(default)s)"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    build(args.output_dir, args.seed)


if __name__ == "__main__":
    main()
