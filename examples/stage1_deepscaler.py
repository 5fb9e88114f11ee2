"""
Stage I on real text: three SAEs in one pass over the source model, beside the same three trained one after the other.

    python examples/stage1_deepscaler.py deepscaler_train.parquet --output_dir runs/stage1_deepscaler

The file holds DeepScaleR's rows, with the columns `problem` and `answer`. The source model is random, so that nothing
has to be downloaded: 4 layers of width 256 in Qwen2's architecture, with a BPE tokenizer of 4,096 tokens trained on
the rows. It says how fast Stage I is and that it learns, not what a trained model's features are. Takes about 5
minutes on 2 idle CPU cores (on busy ones set OMP_WAIT_POLICY=passive, or threads that wait for each other cost far
more); prints held-out FVU and tokens/s, and leaves `report.json`, `fvu.png` and the SAEs.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM

from resa_hf.data import hold_out, load_qa
from resa_hf.sae.config import SAETrainingConfig
from resa_hf.sae.trainer import SAETrainer
from resa_hf.text import R1_PROMPT, cot_free_text, tokenize_and_pack

ROWS, HELD_OUT_ROWS = 20_000, 250
VOCABULARY, WIDTH, CHUNK, BATCH = 4096, 256, 256, 16
LATENTS, K = 4096, 32
HOOKPOINTS = ["layers.0", "layers.1", "layers.2"]
EVALUATIONS = 8


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parquet", type=Path, help="DeepScaleR's rows, with the columns problem and answer")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/stage1_deepscaler"))
    parser.add_argument("--tokens", type=int, default=600_000, help="tokens to train on (default: 600,000)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def texts(rows: Dataset) -> list[str]:
    """CoT-free text of the rows, without the system prompt: repeated in each, it would make FVU look good."""
    pairs = zip(rows["problem"], rows["answer"], strict=True)
    return [cot_free_text(problem, answer, template="paper").removeprefix(R1_PROMPT) for problem, answer in pairs]


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 4,096 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def make_source_model(seed: int) -> Qwen2ForCausalLM:
    """A random model of Qwen2's architecture."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CHUNK,
    )
    return Qwen2ForCausalLM(config).eval()


def run(
    model: Qwen2ForCausalLM, hookpoints: list[str], data: tuple[Dataset, Dataset], steps: int, args: argparse.Namespace
) -> tuple[SAETrainer, float]:
    """Trains SAEs in one pass; returns the trainer and the seconds spent, evaluations left out."""
    config = SAETrainingConfig(
        output_dir=str(args.output_dir / "+".join(hookpoints)),
        hookpoints=hookpoints,
        num_latents=LATENTS,
        k=K,
        max_length=CHUNK,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        max_steps=steps,
        eval_strategy="steps",
        eval_steps=steps // EVALUATIONS,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    )
    trainer = SAETrainer(model, config, *data)
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    evaluations = (entry["eval_runtime"] for entry in trainer.state.log_history if "eval_runtime" in entry)
    trainer.save_model()
    return trainer, seconds - sum(evaluations)


def curve(trainer: SAETrainer, hookpoint: str) -> list[tuple[int, float]]:
    """Held-out FVU after so many tokens."""
    key = f"eval_fvu/{hookpoint}"
    history = trainer.state.log_history
    return [(int(entry["step"]) * BATCH * CHUNK, entry[key]) for entry in history if key in entry]


def plot(report: dict[str, Any], path: Path) -> None:
    """Held-out FVU over tokens: lines for one pass, crosses for one after the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, hookpoint in enumerate(HOOKPOINTS):
        together, alone = (report[way]["held_out_fvu"][hookpoint] for way in ("one_pass", "one_after_the_other"))
        axes.plot(*zip(*together, strict=True), color=f"C{index}", label=hookpoint)
        axes.plot(*zip(*alone, strict=True), "x", color=f"C{index}")
    speeds = [report[way]["tokens_per_second"] for way in ("one_pass", "one_after_the_other")]
    axes.set_title(f"One pass (lines): {speeds[0]:,.0f} tokens/s. One after the other (crosses): {speeds[1]:,.0f}")
    axes.set_xlabel("tokens")
    axes.set_ylabel("held-out FVU")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(args: argparse.Namespace) -> None:
    """Runs both ways and compares them."""
    rows, qa_report = load_qa(args.parquet, limit=ROWS)
    print(qa_report.describe())
    train_rows, held_out_rows = hold_out(rows, HELD_OUT_ROWS, args.seed)
    tokenizer = train_tokenizer(texts(train_rows))
    packed = [
        tokenize_and_pack(Dataset.from_dict({"text": texts(part)}), tokenizer, CHUNK)
        for part in (train_rows, held_out_rows)
    ]
    for name, (_, token_report) in zip(("training", "held out"), packed, strict=True):
        print(f"{name}: {token_report.describe()}")
    data = (packed[0][0], packed[1][0])
    steps = EVALUATIONS * max(1, args.tokens // (EVALUATIONS * BATCH * CHUNK))
    tokens = steps * BATCH * CHUNK
    model = make_source_model(args.seed)

    together, seconds_together = run(model, HOOKPOINTS, data, steps, args)
    alone, seconds_alone, difference = {}, 0.0, 0.0
    for hookpoint in HOOKPOINTS:
        alone[hookpoint], seconds = run(model, [hookpoint], data, steps, args)
        seconds_alone += seconds
        pairs = zip(together.saes[hookpoint].parameters(), alone[hookpoint].saes[hookpoint].parameters(), strict=True)
        difference = max([difference, *((one - other).abs().max().item() for one, other in pairs)])

    report: dict[str, Any] = {
        "settings": {
            "tokens": tokens,
            "latents": LATENTS,
            "k": K,
            "seed": args.seed,
            "threads": torch.get_num_threads(),
        },
        "data": {"training": vars(packed[0][1]), "held_out": vars(packed[1][1])},
        "one_pass": {
            "seconds": seconds_together,
            "tokens_per_second": tokens / seconds_together,
            "held_out_fvu": {hookpoint: curve(together, hookpoint) for hookpoint in HOOKPOINTS},
        },
        "one_after_the_other": {
            "seconds": seconds_alone,
            "tokens_per_second": tokens / seconds_alone,
            "held_out_fvu": {hookpoint: curve(alone[hookpoint], hookpoint) for hookpoint in HOOKPOINTS},
        },
        "largest_difference_of_a_weight": difference,
    }
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=2))
    plot(report, args.output_dir / "fvu.png")
    for way in ("one_pass", "one_after_the_other"):
        result: dict[str, Any] = report[way]
        print(f"{way.replace('_', ' ')}: {result['seconds']:.0f} s, {result['tokens_per_second']:,.0f} tokens/s")
        for hookpoint in HOOKPOINTS:
            points = "  ".join(f"{seen:,}: {fvu:.4f}" for seen, fvu in result["held_out_fvu"][hookpoint])
            print(f"  {hookpoint}  held-out FVU after tokens  {points}")
    print(f"largest difference of a weight between the two ways: {difference:g}")
    print(f"results: {args.output_dir}")


if __name__ == "__main__":
    main(make_parser().parse_args())
