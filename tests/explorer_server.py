"""The explorer in a process of its own, as a Space or `resa-hf demo --open` starts it."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

APP = Path(__file__).parents[1] / "spaces" / "resa-explorer" / "app.py"


class ExplorerServer:
    """`python app.py RESULTS ...` on a free port of this machine; `with ExplorerServer(...) as server:` stops it.

    Attributes:
        url (`str`):
            The page's address, the same after a restart.
        process (`subprocess.Popen`):
            What runs now.
    """

    def __init__(self, results: Sequence[Path], log: Path, app: Path = APP, **env: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, str(app), *map(str, results)]
        self._env = {**os.environ, "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
        self._env |= {"GRADIO_ANALYTICS_ENABLED": "False", "PYTHONUNBUFFERED": "1", **env}
        self._log = log
        self.process = self._start()

    def __enter__(self) -> "ExplorerServer":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    @property
    def log(self) -> str:
        """All that the processes have printed."""
        return self._log.read_text(errors="replace")

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """As a machine that goes away: without a warning."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def restart(self) -> None:
        """Starts it again at the same address, after `kill` or before."""
        self.kill()
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            process = subprocess.Popen(self._command, env=self._env, stdout=log, stderr=subprocess.STDOUT)
        limit = time.monotonic() + 60
        while not self._answers():
            if process.poll() is not None or time.monotonic() > limit:
                process.kill()
                raise RuntimeError(f"{' '.join(self._command)} did not come up:\n{self.log}")
            time.sleep(0.05)
        return process

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url, timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False
