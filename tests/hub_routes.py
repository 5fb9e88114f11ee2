"""What the local Hub of the tests answers: the part of the Hub's HTTP interface that our clients use.

Sources: huggingface_hub's own requests (`hf_api.py`, `_commit_api.py`), https://huggingface.co/docs/hub/api.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

from hub_cards import card_errors, card_metadata, card_warnings
from hub_files import lfs_batch, lfs_upload, lfs_verify, resolve, resolve_cache, stored
from hub_http import RefusedError, Reply, Request, check_namespace, commit_of, readable, to_json, user_of, writable
from hub_repos import GIT_ATTRIBUTES, Blob, Repo, children, is_large, to_blobs

if TYPE_CHECKING:
    from hub_server import HubServer

TYPE = "(?P<type>model|dataset|space)s"
NAME = "(?P<name>[^/]+/[^/]+)"
WEB_NAME = f"(?:(?P<type>dataset|space)s/)?{NAME}"


def answer(hub: "HubServer", request: Request) -> Reply:
    """The reply to any request; each route's function gets the hub, the request and the path's own parts."""
    try:
        if request.token is not None and request.token not in hub.users:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        for method, pattern, route in ROUTES:
            found = re.fullmatch(pattern, request.path)
            if found and request.method == method:
                parts = {key: unquote(value or "") for key, value in found.groupdict().items()}
                with hub.lock:
                    return route(hub, request, **parts)
        raise RefusedError(404, f"the test Hub has no {request.method} {request.path}")
    except RefusedError as error:
        return error.reply


def whoami(hub: "HubServer", request: Request) -> Reply:
    token = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
    return to_json({"type": "user", "name": user_of(hub, request), "orgs": [], "auth": token})


def validate_yaml(hub: "HubServer", request: Request) -> Reply:
    """As JSON for `HfApi.create_commit`, as text for `RepoCard.validate`."""
    errors, warnings = card_errors(request.json["content"]), card_warnings(request.json["content"])
    status = 400 if errors else 200
    if request.headers.get("Accept") == "text/plain":
        return Reply(status, "\n".join(f"- Error: {message}" for message in errors).encode())
    content = {"errors": errors, "warnings": warnings}
    return to_json({kind: [{"message": message} for message in found] for kind, found in content.items()}, status)


def web_prefix(repo_type: str) -> str:
    return "" if repo_type == "model" else f"{repo_type}s/"


def create_repo(hub: "HubServer", request: Request) -> Reply:
    asked = request.json
    name = f"{asked.get('organization') or user_of(hub, request)}/{asked['name']}"
    repo_type = asked.get("type") or "model"
    check_namespace(hub, request, name)
    if repo_type == "space" and asked.get("sdk") not in ("docker", "gradio", "static"):
        raise RefusedError(400, '"sdk" must be one of [docker, gradio, static]')
    url = f"{hub.endpoint}/{web_prefix(repo_type)}{name}"
    if (repo_type, name) in hub.repos:
        raise RefusedError(409, f"You already created this {repo_type} repo", url=url)
    repo = Repo(name, repo_type, private=bool(asked.get("private")) or asked.get("visibility") == "private")
    repo.hardware = asked.get("hardware") or repo.hardware
    repo.add(to_blobs({".gitattributes": GIT_ATTRIBUTES}), "initial commit")
    hub.repos[repo_type, name] = repo
    return to_json({"url": url, "name": name})


def create_branch(hub: "HubServer", request: Request, type: str, name: str, branch: str) -> Reply:
    repo = writable(hub, request, type, name)
    if branch in repo.branches:
        raise RefusedError(409, f"Reference already exists: refs/heads/{branch}")
    repo.branches[branch] = commit_of(repo, request.json.get("startingPoint", "main")).id
    return to_json({})


def list_refs(hub: "HubServer", request: Request, type: str, name: str) -> Reply:
    repo = readable(hub, request, type, name)
    branches = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": c} for b, c in repo.branches.items()]
    return to_json({"branches": branches, "converts": [], "tags": []})


def list_commits(hub: "HubServer", request: Request, type: str, name: str, revision: str) -> Reply:
    repo = readable(hub, request, type, name)
    commit_of(repo, revision)
    told = {"message": "", "date": "2026-01-01T00:00:00.000Z", "authors": [{"user": name.partition("/")[0]}]}
    return to_json([{"id": commit.id, "title": commit.title, **told} for commit in repo.history(revision)])


def preupload(hub: "HubServer", request: Request, type: str, name: str, revision: str) -> Reply:
    """Which files are large ones, and what the branch holds now, so that unchanged files are left out of a commit."""
    commit = commit_of(writable(hub, request, type, name), revision)
    files = []
    for asked in request.json["files"]:
        large = is_large(asked["path"], asked["size"])
        old = commit.files.get(asked["path"])
        told = {"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        files.append(told | {"oid": old.etag if old else None})
    return to_json({"files": files, "commitOid": commit.id})


def make_commit(hub: "HubServer", request: Request, type: str, name: str, revision: str) -> Reply:
    """One commit of all operations or of none: a refused one leaves the branch where it was."""
    repo = writable(hub, request, type, name)
    if revision not in repo.branches:
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    operations = [json.loads(line) for line in request.body.splitlines()]
    header = operations.pop(0)["value"]
    if header.get("parentCommit") not in (None, repo.branches[revision]):
        raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(commit_of(repo, revision).files)
    for operation in operations:
        apply(hub, files, operation["key"], operation["value"])
    errors = card_errors(files["README.md"].data.decode()) if "README.md" in files else []
    if errors:
        raise RefusedError(400, errors[0])
    commit = repo.add(files, header["summary"], revision)
    url = f"{hub.endpoint}/{web_prefix(type)}{name}/commit/{commit.id}"
    return to_json({"success": True, "commitUrl": url, "commitOid": commit.id, "hookOutput": ""})


def apply(hub: "HubServer", files: dict[str, Blob], key: str, value: Mapping[str, Any]) -> None:
    """One operation of a commit, on the tree `files`."""
    path = value["path"]
    if path.startswith("/") or {"", ".", ".."} & set(path.rstrip("/").split("/")):
        raise RefusedError(400, f"Invalid path: {path}")
    if key == "file":
        files[path] = Blob(base64.b64decode(value["content"]), lfs=False)
    elif key == "lfsFile":
        if value["oid"] not in hub.large_files:
            dangling = "Your push was rejected because an LFS pointer pointed to a file that does not exist"
            raise RefusedError(400, f"{dangling}. Offending file: - {path}")
        files[path] = Blob(hub.large_files[value["oid"]], lfs=True)
    elif key == "deletedFolder":
        for inside in [other for other in files if other.startswith(path.rstrip("/") + "/")]:
            del files[inside]
    elif key == "deletedFile":
        if path not in files:
            raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
        del files[path]
    else:
        raise RefusedError(400, f"the test Hub has no operation {key}")


def repo_info(hub: "HubServer", request: Request, type: str, name: str, revision: str = "") -> Reply:
    repo = readable(hub, request, type, name)
    commit = commit_of(repo, revision)
    readme = commit.files.get("README.md")
    card = (card_metadata(readme.data.decode()) if readme else None) or {}
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
    if request.query.get("blobs"):
        siblings = [{"rfilename": path, **file_entry(path, blob)} for path, blob in commit.files.items()]
    told = {
        "_id": hashlib.sha1(name.encode()).hexdigest()[:24],
        "id": name,
        "author": name.partition("/")[0],
        "sha": commit.id,
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "lastModified": "2026-01-01T00:00:00.000Z",
        "createdAt": "2026-01-01T00:00:00.000Z",
        "tags": card_tags(card),
        "cardData": card or None,
        "siblings": siblings,
    }
    if type == "model":
        told |= {"modelId": name, "library_name": card.get("library_name"), "pipeline_tag": card.get("pipeline_tag")}
    if type == "space":
        told["runtime"] = {"stage": "RUNNING", "hardware": {"current": None, "requested": repo.hardware}}
    return to_json(told)


def card_tags(card: Mapping[str, Any]) -> list[str]:
    """The tags by which the Hub finds a repo, from its card's metadata."""

    def listed(key: str) -> list[str]:
        value = card.get(key) or []
        return value if isinstance(value, list) else [value]

    tags = [card["library_name"]] if card.get("library_name") else []
    tags += listed("tags") + [f"dataset:{name}" for name in listed("datasets")]
    tags += [f"base_model:{name}" for name in listed("base_model")]
    if relation := card.get("base_model_relation"):
        tags += [f"base_model:{relation}:{name}" for name in listed("base_model")]
    return tags + [f"license:{name}" for name in listed("license")] + ["region:us"]


def file_entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": blob.git_id, "blobId": blob.git_id}
    entry["size"] = len(blob.data)
    if blob.lfs:
        large = {"sha256": blob.sha256, "oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
        entry["lfs"] = large
    return entry


def folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}


def list_tree(hub: "HubServer", request: Request, type: str, name: str, revision: str, folder: str = "") -> Reply:
    commit = commit_of(readable(hub, request, type, name), revision)
    recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    folders, files = children(commit.files, folder, recursive)
    if folder and not files and not folders:
        raise RefusedError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
    return to_json([*map(folder_entry, folders), *(file_entry(path, commit.files[path]) for path in files)])


def paths_info(hub: "HubServer", request: Request, type: str, name: str, revision: str) -> Reply:
    """The entries of those paths that exist; the others are left out."""
    commit = commit_of(readable(hub, request, type, name), revision)
    form = "json" not in request.headers.get("Content-Type", "")
    asked = parse_qs(request.body.decode()).get("paths", []) if form else request.json["paths"]
    folders, _ = children(commit.files, "", recursive=True)
    entries = [file_entry(path, commit.files[path]) for path in asked if path in commit.files]
    return to_json(entries + [folder_entry(path) for path in asked if path.rstrip("/") in folders])


API = f"/api/{TYPE}/{NAME}"
REVISION = "(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Reply]]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("POST", "/api/repos/create", create_repo),
    ("POST", f"{API}/branch/(?P<branch>[^/]+)", create_branch),
    ("GET", f"{API}/refs", list_refs),
    ("GET", f"{API}/commits/{REVISION}", list_commits),
    ("POST", f"{API}/preupload/{REVISION}", preupload),
    ("POST", f"/{WEB_NAME}.git/info/lfs/objects/batch", lfs_batch),
    ("POST", f"/{WEB_NAME}.git/info/lfs/verify", lfs_verify),
    ("PUT", "/storage/upload/(?P<oid>[0-9a-f]{64})", lfs_upload),
    ("POST", f"{API}/commit/{REVISION}", make_commit),
    ("GET", API, repo_info),
    ("GET", f"{API}/revision/{REVISION}", repo_info),
    ("GET", f"{API}/tree/{REVISION}", list_tree),
    ("GET", f"{API}/tree/{REVISION}/(?P<folder>.+)", list_tree),
    ("POST", f"{API}/paths-info/{REVISION}", paths_info),
    ("GET", f"/{WEB_NAME}/resolve/{REVISION}/(?P<path>.+)", resolve),
    ("GET", f"/api/resolve-cache/{TYPE}/{NAME}/(?P<revision>[0-9a-f]{{40}})/(?P<path>.+)", resolve_cache),
    ("GET", "/storage/(?P<oid>[0-9a-f]{64})/.+", stored),
]
