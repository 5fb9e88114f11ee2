"""A local Hub for tests: enough of the Hub's HTTP interface for its real clients, and faults on demand.

In memory, on a free port of this machine, without Xet: clients use the Git LFS way (`HF_HUB_DISABLE_XET=1`).
"""

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

from hub_http import Reply, Request
from hub_repos import Repo, to_blobs
from hub_routes import answer

Fault = int | Literal["drop", "drop_body", "drop_reply", "slow"] | Callable[[], object]


@dataclass
class _PlannedFault:
    method: re.Pattern[str]
    path: re.Pattern[str]
    what: Fault
    times: int
    skip: int
    headers: Mapping[str, str]


class HubServer:
    """A Hub in a thread of this process; `with HubServer() as hub:` stops it afterwards.

    Attributes:
        endpoint (`str`):
            The address of the Hub, for `HF_ENDPOINT`.
        token (`str`):
            The token of the owner, who may read and write everything.
        stranger (`str`):
            A valid token of someone who sees no private repo and has no access to gated ones.
        requests (`list[tuple[str, str]]`):
            Method and path, unquoted and without query, of everything asked.
        bytes_sent (`int`):
            How many bytes of bodies were sent.
        pause (`float`, *optional*, defaults to `0.1`):
            Seconds between the ten parts of a slow body.
    """

    token = "hf_" + "OwnerOfTheLocalHub" * 2
    stranger = "hf_" + "SomeoneElse" * 3

    def __init__(self) -> None:
        self.users = {self.token: "me", self.stranger: "stranger"}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.bytes_sent = 0
        self.pause = 0.1
        self.lock = threading.RLock()
        self._faults: list[_PlannedFault] = []
        self._server = _Server(self)
        port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        # Another host name, so that clients treat it as the Hub's storage: metadata is read before the redirect
        # (`huggingface_hub.utils._http._httpx_follow_hub_redirects_with_backoff`), and no token is sent there.
        self.storage = f"http://localhost:{port}/storage"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def create_repo(
        self,
        repo_id: str,
        repo_type: str = "model",
        *,
        files: Mapping[str, bytes | str] | None = None,
        folder: Path | None = None,
        commit: str | None = None,
        gated: bool = False,
        private: bool = False,
    ) -> str:
        """Make a repo whose first commit holds `files` and all files of `folder`.

        Args:
            commit (`str`, *optional*):
                The commit's 40-hex id, so that a pinned revision exists here too. Called again on a repo, another
                one is added, and `main` moves to it.

        Returns:
            `str`: The commit's id.
        """
        found = [path for path in sorted(folder.rglob("*")) if path.is_file()] if folder else []
        contents = {str(path.relative_to(folder).as_posix()): path.read_bytes() for path in found} if folder else {}
        with self.lock:
            repo = self.repos.setdefault((repo_type, repo_id), Repo(repo_id, repo_type))
            repo.private, repo.gated = private, gated
            return repo.add(to_blobs({**contents, **(files or {})}), "initial commit", commit_id=commit).id

    def commit(
        self, repo_id: str, files: Mapping[str, bytes | str], repo_type: str = "model", branch: str = "main"
    ) -> str:
        """Add or replace files in a commit of someone else's; returns its id."""
        with self.lock:
            repo = self.repos[repo_type, repo_id]
            base = repo.find(branch) or repo.find("main")
            tree = {**(base.files if base else {}), **to_blobs(files)}
            return repo.add(tree, "commit from elsewhere", branch).id

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """Path and content of every file that the revision shows; empty if there is no such revision."""
        with self.lock:
            found = self.repos[repo_type, repo_id].find(revision)
            return {path: blob.data for path, blob in found.files.items()} if found else {}

    def commits(self, repo_id: str, repo_type: str = "model", branch: str = "main") -> list[str]:
        """The ids of a branch's commits, newest first."""
        with self.lock:
            return [commit.id for commit in self.repos[repo_type, repo_id].history(branch)]

    def fail(
        self,
        method: str,
        path_regex: str,
        what: Fault,
        *,
        times: int = 1,
        skip: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Let `times` requests fail, after `skip` others, whose method and unquoted path match (`re.search`).

        Args:
            what (`int`, `str` or `Callable`):
                An HTTP status, sent with `headers`; `"drop"`: the connection is closed before anything is done;
                `"drop_body"`: it is closed after half of the body, the request's if it has one, else the reply's
                (a reply without one is not counted); `"drop_reply"`: all is done, but no reply is sent;
                `"slow"`: the reply's body comes in ten parts with `pause` seconds between them; a function: is called
                before the request is answered, as if somebody else had been faster.
        """
        patterns = re.compile(method), re.compile(path_regex)
        with self.lock:
            self._faults.append(_PlannedFault(*patterns, what, times, skip, headers or {}))

    def heal(self) -> int:
        """Forget all planned faults; returns how many of them have not happened yet."""
        with self.lock:
            left = sum(fault.times for fault in self._faults)
            self._faults.clear()
            return left

    def env(self, home: Path) -> dict[str, str]:
        """The environment variables of a fresh process that uses this Hub, with its own cache in `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "TRANSFORMERS_OFFLINE": "0",
        }

    def next_fault(self, method: str, path: str, *, has_body: bool, replied: bool) -> _PlannedFault | None:
        """The planned fault of a request, counted as used; asked once before and once after the reply is made."""
        with self.lock:
            for fault in self._faults:
                late = fault.what in ("drop_reply", "slow") or (fault.what == "drop_body" and not has_body)
                if late != replied or not (fault.method.search(method) and fault.path.search(path)):
                    continue
                if fault.skip:
                    fault.skip -= 1
                elif fault.times:
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        # A client that goes away in the middle is no error of ours.
        with contextlib.suppress(ConnectionError):
            self._serve_one()

    def _serve_one(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        hub = self.server.hub
        hub.requests.append((self.command, path))
        size = int(self.headers.get("Content-Length", 0))
        fault = hub.next_fault(self.command, path, has_body=size > 0, replied=False)
        if fault and fault.what == "drop":
            return self._drop()
        if fault and fault.what == "drop_body":
            self.rfile.read(size // 2)
            return self._drop()
        body = self._read_chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(size)
        if fault and isinstance(fault.what, int):
            return self._send(Reply(fault.what, b'{"error": "a planned fault"}', fault.headers))
        if fault and callable(fault.what):
            fault.what()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        headers = dict(self.headers.items())
        method = "GET" if self.command == "HEAD" else self.command
        reply = answer(hub, Request(method, url.path, parse_qs(url.query), headers, body, token))
        has_reply = bool(reply.body) and self.command != "HEAD"
        late = hub.next_fault(self.command, path, has_body=size > 0 or not has_reply, replied=True)
        if late and late.what == "drop_reply":
            return self._drop()
        self._send(reply, late.what if late else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, reply: Reply, fault: Fault | None = None) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = reply.body[: len(reply.body) // 2] if fault == "drop_body" else reply.body
        step = -(-len(body) // 10) if fault == "slow" else len(body)
        for start in range(0, len(body), max(step, 1)):
            part = body[start : start + step]
            # Before the write: a client that has all it asked for may look before this thread goes on.
            with self.server.hub.lock:
                self.server.hub.bytes_sent += len(part)
            self.wfile.write(part)
            if fault == "slow":
                time.sleep(self.server.hub.pause)
        if fault == "drop_body":
            self._drop()

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
