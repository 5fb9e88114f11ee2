"""The explorer's HTML: sound, inert whatever is in it, and readable by eye and by ear."""

import itertools
import math
import re
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser

import pytest
from colours import contrast, luminance

from resa_hf.explore.html import STYLE, answer_html, examples_html, table_html, tokens_html, visible

TAGS = {
    "figure", "figcaption", "div", "span", "details", "summary", "table", "caption", "thead", "tbody",
    "tr", "th", "td", "ol", "li",
}  # fmt: skip
ATTRIBUTES = {"class", "title", "dir", "aria-current", "aria-label", "role", "tabindex", "scope", "open"}
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</span></div></figure></table><h1>out</h1>",
    "\" onmouseover=\"alert(1)' onclick='alert(1)",
    "<!-- a comment",
    "<style>*{display:none}</style>",
    "&lt;script&gt; &#60;b&#62; &amp;",
    "javascript:alert(1) {{7*7}} $x ${x}",
]
# What each may not do, and how it is shown instead.
UNSEEN = {
    "\x00": r"\x00",
    "\x1b[31m": r"\x1b[31m",
    "\u202eevil\u202c": r"\u202eevil\u202c",
    "\u2066a\u2069": r"\u2066a\u2069",
    "\ufeff": r"\ufeff",
    "\u2028": r"\u2028",
    "\x85": r"\x85",
    "\U000e0041": r"\U000e0041",
    "\ud83d": r"\ud83d",
    "\t": r"\t",
}


class Parsed(HTMLParser):
    """Tags with their attributes and own text, in order. Fails where tags do not match, or are not ours."""

    def __init__(self, source):
        super().__init__()
        self.source, self.elements, self.open, self.text = source, [], [], ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert tag in TAGS and {name for name, _ in attributes} <= ATTRIBUTES, (tag, attributes)
        assert len(dict(attributes)) == len(attributes)
        self.open.append({"tag": tag, "text": "", **dict(attributes)})
        self.elements.append(self.open[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, text):
        self.text += text
        for element in self.open:
            element["text"] += text

    def handle_comment(self, text):
        raise AssertionError(f"a comment: {text}")

    def all(self, **wanted):
        return [one for one in self.elements if all(one.get(key) == value for key, value in wanted.items())]

    def of_class(self, name):
        return [one for one in self.elements if name in (one.get("class") or "").split()]


def tokens_of(parsed):
    """By token: what is seen of it, and what readers hear behind that."""
    readers = [one["text"] for one in parsed.of_class("resa-reader")]
    found = []
    for one in parsed.elements:
        if not (one.get("title") or "").startswith("token "):
            continue
        heard = readers.pop(0) if "resa-step" in (one.get("class") or "") else ""
        assert one["text"].endswith(heard)
        found.append((one["text"].removesuffix(heard), heard.strip()))
    return found


@pytest.mark.parametrize("text", [*HOSTILE, *UNSEEN])
def test_what_somebody_wrote_is_text(text):
    shown = UNSEEN.get(text, text)
    tokens = Parsed(tokens_html([text, "a"], [1, 0], caption=text))
    assert tokens_of(tokens) == [(shown, "(1)"), ("a", "")]
    assert tokens.all(tag="figcaption")[0]["text"] == shown
    answer = Parsed(answer_html(f"t{text}.", f"a{text}.", True, text))
    assert [one["text"] for one in answer.of_class("resa-text")] == [f"t{shown}.", f"a{shown}."]
    assert answer.text.endswith(f"✓ right {shown}")
    table = Parsed(table_html([text], [[text], [text]], text))
    examples = Parsed(examples_html([([text], [1])], caption=text))
    assert [one["text"] for one in examples.elements if one["tag"] in ("figcaption", "li")] == [shown, f"{shown} (1) "]
    cells = [one["text"] for one in table.elements if one["tag"] in ("caption", "th", "td")]
    assert cells == [shown] * 4 and table.elements[0]["aria-label"] == shown


@pytest.mark.parametrize("text", [*HOSTILE, *UNSEEN])
def test_all_of_it_can_be_sent(text):
    html = tokens_html([text], [1], caption=text) + answer_html(text, text, None, text) + table_html([], [], text)
    html.encode()
    assert not [letter for letter in html if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


@pytest.mark.parametrize("text", ["中文 語", "مَرْحَبًا", "a\u0301", "🙂", "\u3000\xa0 ", "naïve – “quoted”", "हिन्दी"])
def test_other_alphabets_are_as_they_are(text):
    assert visible(text) == text
    assert tokens_of(Parsed(tokens_html([text, "b"], [0, 1])))[0] == (text, "")


def test_answers_keep_their_lines_and_what_joins_letters():
    text = "one\n\ntwo \u200d👩\u200d👧 می\u200cخواهم"
    assert Parsed(answer_html(text, "4", None, "")).of_class("resa-text")[0]["text"] == text
    assert visible("one\ntwo\u200d") == r"one↵two\u200d"


def test_a_token_has_its_value_in_colour_title_and_text():
    parsed = Parsed(tokens_html(["a", " b", "c\n", "d"], [0.0, 0.5, -2.0, 1.23456], chosen=1, caption="Latent 7"))
    assert [one["title"] for one in parsed.all(tag="span") if "title" in one] == [
        "token 0", "token 1: 0.5", "token 2: -2", "token 3: 1.23",
    ]  # fmt: skip
    assert tokens_of(parsed) == [("a", ""), (" b", "(0.5)"), ("c↵\n", "(-2)"), ("d", "(1.23)")]
    (chosen,) = parsed.all(**{"aria-current": "true"})
    assert chosen["title"] == "token 1: 0.5" and parsed.of_class("resa-chosen") == [chosen]
    assert all(one["dir"] == "ltr" for one in parsed.of_class("resa-reader"))  # and so not part of an Arabic text
    assert parsed.of_class("resa-tokens")[0]["dir"] == "auto"


def test_steps_are_fifths_of_the_largest_and_the_scale_says_so():
    values = [0.01, 0.2, 0.21, 0.4, 0.6, 0.61, 0.99, 1.0, -0.5, 0.0]
    steps = [1, 1, 2, 2, 3, 4, 5, 5, 3, None]
    parsed = Parsed(tokens_html([str(place) for place in range(10)], [40 * value for value in values]))
    for place, step in enumerate(steps):
        (token,) = [one for one in parsed.elements if re.match(rf"token {place}\b", one.get("title") or "")]
        assert token.get("class") == (f"resa-step resa-{step}" if step else None)
    scale = [one for one in parsed.of_class("resa-step") if "title" not in one]
    assert [(one["class"], one["text"]) for one in scale] == [
        (f"resa-step resa-{step}", str(8 * step)) for step in range(1, 6)
    ]


@pytest.mark.parametrize("values", [[0.0, 0.0], [math.nan, math.inf], [0.0, -math.inf]])
def test_nothing_to_colour_is_said(values):
    parsed = Parsed(tokens_html(["a", "b"], values))
    assert not parsed.of_class("resa-step") and parsed.text == "abActive at no token."
    assert Parsed(tokens_html([], [])).text == "Active at no token."


def test_examples_share_a_scale():
    parsed = Parsed(examples_html([(["a", "b"], [8.0, 0.0]), (["c"], [2.0])], caption="Latent 7"))
    assert [one["text"] for one in parsed.all(tag="li")] == ["a (8) b", "c (2) "]
    coloured = [one["class"] for one in parsed.of_class("resa-step") if "title" in one]
    assert coloured == ["resa-step resa-5", "resa-step resa-2"]
    assert parsed.text.startswith("Latent 7") and parsed.text.endswith("Each colour, up to: 1.6 3.2 4.8 6.4 8")
    assert Parsed(examples_html([])).text == "Active at no token."


def test_what_is_not_finite_takes_no_part():
    parsed = Parsed(tokens_html(["a", "b", "c"], [math.inf, 3.0, math.nan]))
    assert tokens_of(parsed) == [("a", ""), ("b", "(3)"), ("c", "")]
    assert len(parsed.of_class("resa-5")) == 2


def test_every_coloured_token_is_wide_enough_to_be_seen():
    tokens, values = ["e", "\u0301", "中", "", "x", "", "\u0301"], [1, 1, 1, 1, 0, 0, 0]
    seen = [text for text, _ in tokens_of(Parsed(tokens_html(tokens, values)))]
    assert seen == ["e", "◌\u0301", "中", "⋯", "x", "", "\u0301"]


def test_a_value_is_missing():
    with pytest.raises(ValueError, match="shorter"):
        tokens_html(["a", "b"], [1.0])


@pytest.mark.parametrize(
    ("mark", "name", "said"), [(True, "resa-right", "✓ right "), (False, "resa-wrong", "✗ wrong "), (None, None, "")]
)
def test_the_mark_is_in_words(mark, name, said):
    parsed = Parsed(answer_html("1+1", "2", mark, "Wanted 2."))
    assert parsed.text == f"Thinking1+1Answer2{said}Wanted 2."
    marks = parsed.of_class("resa-right") + parsed.of_class("resa-wrong")
    assert [(one["class"], one["text"]) for one in marks] == ([(name, said.strip())] if name else [])
    (details,) = parsed.all(tag="details")
    assert "open" in details and details["text"] == "Thinking1+1"


def test_a_model_that_did_not_think_has_no_empty_block():
    assert not Parsed(answer_html(" \n", "2", None, "")).all(tag="details")


def test_a_table_names_its_rows_and_columns_and_scrolls_by_keyboard():
    parsed = Parsed(table_html(["latent", "peak"], [[7, 1.23456], [12, "none"]], "Strongest"))
    assert [one["text"] for one in parsed.all(tag="th", scope="col")] == ["latent", "peak"]
    assert [one["text"] for one in parsed.all(tag="th", scope="row")] == ["7", "12"]
    assert [one["text"] for one in parsed.all(tag="td")] == ["1.23", "none"]
    outer = parsed.elements[0]
    assert (outer["tabindex"], outer["role"], outer["aria-label"]) == ("0", "group", "Strongest")


RULES = dict(re.findall(r"^([^{\n]+) \{ (.*) \}$", STYLE, re.MULTILINE))
# Of a page and of Gradio's blocks on it.
PAPERS = {"": ("#ffffff", "#fafafa", "#f4f4f5"), ".dark ": ("#000000", "#0b0f19", "#18181b", "#27272a")}


@pytest.mark.parametrize("mode", PAPERS)
def test_text_can_be_read_on_each_colour_and_colours_told_apart(mode):
    rules = [RULES[f"{mode}.resa-{step}"] for step in range(1, 6)]
    pairs = [re.fullmatch(r"background: (#\w{6}); color: (#\w{6});", rule).groups() for rule in rules]
    for background, ink in pairs:
        assert contrast(background, ink) >= 4.5
    tones = [luminance(background) for background, _ in pairs]
    assert tones == sorted(tones, reverse=mode == "")
    assert all(contrast(one, other) > 1.2 for (one, _), (other, _) in itertools.pairwise(pairs))
    assert f"{mode}.resa-6" not in RULES


@pytest.mark.parametrize("mode", PAPERS)
@pytest.mark.parametrize(("rule", "wanted"), [("right", 4.5), ("wrong", 4.5), ("step", 3), ("chosen", 3)])
def test_marks_contrast_with_the_page(mode, rule, wanted):
    declared = RULES[f"{mode}.resa-{rule}"]
    colour = re.search(r"(?:color|border-bottom|outline): [^;]*(#\w{6})|-color: (#\w{6})", declared)
    assert all(contrast(colour[1] or colour[2], paper) >= wanted for paper in PAPERS[mode])


def test_gradio_can_rewrite_the_style():
    # It replaces the first `.dark` of a rule and splits selectors at commas: plain rules only.
    assert len(RULES) == STYLE.count("{") == STYLE.count("}")
    for selector in RULES:
        assert re.fullmatch(r"(\.dark )?\.resa[\w-]*( \.?[\w-]+)?", selector)
    assert "url(" not in STYLE and "<" not in STYLE


def test_every_class_has_its_rule():
    html = tokens_html(["a"], [1], chosen=0, caption="c") + answer_html("a", "b", True, "") + table_html([], [], "c")
    html += answer_html("a", "b", False, "")
    used = {name for names in re.findall(r'class="([^"]*)"', html) for name in names.split()}
    assert used == {name for selector in RULES for name in re.findall(r"\.(resa[\w-]*)", selector)}


def test_it_is_imported_without_the_heavy_libraries():
    heavy = {"torch", "transformers", "peft", "sae_lens", "scipy", "matplotlib", "numpy"}
    code = "import resa_hf.explore.html, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not heavy & set(done.stdout.split())
