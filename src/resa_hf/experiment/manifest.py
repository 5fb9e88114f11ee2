"""manifest.json: what ran in a folder, one entry for each time that it was started."""

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..evaluation.cost import current_device
from .folder import MANIFEST, is_first_process, read_json, write_json
from .report import versions


def note_start(folder: Path, settings: dict[str, Any], data: dict[str, Any] | None = None) -> None:
    """
    Adds an entry: when, where, by which command and code, with which settings and data.

    Only the first of several processes writes.

    Args:
        folder (`Path`): the run's output folder.
        settings (`dict`): what it was told, seeds included.
        data (`dict`, *optional*): fingerprints of what it reads, and whatever else tells it.
    """
    if not is_first_process():
        return
    path = folder / MANIFEST
    starts = read_json(path, list) if path.is_file() else []
    entry = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "command": without_secrets(sys.argv),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "device": current_device(),
        "versions": versions(),
        "code": code_state(),
        "settings": settings,
        "data": data or {},
    }
    write_json(path, [*starts, entry])


def without_secrets(words: Sequence[str]) -> list[str]:
    """A command's words, without the values of flags that are tokens, keys or passwords."""
    shown, hide = [], False
    for word in words:
        flag, equals, _ = word.partition("=")
        secret = word.startswith("-") and flag.lower().endswith(("token", "password", "secret", "api_key"))
        shown.append("***" if hide else f"{flag}=***" if secret and equals else word)
        hide = secret and not equals
    return shown


def code_state() -> dict[str, Any]:
    """The commit of this code where it lies in a git repository, and whether files differ from it; or the commit that
    pip installed."""
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        # Of a repository that it belongs to, not of one around a virtual environment.
        _git(here, "ls-files", "--error-unmatch", Path(__file__).with_name("report.py").name)
        return {"commit": commit, "changed": bool(_git(here, "status", "--porcelain", "--", str(here.parent)))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": _installed_commit(), "changed": None}


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, encoding="utf-8", check=True, timeout=30
    )
    return done.stdout.strip()


def _installed_commit() -> str | None:
    told = importlib.metadata.distribution("resa-hf").read_text("direct_url.json")
    return json.loads(told).get("vcs_info", {}).get("commit_id") if told else None
