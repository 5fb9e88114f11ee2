"""How files come to the local Hub and from it: the Git LFS batch API, and `resolve` with ranges.

https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md; huggingface_hub's `lfs.py` and `file_download.py`.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import quote

from hub_http import RefusedError, Reply, Request, commit_of, readable, to_json, writable
from hub_repos import Blob, Commit

if TYPE_CHECKING:
    from hub_server import HubServer


def lfs_batch(hub: "HubServer", request: Request, type: str, name: str) -> Reply:
    writable(hub, request, type, name)
    objects = []
    for asked in request.json["objects"]:
        told = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in hub.large_files:
            upload = {"href": f"{hub.storage}/upload/{asked['oid']}", "header": {}}
            verify = {"href": hub.endpoint + request.path.replace("objects/batch", "verify"), "header": {}}
            told["actions"] = {"upload": upload, "verify": verify}
        objects.append(told)
    reply = to_json({"transfer": "basic", "objects": objects})
    return Reply(200, reply.body, {"Content-Type": "application/vnd.git-lfs+json"})


def lfs_upload(hub: "HubServer", request: Request, oid: str) -> Reply:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise RefusedError(400, "BadDigest: the content does not match its checksum")
    hub.large_files[oid] = request.body
    return Reply()


def lfs_verify(hub: "HubServer", request: Request, type: str, name: str) -> Reply:
    writable(hub, request, type, name)
    stored = hub.large_files.get(request.json["oid"])
    if stored is None or len(stored) != request.json["size"]:
        raise RefusedError(404, "Object does not exist on the server")
    return to_json({})


def resolve(hub: "HubServer", request: Request, type: str, name: str, revision: str, path: str) -> Reply:
    """Where a file lies: small ones under the commit's id on the Hub itself, large ones at the storage."""
    commit, blob = _readable_file(hub, request, type, name, revision, path)
    headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit.id, "X-Linked-Size": str(len(blob.data))}
    if not blob.lfs:
        place = f"/api/resolve-cache/{type or 'model'}s/{name}/{commit.id}/{quote(path)}"
        return Reply(307, b"", headers | {"Location": place})
    hub.large_files[blob.sha256] = blob.data
    place = f"{hub.storage}/{blob.sha256}/{name}/resolve/{commit.id}/{quote(path)}"
    return Reply(302, b"", headers | {"X-Linked-ETag": f'"{blob.sha256}"', "Location": place})


def resolve_cache(hub: "HubServer", request: Request, type: str, name: str, revision: str, path: str) -> Reply:
    """A small file of a commit."""
    commit, blob = _readable_file(hub, request, type, name, revision, path)
    headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
    return ranged(request, blob.data, headers | {"Content-Type": "text/plain; charset=utf-8"})


def _readable_file(
    hub: "HubServer", request: Request, type: str, name: str, revision: str, path: str
) -> tuple[Commit, Blob]:
    repo = readable(hub, request, type, name)
    if repo.gated and request.token != hub.token:
        what = f"Access to {repo.repo_type} {name} is restricted"
        if request.token is None:
            need = "You must have access to it and be authenticated to access it. Please log in."
            raise RefusedError(401, f"{what}. {need}", "GatedRepo")
        ask = f"Visit {hub.endpoint}/{name} to ask for access."
        raise RefusedError(403, f"{what} and you are not in the authorized list. {ask}", "GatedRepo")
    commit = commit_of(repo, revision)
    if path not in commit.files:
        raise RefusedError(404, "Entry not found", "EntryNotFound", commit.id)
    return commit, commit.files[path]


def stored(hub: "HubServer", request: Request, oid: str) -> Reply:
    """A large file at its storage, whose links are signed: a token sent there as well is a leak, and refused."""
    if request.token is not None:
        raise RefusedError(400, "Only one auth mechanism allowed")
    headers = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    return ranged(request, hub.large_files[oid], headers)


def ranged(request: Request, data: bytes, headers: Mapping[str, str]) -> Reply:
    """The whole body, or the part that a Range header asks for (RFC 9110, section 14)."""
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if asked is None or not any(asked.groups()):
        return Reply(200, data, headers)
    first = int(asked[1]) if asked[1] else max(len(data) - int(asked[2]), 0)
    last = min(int(asked[2]), len(data) - 1) if asked[1] and asked[2] else len(data) - 1
    if first > last:
        return Reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    return Reply(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})
