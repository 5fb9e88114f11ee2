"""A report as one page: what is in it is text and pictures, and nothing else is read, run or asked for."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .theme import DARK, LIGHT, Theme, whole_file

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

Pictures = Mapping[str, tuple[Path, Path, str]]

# The policy keeps browsers from running or loading anything, whatever the text says. What is wide scrolls by itself,
# so that on a phone the text keeps to the screen and the pictures stay readable.
PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; $light }
@media (prefers-color-scheme: dark) { :root { $dark } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  max-width: 800px; margin: 0 auto; padding: 16px; overflow-wrap: break-word; }
h1 { font-size: 24px; }
h2 { font-size: 20px; }
.wide { display: block; overflow-x: auto; margin: 16px 0; }
img { display: block; width: 100%; min-width: 640px; }
table { border-collapse: collapse; overflow-wrap: normal; font-size: 14px; }
th, td { border: 1px solid var(--grid); padding: 4px 8px; text-align: left; }
pre { overflow-x: auto; border: 1px solid var(--grid); padding: 8px; }
code { font-size: 14px; }
blockquote { margin: 0; padding-left: 12px; border-left: 3px solid var(--muted); }
</style>
</head>
<body>
<main>
$body</main>
</body>
</html>
""")


def write_page(path: Path, title: str, markdown: str, pictures: Pictures) -> None:
    """Writes a report as a single HTML file, light or dark as the reader's screen is.

    Headings, lists, tables, code and emphasis of the Markdown are rendered. HTML and links in it are shown as they
    are written, since a report quotes prompts, data and names of other people.

    Args:
        path (`Path`): The HTML file; written whole or not at all.
        title (`str`): Title of the page; plain text.
        markdown (`str`): The report.
        pictures (`Mapping[str, tuple[Path, Path, str]]`): By the address that the Markdown gives in
            `![...](address)`, alone in its paragraph: the light PNG, the dark PNG, and the alternative text. Of an
            image with any other address the text is shown.

    Raises:
        `DataError`: if the Markdown does not show one of the pictures.
    """

    def picture(address: str, _: str) -> str | None:
        if address not in pictures:
            return None
        light, dark, alt = pictures[address]
        return (
            f'<picture class="wide"><source media="(prefers-color-scheme: dark)" srcset="{embedded(dark)}">'
            f'<img src="{embedded(light)}" alt="{escape(alt)}"></picture>'
        )

    renderer = make_renderer(picture)
    tokens = renderer.parse(markdown)
    inline = [child for token in tokens for child in token.children or ()]
    missing = sorted(set(pictures) - {str(token.attrs["src"]) for token in inline if token.type == "image"})
    if missing:
        raise DataError(f"The report's text does not show the pictures {', '.join(missing)}.")
    body = renderer.renderer.render(tokens, renderer.options, {})
    page = PAGE.substitute(title=escape(title), light=_variables(LIGHT), dark=_variables(DARK), body=body)
    with whole_file(path) as draft:
        draft.write_text(page, encoding="utf-8", errors="replace")


def make_renderer(picture: Callable[[str, str], str | None]) -> MarkdownIt:
    """A renderer of reports: HTML and links are shown as they are written, and nothing is read or asked for.

    Args:
        picture (`Callable[[str, str], str | None]`): HTML for an image, from its address and its alternative text;
            `None`: the text is shown.
    """
    from markdown_it import MarkdownIt

    def image(_: Any, tokens: Sequence[Token], at: int, *__: Any) -> str:
        alt = tokens[at].content
        return picture(str(tokens[at].attrs["src"]), alt) or escape(alt)

    renderer = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "autolink", "reference"])
    renderer.add_render_rule("image", image)
    # What scrolls must be reached by the keyboard, too.
    renderer.add_render_rule("table_open", lambda *_: '<div class="wide" tabindex="0"><table>\n')
    renderer.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return renderer


def embedded(picture: Path) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def _variables(theme: Theme) -> str:
    return f"--paper: {theme.paper}; --ink: {theme.ink}; --muted: {theme.muted}; --grid: {theme.grid};"
