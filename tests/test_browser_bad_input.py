"""What visitors should not type, and a server that goes away: each has its message, and the page goes on working."""

import re

import pytest
from explorer_page import PROBLEM, choose, close_message, field, go_to, message, press, side
from explorer_server import ExplorerServer
from explorer_visitors import OpenPage
from playwright.sync_api import Page, TimeoutError, expect

pytest_plugins = ("explorer_visitors",)
pytestmark = pytest.mark.slow
MARKUP = "<script>window.ran=1</script><img src=x onerror=window.ran=1>"
PATHS = ["/etc/passwd", "../../etc/passwd", MARKUP]


def assert_refused(page: Page, button: str, told: str | re.Pattern[str]) -> None:
    """After the button there is a message with these words, as text, and no trace."""
    ask(page, button)
    expect(message(page)).to_contain_text(told)
    assert "Traceback" not in message(page).inner_text()
    assert message(page).locator("*").count() == 0
    close_message(page)


def ask(page: Page, button: str) -> None:
    """Presses it until the press counts: one that comes before the last answer has quite ended does nothing."""
    for last in (False,) * 20 + (True,):
        try:
            with page.expect_request(lambda request: "/queue/join" in request.url, timeout=1000):
                press(page, button)
            return
        except TimeoutError:
            if last:
                raise


def assert_works(page: Page) -> None:
    go_to(page, "Solve")
    field(page, "Problem").fill(PROBLEM)
    expect(field(page, "Problem")).to_have_value(PROBLEM)
    ask(page, "Solve")
    expect(side(page, "With adapters")).to_contain_text("✓ right answer 0")
    assert page.evaluate("window.ran") is None


def test_problems(open_page: OpenPage) -> None:
    page = open_page()
    press(page, "How often is it right? Run 50 problems ▼")  # what is filled at once is emptied as it opens
    problem, tuned = field(page, "Problem"), side(page, "With adapters")
    problem.fill("")
    assert_refused(page, "Solve", "There is no problem: type one.")
    problem.fill("\x01\x02")
    assert_refused(page, "Solve", "There is no problem: type one.")
    problem.fill("7" * 100_000)
    assert_refused(page, "Solve", "The problem has 100,000 characters; at most 4,000 are read.")
    problem.fill("1+1")
    field(page, "Right answer").fill("7" * 501)
    assert_refused(page, "Solve", "The right answer has 501 characters; at most 500 are read.")
    field(page, "Right answer").fill(MARKUP)
    for text in ("七加八等于几", "كم يساوي ٧ + ٨", "🙂👩‍👩‍👧", MARKUP):
        problem.fill(text)
        ask(page, "Solve")
        expect(page.locator(".pending")).to_have_count(0)  # so what is shown is this problem's
        expect(tuned).to_contain_text(re.compile(r"\d+ tokens(?! so far)"))
    assert page.locator("[onerror]").count() == 0
    field(page, "Right answer").fill("")
    field(page, "Problems of your own").fill(f"1+1\t2\n{MARKUP}")
    assert_refused(page, "Run problems", "Line 2 is neither a question, a tab and its answer")
    assert_works(page)


@pytest.mark.parametrize(
    "name", [PATHS[0], *(pytest.param(path, marks=pytest.mark.long) for path in PATHS[1:]), "nobody/nothing"]
)
def test_names(open_page: OpenPage, name: str) -> None:
    page = open_page()
    told = "nobody/nothing" if name == "nobody/nothing" else "on the Hub: "
    choose(page, "Model", name)
    assert_refused(page, "Solve", told)
    choose(page, "Model", "tiny reasoner")
    choose(page, "Adapters", name)
    assert_refused(page, "Solve", told)
    page.get_by_role("combobox", name="Adapters").press("Backspace")
    go_to(page, "Look inside")
    sae = page.get_by_role("combobox", name="SAE").input_value()
    choose(page, "SAE", name)
    for button in ("Read the text", "Show examples of the latent", "Solve the problem with the latent changed"):
        assert_refused(page, button, told)
    choose(page, "SAE", sae)
    field(page, "Hookpoint").fill(name)
    assert_refused(page, "Read the text", "has no SAE at")
    go_to(page, "Results")
    choose(page, "Result", name)
    assert_refused(page, "Show the report", told)
    assert_works(page)


def test_tokens_and_latents(open_page: OpenPage) -> None:
    page = open_page()
    panel = go_to(page, "Look inside")
    text = field(page, "Text")
    for label, numbers in {"Token": ("-1", "99999"), "Latent": ("-1", "99999")}.items():
        for number in numbers:
            field(page, label).fill(number)
            assert_refused(page, "Read the text", re.compile(rf"{label.lower()} (is )?{number}\b"))
        field(page, label).fill("")
    assert_refused(page, "Show examples of the latent", "No latent is given")
    assert_refused(page, "Solve the problem with the latent changed", "No latent is given")
    text.fill("")
    assert_refused(page, "Read the text", "The text has 0 tokens")
    text.fill("7" * 100_000)
    assert_refused(page, "Read the text", "tokens that the model knows; wanted: 1 to")
    text.fill(f"1+1 七 ٧ 🙂 \x01 {MARKUP}")
    press(page, "Read the text")
    expect(panel.locator(".resa-tokens").first).to_contain_text("window.ran=1")
    assert panel.locator("[onerror]").count() == 0
    assert_works(page)


@pytest.mark.long
def test_the_server_is_killed_and_started_again(
    open_page: OpenPage, server: ExplorerServer, errors: list[str]
) -> None:
    page = open_page()
    server.kill()
    press(page, "Solve")
    expect(page.get_by_test_id("toast-body").or_(page.get_by_text("Connection"))).not_to_have_count(0)
    server.restart()
    page.reload()
    assert_works(page)
    # What the browser says of a server that does not answer.
    refused = [error for error in errors if "ERR_" in error or "Failed to fetch" in error]
    assert refused
    errors[:] = [error for error in errors if error not in refused]
