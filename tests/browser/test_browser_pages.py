"""Every tab opens: in light and dark, on a laptop and on a phone, with nothing that axe-core finds serious."""

from collections.abc import Callable

import pytest
from conftest import OpenPage
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.slow
# By its name, what is on a tab once it has been filled.
TABS = {
    "Solve": "With adapters",
    "Look inside": "Read the text",
    "Layers": "Reasoning latents by layer",
    "Results": "Show the report",
}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_tab_opens(open_page: OpenPage, violations: Callable[[Page], list[str]], width: int, dark: bool) -> None:
    page = open_page(width=width, dark=dark)
    assert page.evaluate("document.body.classList.contains('dark')") is dark
    for name, content in TABS.items():
        tab = page.get_by_role("tab", name=name, exact=True)
        if not tab.is_visible():
            page.locator(".overflow-menu > button").click()
        tab.click()
        expect(page.get_by_role("tabpanel").get_by_text(content, exact=True)).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than the page"
        assert not violations(page), name
