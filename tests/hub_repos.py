"""What the local Hub of the tests stores: repos, their commits and branches, and large files waiting for a commit."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

# The Hub tells large files by the repo's .gitattributes, which it writes into each new repo, or by their size.
LARGE_SUFFIXES = (".arrow", ".bin", ".ckpt", ".gz", ".npy", ".npz", ".parquet", ".pt", ".pth", ".safetensors", ".zip")
LARGE_SIZE = 10 * 1024 * 1024
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_SUFFIXES)


@dataclass(frozen=True)
class Blob:
    """A file of one commit; `lfs` if its content lies in the large-file storage."""

    data: bytes
    lfs: bool

    @property
    def git_id(self) -> str:
        """git's id of the blob: of the pointer, if the file is a large one."""
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        ).encode()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_id


def is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE_SUFFIXES) or size > LARGE_SIZE


def to_blobs(files: Mapping[str, bytes | str]) -> dict[str, Blob]:
    contents = {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
    return {path: Blob(data, is_large(path, len(data))) for path, data in contents.items()}


@dataclass(frozen=True)
class Commit:
    """A commit: its 40-hex id, its parent's, its title, and all files of the tree."""

    id: str
    parent: str | None
    title: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    """A repo: commits by id, and the branches that point at them."""

    repo_id: str
    repo_type: str
    private: bool = False
    gated: bool = False
    hardware: str = "cpu-basic"  # of a Space
    all_commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, files: Mapping[str, Blob], title: str, branch: str = "main", commit_id: str | None = None) -> Commit:
        """Make a commit of the whole tree `files`, and move the branch to it."""
        parent = self.branches.get(branch)
        if commit_id is None:
            content = repr((self.repo_type, self.repo_id, len(self.all_commits), parent, title))
            commit_id = hashlib.sha1(content.encode()).hexdigest()
        commit = Commit(commit_id, parent, title, dict(files))
        self.all_commits[commit_id] = commit
        self.branches[branch] = commit_id
        return commit

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch or of a full or shortened commit id."""
        revision = self.branches.get(revision.removeprefix("refs/heads/"), revision)
        matches = [commit for name, commit in self.all_commits.items() if name.startswith(revision)]
        return matches[0] if len(revision) >= 7 and len(matches) == 1 else None

    def history(self, revision: str) -> list[Commit]:
        """The commits of a branch, newest first."""
        found, commit = [], self.find(revision)
        while commit is not None:
            found.append(commit)
            commit = self.all_commits[commit.parent] if commit.parent else None
        return found


def children(paths: Iterable[str], folder: str, recursive: bool) -> tuple[list[str], list[str]]:
    """The folders and the files in `folder` ("" for the root), all levels deep if `recursive`."""
    prefix = folder.rstrip("/") + "/" if folder else ""
    inside = sorted(path for path in paths if path.startswith(prefix))
    parents = [str(parent) for path in inside for parent in PurePosixPath(path).parents]
    folders = {parent for parent in parents if parent.startswith(prefix) and parent != "."}
    if not recursive:
        folders = {name for name in folders if "/" not in name[len(prefix) :]}
        inside = [path for path in inside if "/" not in path[len(prefix) :]]
    return sorted(folders), inside
