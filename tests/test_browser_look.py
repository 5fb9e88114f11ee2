"""Look inside, as visitors use it: tokens, latents, examples, a change; and the link that shows another the same."""

import re
from collections.abc import Callable

import pytest
from explorer_page import TRACE, VIEWS, field, go_to, message, press, side
from explorer_visitors import OpenPage
from playwright.sync_api import Locator, Page, expect

pytest_plugins = ("explorer_visitors",)
pytestmark = pytest.mark.slow
FINISHED = re.compile(r"(answer .+|no answer found), \d+ tokens")


def latents(panel: Locator) -> Locator:
    """The rows of the strongest latents."""
    return panel.get_by_role("table").first.locator("tbody tr")


@VIEWS
def test_look_inside(open_page: OpenPage, violations: Callable[[Page], list[str]], width: int, dark: bool) -> None:
    page = open_page(width=width, dark=dark)
    press(page, "Solve")
    expect(side(page, "With adapters")).to_contain_text("✓ right answer 0")
    panel = go_to(page, "Look inside")
    press(page, "Take the last answer from Solve")
    expect(field(page, "Text")).to_have_value(re.compile(rf"8\+7\*1\*8 mod 10(.|\n)*{re.escape(TRACE)}</think>"))
    press(page, "Read the text")
    expect(panel.get_by_text("Strongest latents of the text")).to_be_visible()
    panel.get_by_title(re.compile("^token 8")).click()
    expect(panel.get_by_text("Strongest latents of token 8")).to_be_visible()
    expect(field(page, "Token")).to_have_value("8")
    expect(panel.locator("[aria-current]")).to_have_attribute("title", re.compile("^token 8: "))
    # Of a token the strongest is shown; another one, of those in the list, when it is clicked.
    strongest, second = (latents(panel).nth(row).get_by_role("rowheader").inner_text() for row in (0, 1))
    expect(panel.get_by_text(f"Latent {strongest} at layers.")).to_be_visible()
    value = latents(panel).nth(1).get_by_role("cell").inner_text()
    latents(panel).nth(1).click()
    expect(panel.get_by_text(f"Latent {second} at layers.")).to_be_visible()
    expect(field(page, "Latent")).to_have_value(second)
    expect(panel.locator("[aria-current]")).to_have_attribute("title", f"token 8: {value}")
    assert not violations(page)

    press(page, "Show examples of the latent")
    expect(panel.get_by_text(f"Top examples of latent {second} at layers.")).to_be_visible()
    expect(
        panel.get_by_role("table", name=f"Nearest to latent {second} at layers.").locator("tbody tr")
    ).not_to_have_count(0)
    press(page, "Solve the problem with the latent changed")  # by 0: it is ablated
    expect(side(page, "Unchanged")).to_contain_text("✓ right answer 0")
    expect(side(page, "Changed")).to_contain_text(FINISHED)
    assert not violations(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_link_shows_another_visitor_the_same(open_page: OpenPage) -> None:
    page = open_page()
    field(page, "Problem").fill("5-7+2+4+9 mod 10")
    panel = go_to(page, "Look inside")
    field(page, "Text").fill("User: 1+1 & <b>more</b>? mod 10\nAssistant: ünïcode 🙂")
    press(page, "Read the text")
    panel.get_by_title(re.compile("^token 7")).click()
    expect(panel.get_by_text("Strongest latents of token 7")).to_be_visible()
    latents(panel).first.click()
    expect(field(page, "Latent")).not_to_have_value("")
    colours = panel.locator(".resa-tokens").first.inner_html()
    press(page, "Make the link")
    address = page.get_by_role("textbox", disabled=True).last
    expect(address).to_have_value(re.compile("tab=look"))

    other = open_page(address.input_value().removeprefix(page.evaluate("location.origin")))
    expect(other.get_by_role("tab", name="Look inside")).to_have_attribute("aria-selected", "true")
    for name in ("Text", "Token", "Latent", "Hookpoint"):
        expect(field(other, name)).to_have_value(field(page, name).input_value())
    for name in ("Model", "SAE"):
        expect(other.get_by_role("combobox", name=name)).to_have_value(
            page.get_by_role("combobox", name=name).input_value()
        )
    press(other, "Read the text")
    shown = other.get_by_role("tabpanel").locator(".resa-tokens").first
    expect(shown).to_be_visible()
    assert shown.inner_html() == colours
    go_to(other, "Solve")
    expect(field(other, "Problem")).to_have_value("5-7+2+4+9 mod 10")


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("latent=abc&tab=look", "The address has a latent that is no number."),
        (f"token={'9' * 10_000}&tab=nothing", None),
        (f"latent={'x' * 10_000}", "The address has a latent that is no number."),
        ("adapters=a&adapters=b&adapters=c&adapters=d&adapters=e", None),
        ("model=<script>window.ran=1</script>&text=<img src=x onerror=window.ran=1>&sae=../../etc/passwd", None),
    ],
    ids=["no number", "10,000 digits", "10,000 letters", "too many adapters", "script"],
)
def test_broken_links_open(open_page: OpenPage, query: str, told: str | None) -> None:
    page = open_page(f"/?{query}")
    if told:
        expect(message(page)).to_have_text(told)
    panel = go_to(page, "Look inside")
    press(page, "Read the text")
    if query.startswith(("token", "adapters", "model")):
        expect(message(page)).to_be_visible()
    else:
        expect(panel.locator(".resa-tokens").first).to_be_visible()
    assert page.evaluate("window.ran") is None
