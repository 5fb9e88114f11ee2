"""HTML that a page shows, taken apart: what is in it, and that nothing in it acts."""

from html.parser import HTMLParser

VOID = {"img", "br", "hr"}
KNOWN = VOID | {
    "div", "p", "h2", "h3", "h4", "h5", "table", "thead", "tbody", "tr", "th", "td", "span", "pre", "code", "em",
    "strong", "ul", "ol", "li", "blockquote",
}  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n"


class Fragment(HTMLParser):
    """Tags with their attributes in order; all text; text by the tag around it. Fails where tags do not match, where a
    tag or an attribute could act, and where anything is asked for."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text, self.by_tag = [], [], "", {}
        self.feed(html)
        self.close()
        assert self.open == []
        assert self.tags[0] == ("div", {"class": "resa-report"})

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        assert tag in KNOWN and named.keys() <= {"class", "src", "alt", "tabindex", "start"}, (tag, named)
        assert "src" not in named or (tag == "img" and named["src"].startswith("data:image/png;base64,"))
        self.tags.append((tag, named))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text
        self.by_tag.setdefault(self.open[-1], []).append(text)

    def handle_comment(self, text):
        raise AssertionError(f"a comment: {text}")

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]
