"""Whether latents do anything, and whether another model has them: the tests of `resa-hf features`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import DataError, HookpointError
from ..evaluation.engine import answer
from ..evaluation.in_process import TransformersEngine
from ..features.attribution import attribute
from ..features.causal import Change, ablate, amplify, edited, put
from ..features.effects import Effect, measure_effect
from ..features.matched import latent_statistics
from ..features.matching import match_activations, match_decoders
from ..features.two_models import read_on_two
from ..models import load_causal_lm
from ..text import encode_prompt
from .features import SAE, Part, Subject, excluded, find_saes

# Answers whose log-likelihood is attributed, and latents of either kind that are ablated to check it.
_ANSWERS, _CHECKED, _STEPS = 64, 10, 8
# Tokens on which activations are matched; the null takes 800 MB for 4,096 latents of width 1,536.
_MATCHED_TOKENS = 20_000


@dataclass(frozen=True)
class OwnAnswers:
    """What the untouched model answered.

    Args:
        questions (`list[dict]`): the problems, with `prompt` and `answer`; empty where nothing was asked.
        right (`list[bool]`): whether the first answer to each is right.
        rows (`list[dict]`): `input_ids` of each problem and its first answer, and `prompt_length`, where that begins.
    """

    questions: list[dict[str, str]]
    right: list[bool]
    rows: list[dict[str, Any]]

    def halves(self) -> tuple["OwnAnswers", "OwnAnswers"]:
        """The first half, to choose latents on, and the other, to test them on.

        Raises:
            `DataError`: if there are too few for an interval on the second.
        """
        if len(self.rows) < 4:
            raise DataError(
                f"There are no reasoning latents to test, and {len(self.rows)} texts are too few to choose others on "
                "one half and test them on the other: take 4 or more, or name test_latents."
            )
        middle = len(self.rows) // 2
        first, second = (
            OwnAnswers(self.questions[part], self.right[part], self.rows[part])
            for part in (slice(middle), slice(middle, None))
        )
        return first, second


def own_answers(subject: Subject) -> OwnAnswers:
    """Answers to the held-out problems, kept in answers.jsonl; without problems, held-out text."""
    args = subject.args
    if not args.problems:
        return OwnAnswers([], [], [{"input_ids": list(row["input_ids"]), "prompt_length": 1} for row in subject.rows])
    questions = subject.questions
    prompts, golds = ([question[key] for question in questions] for key in ("prompt", "answer"))
    store = subject.folder / "answers.jsonl"
    outcomes = answer(subject.model, subject.tokenizer, prompts, golds, args.sampling(), store=store)
    # They are in the store now, with their tokens.
    engine = TransformersEngine(subject.model, subject.tokenizer, name="in process")
    completions = engine.generate(prompts, args.sampling(), store=store, progress=False)
    rows = []
    for prompt, (first, *_) in zip(prompts, completions, strict=True):
        ids = encode_prompt(prompt, subject.tokenizer)
        rows.append({"input_ids": [*ids, *first.tokens][: args.max_length], "prompt_length": len(ids)})
    return OwnAnswers(questions, outcomes.correct[:, 0].tolist(), rows)


def attribution_part(subject: Subject, hookpoint: str, answers: OwnAnswers, latents: Sequence[int]) -> Part:
    """
    What each latent contributes to the log-likelihood of the model's own answers, by gradients, and a check by real
    ablation of the `latents`, of those with the largest attribution, and of as many random ones that are active.
    """
    sae = subject.saes[hookpoint]()
    rows = _right_ones(answers)
    by_gradient, by_path = (
        torch.stack([_attributed(subject, hookpoint, sae, row, steps) for row in rows]).mean(0)
        for steps in (None, _STEPS)
    )
    active = by_gradient.nonzero().flatten()
    # Integrated gradients share out what all latents do together; they say less of one latent alone.
    largest = by_gradient.abs().topk(min(_CHECKED, len(active))).indices.tolist()
    random = np.random.default_rng(subject.args.seed).permutation(active.cpu().numpy())[:_CHECKED].tolist()
    checked = list(dict.fromkeys([*latents, *largest, *random]))
    ablated = _ablated(subject, hookpoint, sae, rows, checked)
    lines = [
        {
            "latent": latent,
            "gradient_times_activation": by_gradient[latent].item(),
            "integrated_gradients": by_path[latent].item(),
            "ablation": drop,
        }
        for latent, drop in zip(checked, ablated, strict=True)
    ]
    return {
        "answers": len(rows),
        "checked": lines,
        "largest": largest,
        "rank_correlation": {
            name: float(spearmanr([line[name] for line in lines], ablated).statistic)
            for name in ("gradient_times_activation", "integrated_gradients")
        },
    }


def _right_ones(answers: OwnAnswers) -> list[dict[str, Any]]:
    """Answers that are right, if there are any."""
    if not any(answers.right):
        return answers.rows[:_ANSWERS]
    return [row for row, right in zip(answers.rows, answers.right, strict=True) if right][:_ANSWERS]


def _log_likelihood(row: dict[str, Any]) -> Any:
    """Of the tokens behind the prompt, in nats, given logits `[1, tokens, vocabulary]`."""
    ids, start = torch.tensor(row["input_ids"]), row["prompt_length"]

    def metric(logits: Tensor) -> Tensor:
        predicted = logits[0, start - 1 : -1].float().log_softmax(-1)
        return predicted.gather(1, ids[start:, None].to(logits.device)).sum()

    return metric


def _attributed(subject: Subject, hookpoint: str, sae: SAE, row: dict[str, Any], steps: int | None) -> Tensor:
    ids = torch.tensor([row["input_ids"]], device=subject.model.device)
    return attribute(
        subject.model, hookpoint, sae, ids, _log_likelihood(row), steps=steps, excluded_token_ids=excluded(sae)
    )


@torch.no_grad()
def _ablated(
    subject: Subject, hookpoint: str, sae: SAE, rows: list[dict[str, Any]], latents: Sequence[int]
) -> list[float]:
    """Of each latent alone: untouched minus ablated, the mean over answers."""
    drops: list[list[float]] = [[] for _ in latents]
    for row in rows:
        ids, metric = torch.tensor([row["input_ids"]], device=subject.model.device), _log_likelihood(row)
        untouched = metric(subject.model(ids, use_cache=False).logits)
        for latent, of_latent in zip(latents, drops, strict=True):
            with edited(subject.model, hookpoint, sae, [latent], ablate, excluded_token_ids=excluded(sae)):
                of_latent.append(float(untouched - metric(subject.model(ids, use_cache=False).logits)))
    return [float(np.mean(of_latent)) for of_latent in drops]


def effects_part(subject: Subject, hookpoint: str, answers: OwnAnswers, latents: list[int]) -> Part:
    """Each tested latent ablated, by next-token KL; all together ablated, amplified and patched, by answers, too."""
    sae, rows = subject.saes[hookpoint](), answers.rows[:_ANSWERS]
    rates, means = latent_statistics(subject.model, hookpoint, sae, rows, excluded_token_ids=excluded(sae))
    heard = [latent for latent in latents if rates[latent]]
    edits = [(heard, name, change) for name, change in _changes(means[heard], subject.args.amplify).items() if heard]
    if len(heard) > 1:
        edits += [([latent], "ablate", ablate) for latent in heard]
    lines, unlike = [], []
    for chosen, name, change in tqdm(edits, "Editing latents", unit="edit"):
        together = chosen == heard
        try:
            effect = _effect(subject, hookpoint, sae, chosen, change, rows, answers.questions if together else [])
        except DataError as error:  # nothing like them to compare with
            unlike.append(str(error))
            continue
        lines.append({"latents": chosen, "change": name, "together": together, **asdict(effect)})
    return {
        "silent": [latent for latent in latents if not rates[latent]],
        "without_null": unlike,
        "rates": {str(latent): float(rates[latent]) for latent in latents},
        "edits": lines,
    }


def _effect(
    subject: Subject,
    hookpoint: str,
    sae: SAE,
    latents: list[int],
    change: Change,
    rows: list[dict[str, Any]],
    questions: list[dict[str, str]],
) -> Effect:
    args = subject.args
    return measure_effect(
        subject.model,
        subject.tokenizer,
        hookpoint,
        sae,
        latents,
        change,
        rows=[{"input_ids": row["input_ids"]} for row in rows],
        prompts=[question["prompt"] for question in questions],
        golds=[question["answer"] for question in questions],
        sampling=args.sampling(),
        nulls=args.nulls,
        answer_nulls=min(args.answer_nulls, args.nulls),
        seed=args.seed,
        excluded_token_ids=excluded(sae),
    )


def _changes(means: NDArray[np.float64], factor: float) -> dict[str, Change]:
    return {
        "ablate": ablate,
        f"amplify by {factor:g}": amplify(factor),
        # The value that it has where it is active, at every token.
        "patch in everywhere": put(torch.from_numpy(means)),
    }


def matching_part(subject: Subject, hookpoint: str, answers: OwnAnswers) -> Part:
    """The SAE read on the second model, and its latents matched with those of the second's own SAE.

    Activations are matched on the first 20,000 tokens at most: for each, the null holds 8 bytes a latent of the second
    SAE and 4 a dimension ([`match_activations`]).
    """
    args, sae = subject.args, subject.saes[hookpoint]()
    name = args.other_model or args.model_name_or_path
    more: dict[str, Any] = {"dtype": args.dtype, "load_in_4bit": args.load_in_4bit}
    other = load_causal_lm(name, args.other_adapter, revision=args.other_revision, **more).eval()
    torch.nn.Module.to(other, subject.model.device)
    skipped, rows = excluded(sae), answers.rows
    two = read_on_two(subject.model, other, hookpoint, sae, rows, excluded_token_ids=skipped, seed=args.seed)
    found: Part = {"read_on_two": asdict(two)}
    if args.other_saes is not None:
        theirs = find_saes(other, args.other_saes)
        if hookpoint not in theirs:
            raise HookpointError(f"{args.other_saes} has no SAE at {hookpoint}, only at {', '.join(theirs)}.")
        others, pair = theirs[hookpoint](), (hookpoint, hookpoint)
        found["same_start"] = _same_start(sae, others)
        matched = match_activations(
            *(subject.model, sae, other, others, _within(rows, _MATCHED_TOKENS)),
            hookpoints=pair,
            excluded_token_ids=skipped,
            seed=args.seed,
        )
        found["activation"] = asdict(matched)
        # The same latents: those that fire, and no more of them than can be paired.
        latents, candidates = sorted(matched.first.tolist()), sorted(matched.second.tolist())
        decoder = match_decoders(sae, others, latents=latents, candidates=candidates, seed=args.seed)
        found["decoder"] = asdict(decoder)
    return found


def _within(rows: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """The first rows, cut after so many tokens."""
    starts = accumulate((len(row["input_ids"]) for row in rows[:-1]), initial=0)
    both = zip(rows, starts, strict=True)
    return [{"input_ids": row["input_ids"][: tokens - start]} for row, start in both if start < tokens]


def _same_start(first: SAE, second: SAE) -> bool:
    """Whether both were trained from the same random weights, which alone makes decoders alike."""
    seeds = [sae.metadata.get("seed") for sae in (first, second) if not sae.metadata.get("initial_sae")]
    alike = (first.d_in, first.num_latents) == (second.d_in, second.num_latents)
    return alike and len(seeds) == 2 and seeds[0] is not None and seeds[0] == seeds[1]
