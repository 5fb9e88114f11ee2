"""The main path by keyboard alone, with a focus that can be seen."""

import pytest
from explorer_page import side
from explorer_visitors import OpenPage
from playwright.sync_api import Page, expect

pytest_plugins = ("explorer_visitors",)
pytestmark = pytest.mark.slow
# How the focus shows: an outline, a shadow, or on a field the colour of its border.
LOOK = """() => { const own = document.activeElement, around = own.closest(".wrap, .wrap-inner, label") ?? own;
  return [own, around].map(e => { const s = getComputedStyle(e);
    return [s.outlineStyle != "none" ? s.outline : "", s.boxShadow, s.borderColor].join() }).join() }"""


def tab_to(page: Page, name: str) -> None:
    """Goes on with Tab until the element of that name has the focus."""
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            "() => { const e = document.activeElement; return e.ariaLabel ?? e.labels?.[0]?.innerText ?? e.innerText }"
        )
        if focused.strip().startswith(name):
            look = page.evaluate(LOOK)
            hidden = page.evaluate(
                f"() => {{ const e = document.activeElement; e.blur(); const l = ({LOOK})(); "
                "e.focus({focusVisible: true}); return l }"
            )
            assert look != hidden, f"{name}: the focus cannot be seen"
            return
    raise AssertionError(f"Tab does not reach {name}")


@pytest.mark.parametrize(
    "dark", [pytest.param(False, id="light"), pytest.param(True, id="dark", marks=pytest.mark.long)]
)
def test_by_keyboard(open_page: OpenPage, dark: bool) -> None:
    page = open_page(dark=dark)
    tab_to(page, "range slider for Adapter strength")
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    expect(page.get_by_label("number input for Adapter strength")).to_have_value("0")
    tab_to(page, "Solve")  # the tab, which is open
    tab_to(page, "4+2*5-7 mod 10")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Problem").first).to_have_value("4+2*5-7 mod 10")
    tab_to(page, "Solve")
    page.keyboard.press("Enter")
    expect(side(page, "With adapters")).to_contain_text("✓ right answer 3")
    for _ in range(30):  # back to the tabs
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.role") == "tab":
            break
    for tab in ("Look inside", "Layers", "Results"):
        if page.evaluate("document.activeElement.innerText") != tab:
            page.get_by_role("tab", name="Solve").focus()
            tab_to(page, tab)
        page.keyboard.press("Enter")
        expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
        if tab == "Look inside":
            tab_to(page, "Read the text")
            page.keyboard.press("Enter")
            expect(page.get_by_text("Strongest latents of the text")).to_be_visible()
            tab_to(page, "Token")
            page.keyboard.type("8")
            page.keyboard.press("Enter")
            expect(page.get_by_text("Strongest latents of token 8")).to_be_visible()
            tab_to(page, "Latent")
            page.keyboard.type("3")
            page.keyboard.press("Enter")
            expect(page.get_by_role("tabpanel").get_by_text("Latent 3 at layers.")).to_be_visible()
    tab_to(page, "Show the report")
    page.keyboard.press("Enter")
    expect(page.get_by_role("tabpanel").get_by_role("table").first).to_be_visible()
