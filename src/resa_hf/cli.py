"""The command line: `resa-hf COMMAND`. One table from command to module; a command's imports happen when it runs."""

import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__
from .explained import explained, reader_is_gone
from .full_memory import is_out_of_memory, predicted_memory
from .orphans import end_with_parent
from .preemption import EXIT_CODE, Preempted, preemption_handled

CLOSED_PIPE = 141  # 128 and the number of SIGPIPE, as of Ctrl-C it is 130

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
        "resa-hf COMMAND --help tells a command's options.\n\n"
        f"status: 0 done, 2 to be mended by you, 130 after Ctrl-C, {EXIT_CODE} after SIGTERM. What was finished is "
        "kept: the same command\ngoes on from there. In its folder, manifest.json tells each start."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        `int`: the exit status: 0; 2 for what the user can mend; 130 after Ctrl-C; 75 after SIGTERM, when a checkpoint
        was written and the same command goes on from it; 141 where what read its output has ended.
    """
    if "LOCAL_RANK" in os.environ:  # of several that torchrun or accelerate has launched
        end_with_parent()
    args = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A question's characters may be none of the terminal's: no reason to end a run.
        sys.stdout.reconfigure(errors="backslashreplace")
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0
    if args[0] == "--version":
        print(f"resa-hf {__version__}")
        return 0
    if args[0] not in COMMANDS:
        print(f"resa-hf: unknown command {args[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    if strange := [word for word in args if any("\ud800" <= letter <= "\udfff" for letter in word)]:
        print(
            f"resa-hf {args[0]}: {strange[0]!r} is no text in {sys.getfilesystemencoding()}, in which this Python "
            "reads its command line. Set PYTHONUTF8=1, or a UTF-8 locale such as LC_ALL=C.UTF-8.",
            file=sys.stderr,
        )
        return 2
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    module = importlib.import_module(f".commands.{args[0].replace('-', '_')}", __package__)
    try:
        with preemption_handled():
            module.main(args[1:])
        _leave_group()
    except (ValueError, OSError, RuntimeError, MemoryError, ImportError) as error:
        # Messages for people. Whoever needs the trace sets this.
        told = None if os.environ.get("RESA_HF_TRACE") else explained(error)
        if told is None:
            raise
        is_gone, is_full = reader_is_gone(error), is_out_of_memory(error)
    except KeyboardInterrupt:
        print(f"\nresa-hf {args[0]}: interrupted; what was finished is kept.", file=sys.stderr)
        return 130
    except Preempted:
        print(f"\nresa-hf {args[0]}: stopped by SIGTERM; the same command goes on from here.", file=sys.stderr)
        return EXIT_CODE
    else:
        return 0
    if is_gone:
        print(f"\nresa-hf {args[0]}: what read its output has ended; what was finished is kept.", file=sys.stderr)
        return CLOSED_PIPE
    # Only now: the error held what had filled it.
    predicted = (
        predicted_memory(lambda: module.main([*args[1:], "--dry_run"])) if is_full and args[0] != "demo" else ""
    )
    print(f"\nresa-hf {args[0]}: {told}{predicted}", file=sys.stderr)
    return 2


def _leave_group() -> None:
    """Ends what processes that were launched together talk through: its threads may abort a process that just ends."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
