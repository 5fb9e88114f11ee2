"""Solve, as visitors use it: examples, both answers, strength, several adapters, many problems, Stop; two at once."""

import re
from collections.abc import Callable

import pytest
from explorer_page import PROBLEM, SOURCE, TRACE, VIEWS, add_adapter, field, go_to, message, press, set_strength, side
from explorer_visitors import OpenPage
from playwright.sync_api import Locator, Page, expect

pytest_plugins = ("explorer_visitors",)
pytestmark = pytest.mark.slow
LONG = f"8{'+7*1-8' * 20} mod 10"
JUDGED = re.compile(r"[✓✗] (right|wrong) (answer .+|no answer found), \d+ tokens")
# A hand may be slower than the tiny reasoner.
STOP_AT_ONCE = """() => new MutationObserver((_, own) => {
  if (!document.body.innerText.includes("tokens so far")) return;
  own.disconnect();
  [...document.querySelectorAll("button")].find((button) => button.innerText == "Stop").click();
}).observe(document.body, {subtree: true, childList: true, characterData: true})"""


def written(shown: Locator) -> str:
    """An answer that has been judged, without its heading."""
    expect(shown).to_contain_text(JUDGED)
    return shown.locator(".resa").inner_text()


@VIEWS
def test_solve(open_page: OpenPage, violations: Callable[[Page], list[str]], width: int, dark: bool) -> None:
    page = open_page(width=width, dark=dark)
    press(page, "How often is it right? Run 50 problems ▼")  # what is filled at once is emptied as it opens
    base, tuned = side(page, "Base"), side(page, "With adapters")
    press(page, "5-7+2+4+9 mod 10")  # an example: 5-7=8; 8+2=0; 0+4=4; 4+9=3
    expect(field(page, "Problem")).to_have_value("5-7+2+4+9 mod 10")
    press(page, "Solve")
    expect(tuned).to_contain_text("✓ right answer 3")
    press(page, PROBLEM)
    expect(field(page, "Problem")).to_have_value(PROBLEM)
    press(page, "Solve")
    expect(base).to_contain_text("✗ wrong answer 5")
    expect(tuned).to_contain_text("✓ right answer 0")
    expect(tuned.get_by_text(TRACE, exact=True)).to_be_visible()
    tuned.get_by_text("Thinking").click()
    expect(tuned.get_by_text(TRACE, exact=True)).to_be_hidden()
    assert not violations(page)
    without = written(base)

    set_strength(page, "0")
    press(page, "Solve")
    expect(tuned).to_contain_text("✗ wrong answer 5")
    assert written(tuned) == written(base) == without

    set_strength(page, "1")
    add_adapter(page, "control - noise (run, compare)")
    press(page, "Solve")
    expect(tuned).not_to_contain_text("✗ wrong answer 5")
    assert written(base) == without
    page.get_by_label("number input for How many").fill("10")
    page.get_by_label("number input for How many").press("Tab")
    press(page, "Run problems")
    both = page.get_by_role("row").filter(has_text=f"{SOURCE} + control - noise (run, compare)")
    expect(both).to_contain_text(re.compile(r"\d+ to \d+"))
    expect(page.get_by_role("tabpanel").get_by_role("status").filter(has_text="10 problems")).to_contain_text(
        f"{SOURCE} + control - noise (run, compare) is "
    )
    assert not violations(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_stop_in_the_middle_and_go_on(open_page: OpenPage) -> None:
    other = open_page()
    press(other, "How often is it right? Run 50 problems ▼")
    page = open_page()
    other.get_by_label("number input for How many").fill("200")
    other.get_by_label("number input for How many").press("Tab")
    press(other, "Run problems")
    expect(other.get_by_text("of 200 problems answered")).to_be_visible()

    field(page, "Problem").fill(LONG)
    page.evaluate(STOP_AT_ONCE)
    press(page, "Solve")
    tuned = side(page, "With adapters")
    expect(tuned).to_contain_text("tokens so far")
    expect(page.locator(".generating, .pending")).to_have_count(0)
    stopped = tuned.locator(".resa").inner_text()
    answered = other.get_by_text("of 200 problems answered").inner_text()
    expect(other.get_by_text("of 200 problems answered")).not_to_have_text(answered)
    assert tuned.locator(".resa").inner_text() == stopped

    other.get_by_role("button", name="Stop", exact=True).last.click()
    for visitor in (page, other):
        field(visitor, "Problem").fill(PROBLEM)
        press(visitor, "Solve")
        expect(side(visitor, "With adapters")).to_contain_text("✓ right answer 0")
    expect(other.get_by_text("of 200 problems answered")).to_be_visible()


def test_two_visitors_see_their_own(open_page: OpenPage) -> None:
    visitors = {"5-7+2+4+9 mod 10": open_page(), "4+2*5-7 mod 10": open_page()}  # 3; and 4+2=6; 6*5=0; 0-7=3
    for problem, page in visitors.items():
        field(page, "Problem").fill(problem)
        press(page, "Solve")
    traces = {"5-7+2+4+9 mod 10": "5-7=8;8+2=0;0+4=4;4+9=3", "4+2*5-7 mod 10": "4+2=6;6*5=0;0-7=3"}
    for problem, page in visitors.items():
        expect(side(page, "With adapters").get_by_text(traces[problem], exact=True)).to_be_visible()
        go_to(page, "Look inside")
        press(page, "Take the last answer from Solve")
        expect(field(page, "Text")).to_have_value(
            re.compile(re.escape(problem) + r"(.|\n)*" + re.escape(traces[problem]))
        )
    third = open_page()
    go_to(third, "Look inside")
    press(third, "Take the last answer from Solve")
    expect(message(third)).to_have_text("Nothing is solved yet: go to Solve first.")
