"""Requests and replies of the local Hub, and who may do what."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hub_repos import Commit, Repo

if TYPE_CHECKING:
    from hub_server import HubServer


@dataclass(frozen=True)
class Request:
    """One request: `path` as it was sent, still quoted; `token` of the Authorization header, or None."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    token: str | None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class RefusedError(Exception):
    """A reply other than success, raised from anywhere inside a route."""

    def __init__(
        self, status: int, message: str, code: str | None = None, commit: str | None = None, **fields: Any
    ) -> None:
        told = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        headers = {name: value for name, value in told.items() if value} | {"Content-Type": "application/json"}
        self.reply = Reply(status, json.dumps({"error": message, **fields}).encode(), headers)


def to_json(content: Any, status: int = 200) -> Reply:
    return Reply(status, json.dumps(content, default=str).encode(), {"Content-Type": "application/json"})


def user_of(hub: "HubServer", request: Request) -> str:
    if request.token is None:
        raise RefusedError(401, "Invalid username or password.")
    return hub.users[request.token]


def readable(hub: "HubServer", request: Request, repo_type: str, name: str) -> Repo:
    """The repo, if the request's token may see it. Hidden repos do not exist, and without a token none is told."""
    repo = hub.repos.get((repo_type or "model", name))
    if repo is None or (repo.private and request.token != hub.token):
        if request.token is None:
            raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
        raise RefusedError(404, "Repository not found", "RepoNotFound")
    return repo


def writable(hub: "HubServer", request: Request, repo_type: str, name: str) -> Repo:
    repo = readable(hub, request, repo_type, name)
    check_namespace(hub, request, name)
    return repo


def check_namespace(hub: "HubServer", request: Request, name: str) -> None:
    """The owner may write anywhere, a stranger only under their own name."""
    if user_of(hub, request) != name.partition("/")[0] and request.token != hub.token:
        raise RefusedError(403, f'You don\'t have the rights to write under the namespace "{name.partition("/")[0]}"')


def commit_of(repo: Repo, revision: str) -> Commit:
    commit = repo.find(revision or "main")
    if commit is None:
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit
