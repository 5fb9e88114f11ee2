"""
resa-hf demo: the whole way on the tiny reasoner that ships in the package. No network, no GPU, no account.

    resa-hf demo            in under 10 minutes on two cores
    resa-hf demo --full     more learning rates and problems

It is `resa-hf run` with the recipe recipes/tiny-reasoner/run/demo.yaml, and takes the same flags.
"""

from collections.abc import Sequence

from . import run


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    from .recipe import recipe_path

    rest = [word for word in argv if word != "--full"]
    name = "demo_full" if len(rest) < len(argv) else "demo"
    run.main(rest, recipe_path(f"tiny-reasoner/run/{name}.yaml"), "resa-hf demo")
