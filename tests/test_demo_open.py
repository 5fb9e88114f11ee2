"""`resa-hf demo --open`: what is refused before the demo, and what is started after it."""

import subprocess
import sys
from pathlib import Path

import pytest

from resa_hf.cli import main
from resa_hf.commands import demo


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The flags of the runs that the demo has asked for; each, unless dry, would leave its results in `tmp_path`."""
    calls: list[list[str]] = []

    def run(argv: list[str], *args: object) -> Path | None:
        calls.append(argv)
        return None if "--dry_run" in argv else tmp_path

    monkeypatch.setattr(demo.run, "main", run)
    return calls


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for the app; it notes how it was started in a file beside it."""
    path = tmp_path / "app.py"
    path.write_text(
        "import sys\nfrom pathlib import Path\n\n"
        "def main(results=(), *, open_browser=False):\n"
        "    assert sys.modules[__name__].main is main\n"
        "    Path(__file__).with_name('started').write_text(f'{[str(path) for path in results]} {open_browser}')\n"
    )
    monkeypatch.setattr(demo, "explorer_path", lambda: path)
    return path


def test_the_explorer_starts_on_the_results_after_the_demo(
    ran: list[list[str]], app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: object())
    assert main(["demo", "--open", "--seeds", "0"]) == 0
    assert ran == [["--seeds", "0"]]
    assert app.with_name("started").read_text() == f"['{app.parent}'] True"


@pytest.mark.parametrize("flags", [["--full"], ["--open", "--dry_run"]])
def test_nothing_is_opened_unasked_or_after_a_dry_run(
    ran: list[list[str]], app: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: object())
    assert main(["demo", *flags]) == 0
    assert len(ran) == 1 and not app.with_name("started").exists()


def test_without_gradio_nothing_is_run(
    ran: list[list[str]], app: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert main(["demo", "--open"]) == 2
    assert capsys.readouterr().err == "\nresa-hf demo: --open needs Gradio: pip install 'resa-hf[space]'\n"
    assert not ran and not app.with_name("started").exists()


@pytest.mark.long
def test_the_app_is_found_and_help_tells_of_the_flag() -> None:
    assert demo.explorer_path().is_file() and demo.explorer_path().name == "app.py"
    told = subprocess.run([sys.executable, "-m", "resa_hf.cli", "demo", "--help"], capture_output=True, text=True)
    assert "resa-hf demo --open" in told.stdout
