"""
resa-hf demo: the whole way on the tiny reasoner that ships in the package. No network, no GPU, no account.

    resa-hf demo            in under 10 minutes on two cores
    resa-hf demo --full     more learning rates and problems
    resa-hf demo --open     afterwards the explorer, with the demo's results, in the browser

It is `resa-hf run` with the recipe recipes/tiny-reasoner/run/demo.yaml, and takes the same flags.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

from . import run


def main(argv: Sequence[str]) -> None:
    """Runs the command.

    Raises:
        `ValueError`: for `--open` without the extra `space`, before anything is run; or as `resa-hf run` does.
    """
    from .recipe import recipe_path

    rest = [word for word in argv if word not in ("--full", "--open")]
    if "--open" in argv and find_spec("gradio") is None:
        raise ValueError("--open needs Gradio: pip install 'resa-hf[space]'")
    name = "demo_full" if "--full" in argv else "demo"
    folder = run.main(rest, recipe_path(f"tiny-reasoner/run/{name}.yaml"), "resa-hf demo", __doc__ or "")
    if "--open" in argv and folder is not None:
        _explore(folder)


def explorer_path() -> Path:
    """The explorer's app.py, installed with the package or in a checkout."""
    installed = Path(__file__).parents[1] / "explorer" / "app.py"
    return installed if installed.is_file() else Path(__file__).parents[3] / "spaces" / "resa-explorer" / "app.py"


def _explore(folder: Path) -> None:
    """Serves the explorer until it is interrupted."""
    spec = spec_from_file_location("resa_explorer", explorer_path())
    assert spec is not None and spec.loader is not None, "a Python file"
    # Gradio looks modules up by their names.
    app = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(app)
    app.main([folder], open_browser=True)
