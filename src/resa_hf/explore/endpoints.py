"""What the explorer's page shows and its API answers: plain values in; HTML, and the same as plain values, out."""

import contextlib
import reprlib
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ExploreError
from .html import answer_html, examples_html, table_html, tokens_html
from .layers import layers_html
from .results import adapters_of, find_results, hub_result, recipe_of, result_html, saes_of
from .values import checked_text, checked_whole

if TYPE_CHECKING:
    from .accuracy import Measured
    from .bench import SAE, Workbench
    from .solving import Solution, Written

TINY, SOURCE = "tiny reasoner", "source (LoRA and GRPO)"
PROBLEM = "8+7*1*8 mod 10"
_MAX_PARAMETERS = 2_000_000_000  # three such models in bfloat16 fit into a free Space's 16 GB
_LONGEST = 1_000  # characters of a name
_EXAMPLE_TEXTS = 64  # in which examples of a latent are looked for, while other visitors wait
_PAUSE = 0.05  # seconds between two pictures of a text that grows

Step = TypeVar("Step")
Plain = dict[str, Any]


class Explorer:
    """The tiny reasoner, results on this machine, and whatever is public on the Hub, for visitors who share them.

    Torch and all that it brings are imported when a model is first needed, not before. Each method that runs a model
    raises what is wrong with a visitor's values as `ExploreError`, `HookpointError`, `IncompatibleSAEError`,
    `IncompatibleAdapterError` or, if the Hub does not answer, `ConnectionError`.

    Args:
        folders (sequence of `Path`):
            Outputs of resa-hf; their reports, adapters and SAEs are offered.
        models, adapters, saes (iterables of `str`, *optional*):
            Names on the Hub to offer besides; gated and private ones, too, if this process may read them.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        *,
        models: Iterable[str] = (),
        adapters: Iterable[str] = (),
        saes: Iterable[str] = (),
    ) -> None:
        self.results = {result.label: result for result in find_results(folders)}
        self.models: dict[str, str | Path] = {name: name for name in models}
        self.adapters: dict[str, str | Path] = {name: name for name in adapters}
        self.saes: dict[str, str | Path] = {name: name for name in saes}
        self.models[TINY], self.adapters[SOURCE] = "resa_hf/tiny/base", "resa_hf/tiny/source"
        for result in self.results.values():
            self.adapters |= adapters_of(result)
            self.saes |= saes_of(result)
        self._making = threading.Lock()

    @property
    def bench(self) -> "Workbench":
        """What is loaded."""
        with self._making:
            return self._bench

    @cached_property
    def _bench(self) -> "Workbench":
        from .bench import Workbench

        return Workbench(self.models | self.adapters | self.saes, max_parameters=_MAX_PARAMETERS)

    def warm_up(self) -> None:
        """Imports and loads what the first visitor would wait for."""
        for _ in self.solve(TINY, [SOURCE], 1, PROBLEM):
            pass

    def solve(
        self,
        model: str,
        adapters: list[str],
        strength: float,
        problem: str,
        right_answer: str = "",
        seed: int = 0,
        temperature: float = 1.0,
        max_new_tokens: int = 512,
    ) -> Iterator[tuple[str, str, Plain]]:
        """Solves a problem with the model, and with its adapters; streams what both write, and judges it."""
        from .solving import solve

        sampling: Plain = {"seed": seed, "temperature": temperature, "max_new_tokens": max_new_tokens}
        strengths = _strengths(adapters, strength)
        for solution in _paced(solve(self.bench, model, strengths, problem, gold=right_answer or "", **sampling)):
            yield _both(solution)

    def accuracy(
        self,
        model: str,
        adapters: list[str],
        strength: float,
        problems: str = "",
        count: int = 50,
        seed: int = 0,
        temperature: float = 1.0,
        max_new_tokens: int = 512,
    ) -> Iterator[tuple[str, Plain]]:
        """Answers problems without and with the adapters: accuracies with 95% intervals, and the verdict."""
        from .accuracy import measure, problems_from_text, tiny_problems

        if str(problems or "").strip():
            chosen = problems_from_text(problems)
        elif model == TINY:
            chosen = tiny_problems(count, seed)
        else:
            raise ExploreError("Paste problems for this model to answer: only the tiny reasoner has some of its own.")
        sampling: Plain = {"seed": seed, "temperature": temperature, "max_new_tokens": max_new_tokens}
        strengths = _strengths(adapters, strength)
        for found in _paced(measure(self.bench, model, strengths, problems=chosen, **sampling)):
            yield _measured(found), vars(found)

    def look(
        self,
        model: str,
        adapters: list[str],
        strength: float,
        sae: str,
        hookpoint: str,
        text: str,
        token: int | None = None,
        latent: int | None = None,
    ) -> tuple[str, str, Plain]:
        """Colours the tokens of a text by a latent, and lists the strongest latents of a token or of the text."""
        from .latents import MOST_CHARACTERS, read
        from .writing import checked_strengths

        text = checked_text("The text", text, MOST_CHARACTERS)
        strengths = _strengths(adapters, strength)
        where, loaded = self._sae(sae, hookpoint)
        opened = self.bench.open(model, list(strengths))
        with opened.lock, opened.at_strengths(checked_strengths(strengths)) as tuned:
            reading = read(tuned, opened.tokenizer, where, loaded, text)
        if token is not None:
            token = checked_whole("token", token, 0, len(reading.tokens) - 1)
        strongest = reading.strongest(token)
        if latent is None:
            latent = strongest[0][0] if strongest else 0
        latent = _latent(latent, loaded)
        values = reading.of_latent(latent)
        shown = tokens_html(reading.tokens, values, chosen=token, caption=f"Latent {latent} at {where}")
        title = f"Strongest latents {'of the text' if token is None else f'of token {token}'}"
        table = table_html(["latent", "value"], [[str(one), value] for one, value in strongest], title)
        plain = {"hookpoint": where, "tokens": reading.tokens, "latent": latent, "values": values}
        return shown, table, plain | {"strongest": strongest}

    def latent(self, model: str, sae: str, hookpoint: str, latent: int | None) -> tuple[str, str, Plain]:
        """A latent's top activating examples in the tiny reasoner's texts, and its decoder's nearest tokens."""
        from .latents import look_up, tiny_texts

        where, loaded = self._sae(sae, hookpoint)
        number, opened = _latent(latent, loaded), self.bench.open(model)
        with opened.lock:
            found = look_up(opened.base, opened.tokenizer, where, loaded, number, tiny_texts(_EXAMPLE_TEXTS))
        examples = [(tokens, one.values) for tokens, one in zip(found.tokens, found.examples, strict=True)]
        name = f"latent {number} at {where}"
        words = table_html(["token", "logit"], [list(row) for row in found.promoted], f"Nearest to {name}")
        plain = {"examples": [{"tokens": tokens, "values": values} for tokens, values in examples]}
        return examples_html(examples, caption=f"Top examples of {name}"), words, plain | {"nearest": found.promoted}

    def change(
        self,
        model: str,
        adapters: list[str],
        strength: float,
        sae: str,
        hookpoint: str,
        latent: int | None,
        factor: float,
        problem: str,
        seed: int = 0,
        temperature: float = 1.0,
        max_new_tokens: int = 512,
    ) -> Iterator[tuple[str, str, Plain]]:
        """Solves a problem twice, the second time with a latent multiplied by the factor: 0 ablates it."""
        from .solving import Change, solve

        number = _latent(latent, self._sae(sae, hookpoint)[1])
        edit = Change(sae, _hookpoint(hookpoint), (number,), factor)
        sampling: Plain = {"seed": seed, "temperature": temperature, "max_new_tokens": max_new_tokens}
        strengths = _strengths(adapters, strength)
        for solution in _paced(solve(self.bench, model, strengths, problem, change=edit, **sampling)):
            yield _both(solution)

    def layers(self) -> str:
        """Reasoning latents and their mixture, quality of the SAEs, and scores, by layer."""
        return layers_html(list(self.results.values()))

    def report(self, result: str) -> tuple[str, str]:
        """The report of a result that is offered, or of a repository on the Hub, and the recipe that repeats it."""
        found = self.results.get(result) if isinstance(result, str) else None
        found = found or hub_result(result or "")
        return result_html(found), recipe_of(found)

    def _sae(self, sae: str, hookpoint: str) -> "tuple[str, SAE]":
        return self.bench.sae(sae or "", _hookpoint(hookpoint))


def _strengths(adapters: list[str], strength: float) -> dict[str, float]:
    if not isinstance(adapters, list):
        raise ExploreError(f"adapters is {reprlib.repr(adapters)}; it must be a list of names.")
    return {checked_text("An adapter's name", name, _LONGEST): strength for name in adapters}


def _hookpoint(hookpoint: str | None) -> str | None:
    return checked_text("The hookpoint", hookpoint or "", _LONGEST).strip() or None


def _latent(latent: int | None, sae: "SAE") -> int:
    if latent is None:
        raise ExploreError(f"No latent is given; the SAE has latents 0 to {sae.num_latents - 1:,}.")
    return checked_whole("latent", latent, 0, sae.num_latents - 1)


def _paced(steps: Iterator[Step]) -> Iterator[Step]:
    """The first step, the last, and of the others as many as an eye can follow."""
    with contextlib.closing(steps):  # type: ignore[type-var]  # all of ours are generators
        waiting, shown = [], float("-inf")
        for step in steps:
            waiting = [step]
            if time.monotonic() - shown >= _PAUSE:
                yield waiting.pop()
                shown = time.monotonic()
        yield from waiting


def _both(solution: "Solution") -> tuple[str, str, Plain]:
    base, tuned = solution.base, solution.tuned
    plain = {"prompt": solution.prompt, "base": vars(base), "tuned": vars(tuned) if tuned else None}
    return _written(base), _written(tuned) if tuned else "", plain


def _measured(found: "Measured") -> str:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in (found.table or "").splitlines()]
    table = table_html(lines[0], lines[2:], "Accuracies, and the difference") if lines else ""
    verdict = f"<strong>{escape(found.verdict)}</strong>: " if found.verdict else ""
    return f'{table}<p role="status">{verdict}{escape(found.sentence)}</p>'


def _written(side: "Written") -> str:
    if not side.finished:
        return answer_html(side.thinking, side.answer, None, f"{side.tokens} tokens so far")
    found = f"answer {side.found}" if side.found else "no answer found"
    cut = ", cut at the limit" if side.truncated else ""
    unknown = "; the right answer is not known" if side.correct is None else ""
    return answer_html(side.thinking, side.answer, side.correct, f"{found}, {side.tokens} tokens{cut}{unknown}")
