"""What the log of GRPO tells: a table over the run, and its picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.tables import markdown
from ..features.theme import picture, title

# What TRL and the rewards call them, and what people do.
FIGURES = {
    "reward": "reward",
    "completions/mean_length": "length",
    "completions/clipped_ratio": "truncated",
    "completions/malformed": "malformed",
    "kl": "KL(policy, base)",
}
_SHARES = {"completions/clipped_ratio", "completions/malformed"}
WINDOWS = 10

Log = Sequence[Mapping[str, Any]]


def windows(log: Log) -> list[dict[str, Any]]:
    """The run in ten parts: for each its `steps` (first, last) and the means of the rewards and of `FIGURES`.

    Args:
        log (sequence of `Mapping`): Trainer's `log_history`.
    """
    entries = [entry for entry in log if "reward" in entry]
    names = [name for name in FIGURES if any(name in entry for entry in entries)]
    names += [name for name in (entries[0] if entries else {}) if _is_reward(name)]
    parts = np.array_split(np.arange(len(entries)), min(WINDOWS, len(entries))) if entries else []
    return [
        {
            "steps": [entries[part[0]]["step"], entries[part[-1]]["step"]],
            **{name: _mean([entries[i].get(name) for i in part]) for name in names},
        }
        for part in parts
    ]


def _is_reward(name: str) -> bool:
    return name.startswith("rewards/") and name.endswith("/mean")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def log_table(log: Log) -> str:
    """The windows as a Markdown table."""
    found = windows(log)
    names = [name for name in (found[0] if found else {}) if name != "steps"]
    head = ["steps", *(FIGURES.get(name) or name.split("/")[1] for name in names)]
    rows = [["-".join(map(str, part["steps"])), *(_cell(name, part[name]) for name in names)] for part in found]
    return markdown(head, rows) if rows else "Nothing was logged."


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name in _SHARES:
        return f"{value:.1%}"
    return f"{value:.1f}" if name.endswith("length") else f"{value:.4g}" if name == "kl" else f"{value:.3f}"


def plot_log(log: Log, path: Path, subtitle: str) -> None:
    """Draws rewards, lengths and shares over the steps; writes a whole PNG or none.

    Args:
        log (sequence of `Mapping`): Trainer's `log_history`.
        path (`Path`): of the PNG.
        subtitle (`str`): which model and data.
    """
    entries = [entry for entry in log if "reward" in entry]
    steps = [entry["step"] for entry in entries]
    rewards = ["reward", *(name for name in (entries[0] if entries else {}) if _is_reward(name))]
    shares = [name for name in FIGURES if name in _SHARES and any(name in entry for entry in entries)]
    panels = [
        ("reward", rewards if len(rewards) > 2 else rewards[:1]),
        ("tokens", ["completions/mean_length"]),
        ("share", shares),
    ]
    with picture(path, 6.0, dark=False) as (figure, theme):
        title(figure, f"GRPO by step. {subtitle}")
        colours, lines = (theme.main, theme.other, theme.null, theme.ink), ("-", "--", ":", "-.")
        for axes, (label, names) in zip(figure.subplots(len(panels), sharex=True), panels, strict=True):
            for place, name in enumerate(names):
                told = FIGURES.get(name) or name.split("/")[1]
                values = [entry.get(name) if entry.get(name) is not None else np.nan for entry in entries]
                style = {"color": colours[place % 4], "linestyle": lines[place % 4]}
                axes.plot(steps, values, label=told, linewidth=1.4, **style)
            axes.set_ylabel(label)
            if label == "share":
                axes.set_ylim(-0.02, max(0.1, axes.get_ylim()[1]))
            axes.grid(axis="y")
            axes.legend(loc="upper left", fontsize=8)
        axes.set_xlabel("step")
        figure.align_ylabels()
