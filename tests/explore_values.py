"""Values that no visitor of the explorer should send, and what they may be told."""

import re
from typing import Any

WRONG_KINDS: list[Any] = [
    None, float("nan"), float("inf"), float("-inf"), -1, 10**400, 2.5, True, [], {}, [1], [["x"]], [None], {"a": 1},
]  # fmt: skip
NAMES = [
    "../../etc/passwd", "/etc/passwd", "C:\\x", "file:///etc/passwd", "hf://datasets/x/y", "https://example.com/x/y",
    "~/x", "./x/y", "a/../../b", "x/y@../../z", "%2e%2e/%2e%2e/etc/passwd",
]  # fmt: skip
TEXTS = [
    "", " \n\t", "x" * 100_000, "مرحبا", "你好", "🙂\u200d", "\x00\x07\x1b[31m", "\u202eabc", "\ud800", "\udfff\ud800",
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{7*7}}", "'; DROP TABLE x; --", "%s%n", *NAMES,
]  # fmt: skip
BAD = [*WRONG_KINDS, *TEXTS]
# A path of this machine, or a trace of Python; what the visitor typed is taken out before.
_INSIDE = re.compile(r"(/work|/root|/home|/tmp|/usr|site-packages|src/resa_hf)\b|Traceback|\.py\b|hf_\w{8}")


def arguments(name: str, sae: str) -> dict[str, Any]:
    """All arguments of a method of the explorer, such that it answers quickly."""
    who = {"model": "tiny reasoner", "adapters": ["source (LoRA and GRPO)"], "strength": 1}
    sampling = {"seed": 0, "temperature": 1, "max_new_tokens": 2}
    where = {"sae": sae, "hookpoint": ""}
    problem = {"problem": "1+1 mod 10"}
    return {
        "solve": {**who, **problem, "right_answer": "", **sampling},
        "accuracy": {**who, "problems": "", "count": 2, **sampling},
        "look": {**who, **where, "text": "1+1", "token": None, "latent": 1},
        "latent": {"model": "tiny reasoner", **where, "latent": 1},
        "change": {**who, **where, "latent": 1, "factor": 0, **problem, **sampling},
        "report": {"result": "x"},
    }[name]


def is_for_people(told: str) -> bool:
    """Whether it is a sentence or two, in which nothing of this machine is told."""
    return 10 < len(told) < 600 and not _INSIDE.search(told)
