"""Visitors of the explorer: real pages in Chromium, of a server with small results of every kind.

A test module takes these fixtures by `pytest_plugins = ("explorer_visitors",)`.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from explorer_server import ExplorerServer
from filelock import FileLock
from playwright.sync_api import Browser, Page, expect, sync_playwright

HERE = Path(__file__).parent
OpenPage = Callable[..., Page]
HEIGHTS = {1280: 900, 390: 844}  # a laptop, and a phone held upright

# A busy machine with two cores may think for long; a condition that holds is not waited for.
expect.set_options(timeout=30_000)


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> list[Path]:
    """The folders of a run, a sweep and features, all small and real; made once for all test processes."""
    root = tmp_path_factory.getbasetemp()
    root = (root if worker_id == "master" else root.parent) / "explorer"
    with FileLock(f"{root}.lock"):
        if not (root / "features" / "report.json").is_file():
            command = [sys.executable, str(HERE / "explorer_results.py"), str(root)]
            made = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(HERE)}, capture_output=True, text=True)
            assert made.returncode == 0, made.stderr[-5000:]
    return [root / name for name in ("run", "sweep", "features")]


@pytest.fixture(scope="session")
def _server(results: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExplorerServer]:
    with ExplorerServer(results, tmp_path_factory.mktemp("explorer-server") / "log.txt") as server:
        yield server


@pytest.fixture
def server(_server: ExplorerServer) -> ExplorerServer:
    """The explorer, shared by all tests and running; a test may kill it."""
    if not _server.is_alive:
        _server.restart()
    return _server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The installed Chromium. Per module, since while Playwright runs, `asyncio.run` is refused in this process."""
    path = shutil.which("chromium")
    assert path, "there is no chromium in PATH: run tests/install_chromium.sh"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def errors() -> list[str]:
    """What the pages' consoles show as errors. A test that provokes some takes them out."""
    return []


@pytest.fixture
def open_page(server: ExplorerServer, chromium: Browser, errors: list[str]) -> Iterator[OpenPage]:
    """`open_page(path="/", width=1280, dark=False)`: a new visitor's page, once the app is shown.

    Afterwards the test fails if a console has shown an error, or a page has asked for anything of another host.
    """
    contexts = []

    def open_one(path: str = "/", *, width: int = 1280, dark: bool = False) -> Page:
        context = chromium.new_context(
            viewport={"width": width, "height": HEIGHTS[width]},
            color_scheme="dark" if dark else "light",
            has_touch=width == 390,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda said: errors.append(f"{said.text} ({said.location})") if said.type == "error" else 0)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda asked: errors.append(asked.url) if not _is_own(asked.url, server.url) else 0)
        mark = "&" if "?" in path else "?"
        page.goto(f"{server.url}{path}{mark}__theme={'dark' if dark else 'light'}")
        expect(page.get_by_role("tab").first).to_be_visible()
        # Until all parts are loaded, and the address is read, what a visitor fills is emptied again.
        page.wait_for_load_state("networkidle")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not errors, "\n".join(errors)


def _is_own(url: str, server: str) -> bool:
    return url.startswith((server, "data:", "blob:"))


@pytest.fixture
def violations() -> Callable[[Page], list[str]]:
    """`violations(page)`: what axe-core finds serious or critical, a line each with its first elements."""
    # What is being filled is faint until it is there.
    at_rest = (
        "() => !document.querySelector('.pending') && document.getAnimations().every(a => a.playState != 'running')"
    )

    def found(page: Page) -> list[str]:
        page.wait_for_function(at_rest)
        entries = Axe().run(page).response["violations"]
        return [
            f"{entry['id']}: {entry['help']}: " + "; ".join(node["html"][:150] for node in entry["nodes"][:3])
            for entry in entries
            if entry["impact"] in ("serious", "critical")
        ]

    return found
