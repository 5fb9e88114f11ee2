"""What the command line says of errors that are not ours, where it knows what they mean.

Needs the standard library alone: what fails may be the import of torch.
"""

import os
import select
import sys

from .full_memory import is_out_of_memory, what_was_asked

# What gloo says when the other end of a connection has gone; NCCL's errors have a class of their own.
_GONE = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")


def explained(error: BaseException) -> str | None:
    """
    Args:
        error (`BaseException`): what has ended a command.

    Returns:
        `str` or `None`: what to show to people instead of a trace; `None` for what is nobody's fault but ours.
    """
    if is_out_of_memory(error):
        if "Out of memory" in str(error):
            return str(error)
        return (
            f"Out of memory: {what_was_asked(error)}. What takes less: load_in_4bit: true or dtype: bfloat16 for a "
            "model; fewer num_latents, or hookpoints one at a time, for SAEs; half the batch size. What was finished "
            "is kept."
        )
    if "EADDRINUSE" in str(error):
        return (
            f"The port {os.environ.get('MASTER_PORT')} of {os.environ.get('MASTER_ADDR')}, at which processes are to "
            "find each other, is in use: by another job, or by one that has not ended yet. Set another MASTER_PORT "
            "(torchrun --master_port, accelerate launch --main_process_port)."
        )
    if isinstance(error, ValueError | OSError):
        return str(error)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and _of_another_process(error):
        return (
            f"Process {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']} lost another one, which was killed or "
            f"failed: what that one says is the cause. The same command goes on from the last checkpoint. "
            f"({str(error).partition('. ')[0]})"
        )
    return None


def reader_is_gone(error: BaseException) -> bool:
    """Whether what reads our output has ended, as `head` does; then nothing more is written to it."""
    if not isinstance(error, BrokenPipeError):
        return False
    output = select.poll()
    output.register(sys.stdout, 0)
    gone = any(event & select.POLLERR for _, event in output.poll(0))
    if gone:
        # Python would fail at it once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _of_another_process(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in names or any(saying in str(error) for saying in _GONE)
