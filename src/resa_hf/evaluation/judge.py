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
from typing import Any

_ALARM = 3  # s, math-verify's own limit, after which the process lives on
_SIX_DIGITS = 1e-5
_LIMIT = 10  # s, after which it ends


def _equal(answer: str, gold: str, tolerance: float) -> bool:
    from math_verify import verify

    try:
        golds, answers = _parsed(gold), _parsed(answer)
        wanted, given = _real(golds), _real(answers)
        if wanted is not None and given is not None:
            # math-verify compares six decimals, in which 1.6e-19 and 9.9e-19 are equal.
            near = bool(abs(given - wanted).evalf() <= (tolerance or _SIX_DIGITS) * abs(wanted).evalf())
            if tolerance or not near:
                return near
        if verify(golds, answers, timeout_seconds=_ALARM):
            return True
        sets = [[_as_set(part) for part in parts] for parts in (golds, answers)]
        return bool(sets != [golds, answers] and verify(*sets, timeout_seconds=_ALARM))
    except Exception:  # whatever a parser makes of a model's text, the answer was not recognised
        return False


def _parses(gold: str) -> bool:
    from sympy import Basic, MatrixBase, nan, zoo

    try:
        # What it cannot read math-verify returns as text. 0/0 and 1/0 are equal to nothing, or to too much.
        return any(isinstance(part, Basic | MatrixBase) and part not in (nan, zoo) for part in _parsed(gold))
    except Exception:
        return False


def _parsed(text: str) -> list[Any]:
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # Without math-verify's removal of units, which differs between its versions: 0.9 takes the m of `37/4 m` for one.
    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    extraction = (LatexExtractionConfig(normalization_config=config), ExprExtractionConfig())
    return [_with_imaginary_unit(part) for part in parse(f"${text}$", extraction, parsing_timeout=_ALARM)]


def _with_imaginary_unit(part: Any) -> Any:
    """math-verify has `i` for a symbol, and 0.9 has two symbols of that name."""
    from sympy import Basic, I, MatrixBase

    if not isinstance(part, Basic | MatrixBase):
        return part
    return part.xreplace({symbol: I for symbol in part.free_symbols if str(symbol) == "i"})


def _real(parsed: list[Any]) -> Any | None:
    """The real number in what math-verify parsed, if it is one; `x = 3` is 3."""
    from sympy import Eq, Expr

    part = parsed[0].rhs if parsed and isinstance(parsed[0], Eq) else next(iter(parsed), None)
    return part if isinstance(part, Expr) and part.is_number and part.is_real else None


def _as_set(part: Any) -> Any:
    """The interval that an inequality of one variable describes; anything else as it is."""
    from sympy import And, Eq, Set
    from sympy.core.relational import Relational

    if isinstance(part, Eq):
        return part.rhs if isinstance(part.rhs, Set) else part
    return part.as_set() if isinstance(part, And | Relational) and len(part.free_symbols) == 1 else part


def main() -> None:
    """Reads `["equal", answer, gold, tolerance]` or `["parses", gold]`, a line each, and writes `true` or `false`."""
    replies, sys.stdout = sys.stdout, sys.stderr
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller; our input ends with it
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    _equal("1", "1", 0.0)
    print("ready", file=replies, flush=True)
    with open(os.devnull, "w") as nowhere:
        sys.stdout = nowhere  # 0.5.2 prints what it cannot parse, which of a training's answers are many
        for line in sys.stdin:
            # A watchdog thread in C: it ends the process even in the middle of an operation in C.
            faulthandler.dump_traceback_later(_LIMIT, exit=True, file=nowhere)
            kind, *texts = json.loads(line)
            reply = _equal(*texts) if kind == "equal" else _parses(*texts)
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
