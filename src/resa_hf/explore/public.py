"""Public repositories on the Hub: what they hold, and those files of them that are wanted."""

import glob
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from ..downloads import hub_errors
from ..errors import ExploreError
from .names import hub_name, hub_uri

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublicFolder:
    """A public model repository at one commit, or a folder in it.

    Args:
        name (`str`): as [`~resa_hf.explore.names.hub_name`] spells it.
        repo (`str`), commit (`str`), folder (`PurePosixPath`): where it is.
        sizes (`dict[str, int]`): bytes of each file below the folder, by its path from there.
    """

    name: str
    repo: str
    commit: str
    folder: PurePosixPath
    sizes: dict[str, int]

    def fetch(self, wanted: Collection[str], max_bytes: int) -> Path:
        """Downloads files, or finds them in the cache.

        Args:
            wanted (collection of `str`): paths from the folder; those that are not there are left out.
            max_bytes (`int`): of all of them together.

        Returns:
            `Path`: the folder on this machine. It may hold other files that were fetched before.

        Raises:
            `ExploreError`: if none is there, or they are larger, or may not be read, or the disk is full.
            `ConnectionError`: if the Hub cannot be reached.
        """
        present = [path for path in wanted if path in self.sizes]
        if wanted and not present:
            raise ExploreError(f"{self.name!r} holds none of these: {', '.join(wanted)}.")
        size = sum(self.sizes[path] for path in present)
        if size > max_bytes:
            raise ExploreError(
                f"{self.name!r} takes {size / 1e6:,.1f} MB; this server reads at most {max_bytes / 1e6:,.1f} MB."
            )
        with _hub_errors(self.name, self.repo, self.commit):
            root = snapshot_download(
                self.repo,
                revision=self.commit,
                allow_patterns=[glob.escape((self.folder / path).as_posix()) for path in present],
                token=False,
            )
        return Path(root, self.folder)


def public_folder(text: str, what: str) -> PublicFolder:
    """Asks the Hub what a visitor's name is; nothing is downloaded yet.

    The server's own token is not used, or visitors could read what only its owner may.

    Args:
        text (`str`), what (`str`): as in [`~resa_hf.explore.names.hub_uri`].

    Raises:
        `ExploreError`: if there is no such repository, revision or folder, or it is private or gated.
        `ConnectionError`: if the Hub cannot be reached.
    """
    uri = hub_uri(text, what)
    name, folder = hub_name(text, what), PurePosixPath(uri.path_in_repo)
    with _hub_errors(name, uri.id, uri.revision):
        info = HfApi().model_info(uri.id, revision=uri.revision, files_metadata=True, token=False)
    if info.gated:
        raise _gated(name)
    files = {PurePosixPath(file.rfilename): file.size or 0 for file in info.siblings or []}
    sizes = {path.relative_to(folder).as_posix(): size for path, size in files.items() if path.is_relative_to(folder)}
    if not sizes or info.sha is None:
        raise ExploreError(f"The repository {uri.id!r} holds no folder {str(folder)!r}.")
    return PublicFolder(name, uri.id, info.sha, folder, sizes)


@contextmanager
def _hub_errors(name: str, repo: str, revision: str | None) -> Iterator[None]:
    try:
        with hub_errors(repo, revision, ExploreError), _public_errors(name, repo):
            yield
    except ConnectionError:
        raise
    except OSError as error:  # a full disk, for example; its text names a folder
        _logger.exception("%s cannot be fetched", name)
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        raise ExploreError(f"{name!r} cannot be fetched by this server: {reason}.") from None


@contextmanager
def _public_errors(name: str, repo: str) -> Iterator[None]:
    try:
        yield
    except OfflineModeIsEnabled:
        raise ExploreError(
            f"{name!r} cannot be asked for: the Hub is switched off on this server (HF_HUB_OFFLINE)."
        ) from None
    except GatedRepoError:
        raise _gated(name) from None
    except RepositoryNotFoundError:
        raise ExploreError(f"There is no public repository {repo!r} on the Hub.") from None


def _gated(name: str) -> ExploreError:
    return ExploreError(
        f"{name!r} is gated on the Hub: it can be used here only if this server's owner offers it by another name."
    )
