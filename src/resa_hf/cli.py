"""The command line: `resa-hf COMMAND`. One table from command to module; a command's imports happen when it runs."""

import importlib
import os
import sys
from collections.abc import Sequence

from . import __version__
from .preemption import EXIT_CODE, Preempted, preemption_handled

COMMANDS = {
    "demo": "the whole way on the tiny reasoner that ships in the package: no network, no GPU",
    "run": "the whole way on your own questions and answers: Stage I, Stage II, answers, verdict",
    "compare": "several arms and their controls on the same problems and seeds, in one table",
    "sweep": "a run for every point of a grid: layers, source checkpoints, any field of a recipe",
    "evaluate": "adapters against their base on benchmarks or your own problems: verdict, cost, overlap",
    "features": "which latents are active at the thinking tokens, at which layers, and whether they do anything",
    "publish": "adapters, SAEs and merged models to the Hub, with cards that say what the reports say",
    "train-sae": "Stage I alone: train SAEs on a source model's activations",
    "train-rl": "a source model: GRPO with LoRA, rewarded for right answers",
    "tune": "Stage II alone: train an adapter with a frozen SAE spliced in",
}

# Our commands send nothing to anybody unless a tracker is asked for. Who reads what: the file named behind it.
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub/constants.py; TRL's trainers send through it
    "DO_NOT_TRACK": "1",  # the same file; vllm/usage/usage_lib.py, in servers started from here
    "GRADIO_ANALYTICS_ENABLED": "False",  # gradio/analytics.py, which sends past huggingface_hub's switch
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets/load.py: a request for each dataset loaded, local files too
    "WANDB_ERROR_REPORTING": "False",  # wandb/env.py: reports of its own crashes; sae-lens imports it
}


def usage() -> str:
    """The text of `resa-hf --help`."""
    lines = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
    return (
        f"usage: resa-hf COMMAND [--config FILE.yaml] [options]\n\ncommands:\n{lines}\n\n"
        "resa-hf COMMAND --help tells a command's options."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        `int`: the exit status: 0; 2 for what the user can mend; 130 after Ctrl-C; 75 after SIGTERM, when a checkpoint
        was written and the same command goes on from it.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0
    if args[0] == "--version":
        print(f"resa-hf {__version__}")
        return 0
    if args[0] not in COMMANDS:
        print(f"resa-hf: unknown command {args[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    module = importlib.import_module(f".commands.{args[0].replace('-', '_')}", __package__)
    try:
        with preemption_handled():
            module.main(args[1:])
    except (ValueError, OSError) as error:
        # Messages for people. Whoever needs the trace sets this.
        if os.environ.get("RESA_HF_TRACE"):
            raise
        print(f"\nresa-hf {args[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nresa-hf {args[0]}: interrupted; what was finished is kept.", file=sys.stderr)
        return 130
    except Preempted:
        print(f"\nresa-hf {args[0]}: stopped by SIGTERM; the same command goes on from here.", file=sys.stderr)
        return EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
