"""Text that a model writes for a run: its answers to the training questions, which arms may be trained on."""

from dataclasses import replace
from typing import Any

import torch

from ..errors import DataError
from ..evaluation.in_process import TransformersEngine
from ..evaluation.scoring import score
from ..evaluation.store import stored_seconds
from ..models import load_tokenizer
from ..precision import runnable_device
from ..provenance import base_revisions, source_revisions
from ..text import encode_prompt, rows_of_tokens
from .arms import SOURCE
from .folder import RunFolder, write_json
from .loading import load_source, load_target
from .prepare import save_rows, training_questions
from .settings import RunSettings

TEXT, TOKENS, ANSWERS = "text.json", "tokens", "answers.jsonl"


def sample_text(folder: RunFolder, settings: RunSettings, text: str, seed: int) -> None:
    """Lets a model answer each training question once, and writes rows of tokens from that, unless they are there.

    Args:
        folder (`RunFolder`): of the run; an interrupted call goes on with the answers that are in it.
        settings (`RunSettings`): the run's; answers are sampled as those of the verdict are.
        text (`str`): who answers: `"source"`, of whose answers those that are right and not truncated are kept, or
            `"target"`, untouched, whose answers are all kept.
        seed (`int`): of the run, one of `seeds`.

    Raises:
        `DataError`: if no answer is kept, or those that are do not fill one row.
    """
    place = folder.text(text, seed)
    if (place / TEXT).is_file():
        return
    run = settings.run
    tokenizer = load_tokenizer(run.model_name_or_path, revision=run.model_revision)
    questions = training_questions(run, tokenizer)
    model = load_source(run) if text == SOURCE else load_target(run)
    torch.nn.Module.to(model, runnable_device(bool(settings.stage2.get("use_cpu", False))))
    sampling = replace(settings.sampling, samples=1, seed=settings.sampling.seed + seed)
    prompts = [question["prompt"] for question in questions]
    engine = TransformersEngine(model, tokenizer, name=text)
    written = [row[0] for row in engine.generate(prompts, sampling, store=place / ANSWERS)]
    kept = [
        # The very tokens: decoded and encoded again, some would be others. Whole answers end as the model ends them.
        [*encode_prompt(prompt, tokenizer), *completion.tokens]
        for prompt, question, completion in zip(prompts, questions, written, strict=True)
        if text != SOURCE or (not completion.truncated and score("math", completion.text, question["answer"])[0])
    ]
    if not kept:
        raise DataError(
            f"Of {len(prompts):,} training questions the {text} answered none rightly within "
            f"{sampling.max_new_tokens:,} tokens, so there is no text to train on. Give more rows or a higher "
            "sampling.max_new_tokens."
        )
    tokens, counted = rows_of_tokens(kept, int(settings.stage2.get("max_length", 2048)), pack=run.pack)
    save_rows(tokens, place / TOKENS)
    report: dict[str, Any] = {
        "asked": len(prompts),
        "kept": len(kept),
        "tokens": sum(completion.length for completion in written),
        "seconds": stored_seconds(place / ANSWERS),
        "describe": counted.describe(),
        "revisions": source_revisions(run, run) if text == SOURCE else base_revisions(run),
    }
    write_json(place / TEXT, report)
