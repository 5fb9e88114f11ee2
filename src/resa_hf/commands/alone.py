"""For commands that are one process, and would do everything as often as a launcher starts them."""

import os


def refuse_several(command: str, instead: str) -> None:
    """
    Args:
        command (`str`): its name, with `resa-hf`.
        instead (`str`): what uses several GPUs, as the end of a sentence.

    Raises:
        `ValueError`: if torchrun or `accelerate launch` started this process beside others.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ValueError(
            f"{command} was launched in {processes} processes, and each would do all of it in one folder. Start it "
            f"once, without torchrun or accelerate launch; {instead}"
        )
