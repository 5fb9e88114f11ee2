"""The page of a report: everything is in it, and nothing that somebody wrote is more than text there."""

import base64
from html.parser import HTMLParser

import pytest

from resa_hf.errors import DataError
from resa_hf.features.page import write_page

VOID = {"meta", "img", "source", "br", "hr"}
KNOWN = VOID | {
    "html", "head", "title", "style", "body", "main", "div", "p", "h1", "table", "thead", "tbody", "tr", "th", "td",
    "picture", "pre", "code", "em", "strong", "ul", "ol", "li", "blockquote",
}  # fmt: skip
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<iframe src='https://evil.example'></iframe>",
    "<style>@import 'https://evil.example'</style>",
    "</main></body></html><h1>out</h1>",
    "<!-- a comment",
    "[click](javascript:alert(1))",
    "[click](https://evil.example)",
    "<https://evil.example>",
    "[reference]\n\n[reference]: https://evil.example",
    "<svg/onload=alert(1)>",
    "&lt;script&gt; &#60;b&#62;",
    "\x1b[31m $body $title ${light} $$ \u202e",
]


class Page(HTMLParser):
    """Tags with their attributes in order; text by the tag around it. Fails where tags do not match."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.text = [], [], {}
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + text

    def handle_comment(self, text):
        raise AssertionError(f"a comment: {text}")

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture
def pictures(tmp_path):
    for name in ("light", "dark", "more"):
        (tmp_path / f"{name}.png").write_bytes(b"\x89PNG" + name.encode())
    light, dark, more = (tmp_path / f"{name}.png" for name in ("light", "dark", "more"))
    return {"counts.png": (light, dark, 'Counts "by" layer <b>'), "scores.png": (more, dark, "Scores")}


def written(tmp_path, markdown, pictures=None, title="Features"):
    write_page(tmp_path / "report.html", title, markdown, pictures or {})
    return Page(tmp_path / "report.html")


def check_inert(page):
    assert {tag for tag, _ in page.tags} <= KNOWN
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "style", "action")]
        for name in ("src", "srcset"):
            assert tag in ("img", "source") or name not in attributes
            assert attributes.get(name, "data:image/png;base64,").startswith("data:image/png;base64,")
    assert "url(" not in page.text["style"] and "@import" not in page.text["style"]


def test_the_page_holds_its_pictures_for_light_and_dark(tmp_path, pictures):
    page = written(tmp_path, "# A\n\n![one](counts.png)\n\ntext\n\n![two](scores.png)\n", pictures)
    check_inert(page)
    sources, images = page.all("source"), page.all("img")
    assert [image["alt"] for image in images] == ['Counts "by" layer <b>', "Scores"]
    assert [source["media"] for source in sources] == ["(prefers-color-scheme: dark)"] * 2
    for found, file in ((images[0]["src"], "light"), (images[1]["src"], "more"), (sources[0]["srcset"], "dark")):
        assert base64.b64decode(found.partition(",")[2]) == (tmp_path / f"{file}.png").read_bytes()


def test_the_page_suits_a_phone_and_the_dark(tmp_path):
    page = written(tmp_path, "text")
    metas = page.all("meta")
    assert {"charset": "utf-8"} in metas and page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    (policy,) = (meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "@media (prefers-color-scheme: dark)" in page.text["style"]
    assert page.source.startswith("<!DOCTYPE html>") and page.text["title"] == "Features"


def test_markdown_is_rendered(tmp_path):
    page = written(tmp_path, "# Head\n\n| a | b |\n|---|---|\n| `x<y` | **2** |\n\n- one\n\n```\n<raw>\n```\n")
    assert page.text["h1"] == "Head" and page.text["th"] == "ab" and page.text["strong"] == "2"
    assert page.text["code"] == "x<y<raw>\n" and page.text["li"] == "one"
    assert len(page.all("tr")) == 2 and {"class": "wide", "tabindex": "0"} in page.all("div")


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("place", ["{}", "| a |\n|---|\n| {} |", "# {}", "- {}", "`{}`", "```\n{}\n```", "> {}"])
def test_what_somebody_wrote_is_text(tmp_path, pictures, text, place):
    markdown = place.replace("{}", text) + "\n\n![](counts.png)"
    pictures = {"counts.png": (*pictures["counts.png"][:2], text)}
    page = written(tmp_path, markdown, pictures, title=text)
    check_inert(page)
    assert page.text["title"] == text and page.all("img")[0]["alt"] == text
    shown = "".join(page.text[tag] for tag in page.text if tag not in ("title", "style"))
    if "&lt;" not in text:  # an entity is the letter it stands for
        assert all(word in shown for word in text.replace("\n", " ").split())


@pytest.mark.parametrize(
    "address",
    ["https://evil.example/p.png", "other.png", "data:image/png;base64,AAAA", "javascript:alert(1)", "//evil"],
)
def test_an_image_from_elsewhere_is_its_text(tmp_path, address):
    page = written(tmp_path, f"![a <b>picture](<{address}>) here")
    check_inert(page)
    assert not page.all("img") and "a <b>picture" in page.text["p"]


def test_a_picture_that_the_text_leaves_out_is_an_error(tmp_path, pictures):
    with pytest.raises(DataError, match="does not show the pictures counts.png."):
        written(tmp_path, "![one](scores.png) and `![](counts.png)`", pictures)
    assert not (tmp_path / "report.html").exists()


def test_letters_that_are_none_do_not_stop_the_page(tmp_path):
    assert written(tmp_path, "half of a pair: \ud83d, and 中文 🙂").text["p"] == "half of a pair: ?, and 中文 🙂"


def test_a_page_is_whole_or_the_one_before(tmp_path, pictures):
    written(tmp_path, "before")
    before = (tmp_path / "report.html").read_text()
    (tmp_path / "light.png").unlink()
    with pytest.raises(FileNotFoundError):
        written(tmp_path, "![](counts.png)", {"counts.png": pictures["counts.png"]})
    assert (tmp_path / "report.html").read_text() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dark.png", "more.png", "report.html"]
