"""What a visitor sees and presses, by the words that are on it."""

import pytest
from playwright.sync_api import Locator, Page, expect

SOURCE = "source (LoRA and GRPO)"
PROBLEM = "8+7*1*8 mod 10"
TRACE = "8+7=5;5*1=5;5*8=0"  # from left to right, modulo 10: the answer is 0
# CI has both widths and both themes; `make test-all` each with each.
VIEWS = pytest.mark.parametrize(
    ("width", "dark"),
    [
        pytest.param(1280, False, id="1280-light"),
        pytest.param(390, True, id="390-dark"),
        pytest.param(1280, True, id="1280-dark", marks=pytest.mark.long),
        pytest.param(390, False, id="390-light", marks=pytest.mark.long),
    ],
)


def go_to(page: Page, name: str) -> Locator:
    """Opens a tab; returns what is on it."""
    page.get_by_role("tab", name=name, exact=True).click()
    expect(page.get_by_role("tab", name=name, exact=True)).to_have_attribute("aria-selected", "true")
    return page.get_by_role("tabpanel")


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def field(page: Page, label: str) -> Locator:
    """The field below a label, which a sentence of help follows."""
    return page.get_by_role("tabpanel").get_by_label(label).first


def side(page: Page, title: str) -> Locator:
    """One of two texts beside each other."""
    heading = page.get_by_role("heading", name=title, exact=True)
    return page.locator(".column").filter(has=heading).last


def set_strength(page: Page, value: str) -> None:
    number = page.get_by_label("number input for Adapter strength")
    number.fill(value)
    number.press("Tab")


def add_adapter(page: Page, name: str) -> None:
    page.get_by_role("combobox", name="Adapters").click()
    page.get_by_role("option", name=name).first.click()
    page.get_by_role("combobox", name="Adapters").press("Escape")


def message(page: Page) -> Locator:
    """What went wrong, in words."""
    return page.get_by_test_id("toast-text")


def close_message(page: Page) -> None:
    page.get_by_test_id("toast-close").first.click()
    expect(page.get_by_test_id("toast-body")).to_have_count(0)


def choose(page: Page, label: str, name: str) -> None:
    """Types a name into a list that takes others, too."""
    box = page.get_by_role("combobox", name=label)
    box.fill(name)
    box.press("Enter")
