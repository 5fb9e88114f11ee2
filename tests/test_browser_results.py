"""Layers and Results, as visitors read them."""

from collections.abc import Callable

import pytest
from explorer_page import VIEWS, go_to, press
from explorer_visitors import OpenPage
from playwright.sync_api import Page, expect

pytest_plugins = ("explorer_visitors",)
pytestmark = pytest.mark.slow


@VIEWS
def test_layers_and_results(
    open_page: OpenPage, violations: Callable[[Page], list[str]], width: int, dark: bool
) -> None:
    page = open_page(width=width, dark=dark)
    panel = go_to(page, "Layers")
    for title in ("Reasoning latents by layer", "Quality of the SAEs by layer", "Scores by layer"):
        expect(panel.get_by_role("heading", name=title, exact=True)).to_be_visible()
    expect(panel.get_by_text("No result here")).to_have_count(0)
    expect(panel.get_by_role("cell", name="layers.2").first).to_be_visible()
    assert_pictures(page)
    assert not violations(page)

    panel = go_to(page, "Results")
    for result, word in {
        "run, compare": "SAE-Tuning",
        "features, features": "cue",
        "sweep, sweep": "layers.1",
    }.items():
        page.get_by_role("combobox", name="Result").click()
        page.get_by_role("option", name=result).click()
        press(page, "Show the report")
        expect(panel.get_by_role("table").filter(has_text=word).first).to_be_visible()
        assert_pictures(page)
    press(page, "Recipe ▼")
    recipe = page.get_by_role("tabpanel").get_by_role("textbox", disabled=True)
    expect(recipe).to_be_visible()
    text = recipe.input_value()
    assert text.startswith("# resa-hf sweep --config recipe.yaml\n") and "grid:\n  hookpoint:\n  - layers.1\n" in text
    assert not violations(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def assert_pictures(page: Page) -> None:
    """There are some; all that are shown have been read, and are those for the page's theme."""
    pictures = page.get_by_role("tabpanel").get_by_role("img").and_(page.locator("img"))
    expect(pictures.first).to_be_visible()
    widths = pictures.evaluate_all("all => all.map(one => one.naturalWidth)")
    assert widths and all(widths)
