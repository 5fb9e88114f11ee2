"""What the explorer shows, as HTML: whatever somebody wrote is text in it, and nothing in it runs."""

import math
import unicodedata
from collections.abc import Sequence
from html import escape
from typing import Final

# From Okabe and Ito's blues, faint to strong, each with the colour of the text on it: contrast 4.5 to 1 or more (WCAG
# 2.2, 1.4.3). By what Gradio puts on the body.
_RAMPS: Final = {
    "": (
        ("#e3f1fa", "#1f2328"),
        ("#b5dbf3", "#1f2328"),
        ("#73bce8", "#1f2328"),
        ("#0072b2", "#ffffff"),
        ("#004c78", "#ffffff"),
    ),
    ".dark ": (
        ("#0c3a58", "#ffffff"),
        ("#0a5a8c", "#ffffff"),
        ("#0072b2", "#ffffff"),
        ("#56b4e9", "#0d1117"),
        ("#b5e0f7", "#0d1117"),
    ),
}
_STEPS: Final = len(_RAMPS[""])
_MARKS: Final = {True: ("right", "✓"), False: ("wrong", "✗")}

# Gradio puts its own selector before each of these, and `.dark` before that: one `.dark` a rule, no `:root`.
STYLE: Final[str] = """
.resa { margin: 0 0 1em; }
.resa-text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.25em 0 0.75em; }
.resa details { margin-bottom: 0.75em; }
.resa-tokens { line-height: 1.9; position: relative; }
.resa-step { padding: 0.15em 0; border-bottom: 2px solid #0072b2; }
.resa-chosen { outline: 2px solid #d55e00; outline-offset: 1px; }
.resa-scale .resa-step { padding: 0.15em 0.5em; }
.resa-reader { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.resa-label { font-weight: 600; }
.resa-right { color: #00664a; font-weight: 600; }
.resa-wrong { color: #9c4400; font-weight: 600; }
.dark .resa-step { border-bottom-color: #56b4e9; }
.dark .resa-chosen { outline-color: #e69f00; }
.dark .resa-right { color: #3fd0a4; }
.dark .resa-wrong { color: #e69f00; }
.resa-wide { overflow-x: auto; }
.resa-wide table { border-collapse: collapse; }
.resa-wide caption { text-align: left; font-weight: 600; padding: 0.25em 0; white-space: nowrap; }
.resa-wide th { text-align: left; font-weight: 600; border: 1px solid #8b949e; padding: 0.25em 0.5em; }
.resa-wide td { border: 1px solid #8b949e; padding: 0.25em 0.5em; white-space: pre-wrap; }
""" + "".join(
    f"{mode}.resa-{step} {{ background: {background}; color: {ink}; }}\n"
    for mode, ramp in _RAMPS.items()
    for step, (background, ink) in enumerate(ramp, 1)
)


def visible(text: str, kept: str = "") -> str:
    """Text in which what has no shape of its own is written out, so that it neither hides nor moves anything.

    Newlines become `↵`; controls, marks of direction and the like become their escape in Python, such as `\\u202e`.

    Args:
        text (`str`): any text; nothing in it is escaped for HTML.
        kept (`str`, *optional*, defaults to `""`): characters that stay as they are.
    """
    return "".join(
        letter
        if letter.isprintable() or letter in kept or unicodedata.category(letter) == "Zs"
        else "↵"
        if letter == "\n"
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


def tokens_html(
    tokens: Sequence[str], values: Sequence[float], *, chosen: int | None = None, caption: str = ""
) -> str:
    """A text with each token on a colour by its value: the stronger, the larger its magnitude beside the largest.

    A value also stands in the token's title, and behind the token for screen readers; the scale is under the text.

    Args:
        tokens (`Sequence[str]`): as `latents.token_texts` gives them.
        values (`Sequence[float]`): one a token; 0, and what is not finite, is not coloured.
        chosen (`int`, *optional*): the number of a token to mark.
        caption (`str`, *optional*, defaults to `""`): what the values are.
    """
    largest = _largest(values)
    return _figure(caption, _tokens(tokens, values, largest, chosen), largest)


def examples_html(examples: Sequence[tuple[Sequence[str], Sequence[float]]], *, caption: str = "") -> str:
    """Several texts as `tokens_html` shows them, numbered, on one scale.

    Args:
        examples (`Sequence[tuple[Sequence[str], Sequence[float]]]`): tokens and values of each.
        caption (`str`, *optional*, defaults to `""`): what the values are.
    """
    largest = max((_largest(values) for _, values in examples), default=0.0)
    lines = "".join(f"<li>{_tokens(tokens, values, largest, None)}</li>" for tokens, values in examples)
    return _figure(caption, f"<ol>{lines}</ol>", largest)


def _largest(values: Sequence[float]) -> float:
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def _tokens(tokens: Sequence[str], values: Sequence[float], largest: float, chosen: int | None) -> str:
    parts = []
    for place, (token, value) in enumerate(zip(tokens, values, strict=True)):
        step = math.ceil(abs(value) / largest * _STEPS) if value and math.isfinite(value) else 0
        title, classes, reader = f"token {place}", [], ""
        text = escape(visible(token)).replace("↵", "↵\n")
        if step:
            text = _with_width(text)
            title, classes = f"{title}: {value:.3g}", ["resa-step", f"resa-{step}"]
            # With a direction of its own it has no part in that of the text.
            reader = f'<span class="resa-reader" dir="ltr"> ({value:.3g}) </span>'
        current = ""
        if place == chosen:
            classes, current = [*classes, "resa-chosen"], ' aria-current="true"'
        named = f' class="{" ".join(classes)}"' if classes else ""
        parts.append(f'<span title="{title}"{named}{current}>{text}{reader}</span>')
    return f'<div class="resa-text resa-tokens" dir="auto">{"".join(parts)}</div>'


def _with_width(token: str) -> str:
    """The token, with something for its colour to lie behind: in a character of several tokens the first one has all
    of the text, and an accent lies over the letter before it."""
    if not token:
        return "⋯"
    return f"◌{token}" if unicodedata.category(token[0]).startswith("M") else token


def _figure(caption: str, body: str, largest: float) -> str:
    head = f'<figcaption class="resa-label">{escape(visible(caption))}</figcaption>' if caption else ""
    limits = (f"{largest * step / _STEPS:.3g}" for step in range(1, _STEPS + 1))
    swatches = " ".join(f'<span class="resa-step resa-{step}">{limit}</span>' for step, limit in enumerate(limits, 1))
    scale = f'<div class="resa-scale">Each colour, up to: {swatches}</div>' if largest else "Active at no token."
    return f'<figure class="resa">{head}{body}{scale}</figure>'


def answer_html(thinking: str, answer: str, mark: bool | None, note: str) -> str:
    """What a model wrote: its thinking, which folds, its answer, and whether that is right.

    Args:
        thinking (`str`): left out where it is empty.
        answer (`str`): what is behind the thinking.
        mark (`bool`, *optional*): whether the answer is right; `None` where nobody knows.
        note (`str`): a sentence beside the mark.
    """
    thought = f"<details open><summary>Thinking</summary>{_prose(thinking)}</details>" if thinking.strip() else ""
    sign = ""
    if mark is not None:
        word, symbol = _MARKS[mark]
        sign = f'<span class="resa-{word}">{symbol} {word}</span> '
    told = f'<div class="resa-label">Answer</div>{_prose(answer)}<div>{sign}{escape(visible(note))}</div>'
    return f'<div class="resa">{thought}{told}</div>'


def _prose(text: str) -> str:
    # Persian and emoji need the two that join and part letters.
    shown = escape(visible(text.strip(), kept="\n\u200c\u200d"))
    return f'<div class="resa-text" dir="auto">{shown}</div>'


def table_html(head: Sequence[str], rows: Sequence[Sequence[str | float]], caption: str) -> str:
    """A table that scrolls by itself, also by keyboard, where the screen is narrower.

    Args:
        head (`Sequence[str]`): names of the columns.
        rows (`Sequence[Sequence[str | float]]`): cells; those of the first column name their rows. Of a `float` 3
            digits are shown.
        caption (`str`): what the table holds.
    """
    names = "".join(f'<th scope="col">{_cell(name)}</th>' for name in head)
    lines = "".join(
        f'<tr><th scope="row" dir="auto">{_cell(name)}</th>'
        + "".join(f'<td dir="auto">{_cell(cell)}</td>' for cell in cells)
        + "</tr>"
        for name, *cells in rows
    )
    title = escape(visible(caption))
    return (
        f'<div class="resa resa-wide" role="group" aria-label="{title}" tabindex="0"><table><caption>{title}</caption>'
        f"<thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _cell(value: str | float) -> str:
    return escape(visible(f"{value:.3g}" if isinstance(value, float) else str(value)))
