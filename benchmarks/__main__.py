"""Speed and memory, each beside a baseline in the same run: `python -m benchmarks NAME`; `--help` tells each's."""

import importlib
import sys

NAMES = {
    "stage1": "an SAE's training step beside sparsify's and sae-lens'",
    "stage2": "SAE-Tuning's step beside a plain loop and TRL's divergence",
    "evaluate": "tokens a second of answers, beside lighteval's backend",
    "import": "seconds of `import resa_hf` and of `resa-hf --help`",
    "memory": "predicted and measured peak of both stages",
    "scaling": "cost against tokens, sequence length, latents and hookpoints",
    "soak": "memory and open files over two hours of both stages and evaluations",
}
MODULES = {"evaluate": "evaluation_speed", "import": "import_time"}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print(__doc__, *(f"  {name:10}{told}" for name, told in NAMES.items()), sep="\n")
        sys.exit(0 if sys.argv[1:] in ([], ["-h"], ["--help"]) else 2)
    name = sys.argv[1]
    importlib.import_module(f".{MODULES.get(name, name)}", __package__).main(sys.argv[2:])


if __name__ == "__main__":
    main()
