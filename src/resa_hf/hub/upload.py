"""A folder to the Hub, as one commit: all of it is there afterwards, or nothing."""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import PublishError
from .retries import patiently, publish_errors

# No pickle is among them: training_args.bin, optimizer.pt and their like stay here.
KINDS = (".safetensors", ".json", ".jinja", ".md", ".model", ".png", ".txt", ".yaml")
SPACE_KINDS = (*KINDS, ".py", ".whl")
LICENCE_FILE = re.compile(r"(LICENSE|NOTICE)[\w-]*(\.md|\.txt)?", re.ASCII)
MANIFEST = "published.json"
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")


def check_repo_id(repo_id: str) -> None:
    """
    Raises:
        `PublishError`: for what cannot be a repository's name; a folder is named after it, too.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} is not the name of a repository: {error}") from None
    if "/" not in repo_id:
        raise PublishError(f"{repo_id!r} is not the name of a repository: owner/name.")


def publishable(folder: Path, kinds: Collection[str] = KINDS) -> dict[str, Path]:
    """
    The files of a folder that may go up: those of a known kind, and licences. Hidden ones, and all others, stay where
    they are.

    Args:
        folder (`Path`): the folder.
        kinds (collection of `str`, *optional*, defaults to `KINDS`): the suffixes of the known kinds.

    Returns:
        `dict[str, Path]`: by their paths inside the folder, `/` between the parts, sorted.

    Raises:
        `PublishError`: for a link that leads out of the folder.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        is_known = path.suffix in kinds or LICENCE_FILE.fullmatch(path.name) is not None
        if not path.is_file() or not is_known or any(part.startswith(".") for part in inside.parts):
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise PublishError(f"{path} is a link out of {folder}. Put the file itself there, or remove the link.")
        found[inside.as_posix()] = path
    return found


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    branch: str | None = None,
    message: str,
    token: str | None = None,
    repo_type: str = "model",
) -> CommitInfo:
    """
    Uploads the publishable files of a folder as one commit. The repository and the branch are made if missing.
    Safe to repeat: large files that arrived are not sent again; if the branch holds exactly these files, for example
    because the answer to an earlier commit was lost, nothing is done. Writes `published.json`, the list of the files,
    into the folder and the repository. Only what the repository's own `published.json` lists, and the folder no longer
    has, is removed there in the same commit; what others have put there stays.

    Args:
        folder (`Path`), repo_id (`str`):
            What, and the repository, `owner/name`.
        private (`bool`, *optional*, defaults to `False`):
            Make the repository private. One that is there already must be. `False`: as its owner's settings have it.
        branch (`str`, *optional*):
            `None`: `main`. A new one starts where `main` is.
        message (`str`):
            Title of the commit.
        token (`str`, *optional*): `None`: the saved one.
        repo_type (`str`, *optional*, defaults to `"model"`): or `"space"`, which must be there, and may hold code.

    Returns:
        [`~huggingface_hub.CommitInfo`]: the commit; as a `str`, its URL.

    Raises:
        `PublishError`: if nothing was published; the message says why, and what to do.
    """
    check_repo_id(repo_id)
    api, revision = HfApi(token=token), branch or "main"
    with publish_errors(f"{repo_id} was not published.", token):
        files = _listed(folder, SPACE_KINDS if repo_type == "space" else KINDS)
        if repo_type == "model":
            prepare_repo(repo_id, private=private, token=token)
        parent = patiently(lambda: _head(api, repo_id, revision, repo_type))
        additions = {name: CommitOperationAdd(name, str(path)) for name, path in files.items()}

        def commit() -> CommitInfo:
            head = _head(api, repo_id, revision, repo_type)
            there = _remote_files(api, repo_id, head, repo_type)
            changed = [add for name, add in additions.items() if not _is_same(there.get(name), files[name])]
            if not changed:
                url = f"{api.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}/commit/{head}"
                return CommitInfo(commit_url=url, commit_message=message, commit_description="", oid=head)
            if head != parent:
                raise PublishError(
                    f"{repo_id} was not published: somebody else has committed meanwhile. Look at it, then run the "
                    "same command again."
                )
            stale = _stale(api, repo_id, head, there, repo_type)
            gone = [CommitOperationDelete(name) for name in stale if name not in files]
            return api.create_commit(
                repo_id,
                [*changed, *gone],
                commit_message=message,
                repo_type=repo_type,
                revision=revision,
                parent_commit=parent,
            )

        return patiently(commit)


def _listed(folder: Path, kinds: Collection[str]) -> dict[str, Path]:
    """The publishable files, and the list of them."""
    files = {name: path for name, path in publishable(folder, kinds).items() if name != MANIFEST}
    if not files:
        raise PublishError(f"{folder} holds nothing to publish ({', '.join(kinds)}).")
    for path in files.values():
        if path.suffix not in (".safetensors", ".png") and _TOKEN.search(path.read_bytes()):
            raise PublishError(f"{path} holds what looks like an access token of the Hub. Take it out first.")
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"library": "resa-hf", "files": sorted(files)}, indent=1))
    return {**files, MANIFEST: manifest}


def prepare_repo(repo_id: str, *, private: bool, token: str | None = None) -> None:
    """
    Makes a repository, if it is missing.

    Args:
        repo_id (`str`), private (`bool`), token (`str`, *optional*): as in [`upload`].

    Raises:
        `PublishError`: if it cannot be made, or is public and should be private.
    """
    with publish_errors(f"{repo_id} was not published.", token):
        patiently(lambda: _make_repo(HfApi(token=token), repo_id, private))


def _make_repo(api: HfApi, repo_id: str, private: bool) -> None:
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        # False would overrule an organisation that makes its repositories private.
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.model_info(repo_id)
    if private and not info.private:
        raise PublishError(
            f"{repo_id} is public, and --private was asked for; nothing was uploaded. Make it private on the Hub, or "
            "name another repository."
        )


def _head(api: HfApi, repo_id: str, branch: str, repo_type: str) -> str:
    """The commit at the head of the branch, which is made if missing."""
    try:
        sha = api.repo_info(repo_id, revision=branch, repo_type=repo_type).sha
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=branch, repo_type=repo_type, exist_ok=True)
        sha = api.repo_info(repo_id, revision=branch, repo_type=repo_type).sha
    assert sha is not None, "asked for with every answer"
    return sha


def _remote_files(api: HfApi, repo_id: str, commit: str, repo_type: str) -> dict[str, RepoFile]:
    tree = api.list_repo_tree(repo_id, recursive=True, revision=commit, repo_type=repo_type)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _is_same(there: RepoFile | None, here: Path) -> bool:
    """Whether a file of the repository has the content of a local one: by size, and sha256 or git's blob id."""
    if there is None or there.size != here.stat().st_size:
        return False
    if there.lfs is None:
        content = here.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == there.blob_id
    with here.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == there.lfs.sha256


def _stale(api: HfApi, repo_id: str, commit: str, there: Mapping[str, RepoFile], repo_type: str) -> list[str]:
    """What an earlier upload has put into the repository."""
    if MANIFEST not in there:
        return []
    path = Path(api.hf_hub_download(repo_id, MANIFEST, revision=commit, repo_type=repo_type))
    try:
        return [name for name in json.loads(path.read_text())["files"] if name in there]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PublishError(f"{MANIFEST} in {repo_id} is damaged. Delete it there, then run again.") from None
