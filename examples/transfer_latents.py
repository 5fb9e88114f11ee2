"""
Which latents carry the transfer from a source to a target? On the tiny reasoner.

    python examples/transfer_latents.py --output_dir runs/transfer_latents

The target learns from the source as its teacher, on CoT-free text. Meanwhile some latents of the source are held at
the values that they have in the *target* on the same tokens, the error of the SAE kept: what the source does
differently through these latents is gone from the teacher, and nothing else. The latents are those that account for
most of KL(source || target) by attribution patching (huggingface.co/papers/2310.10348), as many random ones that fire
(the null; those that account for most fire so often that none match them in that), or all of them. Each with five
seeds: SAE, latents, adapter and answers are made anew.

Takes about 10 minutes on 2 idle CPU cores; prints one table, and leaves `report.md` and `report.json`.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from resa_hf.arguments import LoraArguments
from resa_hf.data import hold_out, load_qa
from resa_hf.evaluation.comparison import Answers, compare
from resa_hf.evaluation.engine import Sampling, answer
from resa_hf.evaluation.tables import markdown, plain, points
from resa_hf.features.causal import activations
from resa_hf.features.matched import latent_statistics
from resa_hf.features.reading import decoder_rows
from resa_hf.hookpoints import backbone, splice
from resa_hf.sae.config import SAETrainingConfig
from resa_hf.sae.dataset import padded_batches
from resa_hf.sae.trainer import SAETrainer
from resa_hf.text import add_text, evaluation_prompt, tokenize_documents
from resa_hf.tiny import load_tiny_base, load_tiny_source, load_tiny_tokenizer
from resa_hf.tuning.config import SAETuningConfig
from resa_hf.tuning.trainer import SAETuningTrainer

HOOKPOINT, SEEDS, SIZES = "layers.2", range(5), (8, 32, 128)
SAMPLING = {"temperature": 1.0, "max_new_tokens": 64, "batch_size": 250}


@contextmanager
def held_at_target(
    source: PreTrainedModel, target: PreTrainedModel, sae: Any, latents: Sequence[int]
) -> Iterator[None]:
    """Every forward of the source's backbone has those latents at the target's values on the same tokens."""
    rows, chosen, held = decoder_rows(sae, latents), list(latents), {}

    def look(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        with torch.no_grad():
            held["z"] = sae.encode(activations(target, HOOKPOINT, ids, mask))[..., chosen]

    hook = backbone(source).register_forward_pre_hook(look, with_kwargs=True)
    try:
        with splice(source, HOOKPOINT, lambda x: x + (held["z"] - sae.encode(x)[..., chosen]) @ rows):
            yield
    finally:
        hook.remove()


def divergence(source: PreTrainedModel, target: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The sum of KL(source || target) over the positions of a batch that are no padding."""
    teacher, student = source(**batch).logits.log_softmax(-1), target(**batch).logits.log_softmax(-1)
    kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return (teacher.exp() * (teacher - student)).sum(-1)[kept].sum()


def attributed(source: PreTrainedModel, target: PreTrainedModel, sae: Any, rows: Dataset) -> Tensor:
    """By how much KL(source || target) would fall, to first order, with each latent at the target's value."""
    falls = torch.zeros(sae.num_latents)
    for batch in padded_batches(rows, 64, torch.device("cpu")):
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        with torch.no_grad():
            x = activations(source, HOOKPOINT, ids, mask)
            change = sae.encode(activations(target, HOOKPOINT, ids, mask)) - sae.encode(x)
        point = x.clone().requires_grad_()
        with splice(source, HOOKPOINT, lambda _, point=point: point):
            (gradient,) = torch.autograd.grad(divergence(source, target, batch), point)
        falls -= (change * (gradient @ decoder_rows(sae, range(sae.num_latents)).T)).sum((0, 1))
    return falls


def transferred(
    source: PreTrainedModel, train: Dataset, tokenizer: PreTrainedTokenizerBase, seed: int, folder: Path
) -> PreTrainedModel:
    """The target after 40 steps with the source as it is now as its teacher."""
    args = SAETuningConfig(
        str(folder), kl_reference="source", learning_rate=1e-3, max_steps=40, per_device_train_batch_size=24,
        max_length=128, packing=False, seed=seed, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    lora = LoraArguments(16, 64, 0.0).lora_config()
    trainer = SAETuningTrainer(
        load_tiny_base(), args, train, processing_class=tokenizer, source_model=source, peft_config=lora
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model.eval()


def sets_of_latents(
    source: PreTrainedModel, target: PreTrainedModel, sae: Any, rows: Dataset, seed: int
) -> dict[str, list[int]]:
    """The latents to hold at the target's values, by the arm's name."""
    falls = attributed(source, target, sae, rows)
    rates, _ = latent_statistics(source, HOOKPOINT, sae, rows)
    rng = np.random.default_rng(seed)
    active = np.flatnonzero(rates > 0)
    order = active[np.argsort(-falls.numpy()[active], kind="stable")]
    found = {f"all {sae.num_latents} latents": list(range(sae.num_latents))}
    for size in SIZES:
        top = order[:size].tolist()
        found[f"the {size} that account for most"] = top
        found[f"{size} random ones"] = rng.choice(np.setdiff1d(active, top), size, replace=False).tolist()
    return found


def tell(folder: Path, right: dict[str, list[Any]], left: dict[str, list[float]]) -> None:
    """Prints and writes the table of what was `right`, by arm and seed, and of the divergence `left`."""
    whole = np.array(left["the whole teacher"])
    answers = [Answers(name, {"held-out": seeds}) for name, seeds in right.items() if len(seeds) == len(SEEDS)]
    signal = [np.mean(np.array(left[line.name]) / whole) for line in answers]
    results = compare(answers[0], answers[1:], margin=0.02)
    against = {line.name: line.difference for line in compare(answers[1], [answers[0], *answers[2:]], margin=0.02)}
    rows = [
        [
            line.name,
            *points(line.accuracy),
            *points(line.difference, sign=True),
            *points(against[line.name], sign=True),
        ]
        for line in results
    ]
    head = ["held at the target's values", "accuracy %", "95% interval", "minus base", "95% interval"]
    head += ["minus the whole teacher", "95% interval", "KL left in the teacher"]
    table = markdown(head, [[*row, f"{share:.0%}"] for row, share in zip(rows, signal, strict=True)])
    (folder / "report.md").write_text(f"# Which latents carry the transfer\n\n{table}\n")
    (folder / "report.json").write_text(
        json.dumps({"arms": [plain(line) for line in results], "left": left}, indent=1)
    )
    print(f"\n{table}\n\nReport: {folder / 'report.md'}, report.json.")


def main() -> None:
    """Runs all arms and prints their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/transfer_latents"))
    folder: Path = parser.parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, source, target = load_tiny_tokenizer(), load_tiny_source(), load_tiny_base()
    train, held_out = hold_out(load_qa("tiny-reasoner", limit=3000)[0], 500, 0)
    train, others = hold_out(train, 250, 0)
    tokens, measured = (
        tokenize_documents(add_text(part, template="chat", tokenizer=tokenizer), tokenizer, 128)[0]
        for part in (train, others)
    )
    prompts = [evaluation_prompt(row["problem"], template="chat", tokenizer=tokenizer) for row in held_out]
    right: dict[str, list[Any]] = {}
    left: dict[str, list[float]] = {}
    for seed in SEEDS:
        args = SAETrainingConfig(
            str(folder / "sae"), hookpoints=[HOOKPOINT], num_latents=1024, k=16, sae_optimizer="adam",
            learning_rate=1e-3, max_length=128, per_device_train_batch_size=24, num_train_epochs=1, seed=seed,
            save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        stage1 = SAETrainer(source, args, tokens, processing_class=tokenizer)
        stage1.remove_callback(PrinterCallback)
        stage1.train()
        sae = stage1.saes[HOOKPOINT].requires_grad_(False)
        arms = {"base": None, "the whole teacher": [], **sets_of_latents(source, target, sae, measured, seed)}
        for name, latents in arms.items():
            with held_at_target(source, target, sae, latents) if latents else nullcontext(), torch.no_grad():
                batches = list(padded_batches(measured, 64, torch.device("cpu")))
                left.setdefault(name, []).append(sum(float(divergence(source, target, batch)) for batch in batches))
            with held_at_target(source, target, sae, latents) if latents else nullcontext():
                tuned = target if latents is None else transferred(source, tokens, tokenizer, seed, folder / "run")
            outcomes = answer(
                tuned, tokenizer, prompts, held_out["answer"], Sampling(seed=seed, **SAMPLING), progress=False
            )
            right.setdefault(name, []).append(outcomes.correct)
            print(f"seed {seed}, {name}: {outcomes.correct.mean():.1%}", flush=True)
    tell(folder, right, left)


if __name__ == "__main__":
    main()
