"""math-verify in a process of its own, which `answers` starts and talks to in lines of JSON. Imports nothing of ours.

Some answers, such as `9^{9^{9}}`, take math-verify forever. It limits its time by SIGALRM, which works in the main
thread only and stops no long operation in C. Here neither matters to the caller. Old versions cannot do without
SIGALRM, and lighteval 0.13 needs one of those (0.5.2).
"""

import faulthandler
import json
import logging
import os
import signal
import sys

_ALARM = 3  # s, math-verify's own limit, after which the process lives on
_LIMIT = 10  # s, after which it ends


def _equal(answer: str, gold: str) -> bool:
    from math_verify import parse, verify

    try:
        golds, answers = (parse(f"${text}$", parsing_timeout=_ALARM) for text in (gold, answer))
        return bool(verify(golds, answers, timeout_seconds=_ALARM))
    except Exception:  # whatever a parser makes of a model's text, the answer was not recognised
        return False


def main() -> None:
    """Reads `[answer, gold]` and writes `true` or `false`, a line each, until its input ends."""
    replies, sys.stdout = sys.stdout, sys.stderr
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller; our input ends with it
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    _equal("1", "1")
    print("ready", file=replies, flush=True)
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin:
            # A watchdog thread in C: it ends the process even in the middle of an operation in C.
            faulthandler.dump_traceback_later(_LIMIT, exit=True, file=nowhere)
            equal = _equal(*json.loads(line))
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(equal), file=replies, flush=True)


if __name__ == "__main__":
    main()
