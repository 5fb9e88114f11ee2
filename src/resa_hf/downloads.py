"""What can go wrong when files come from the Hub, said so that a user knows what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    CacheNotFound,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

_AGAIN = "Start again: files that arrived are kept, and with HF_HUB_OFFLINE=1 they are used without the Hub."


@contextmanager
def hub_errors(repo: str, revision: str | None, error: type[ValueError]) -> Iterator[None]:
    """Turns what huggingface_hub raises into errors for people, without URLs, which may hold signatures.

    Args:
        repo (`str`): what is read.
        revision (`str`, *optional*): its revision.
        error (`type[ValueError]`): raised for what is not there, or may not be read.

    Raises:
        `error`: for a repository or revision that is not there, or not in the cache when offline.
        `ConnectionError`: if the Hub cannot be reached or does not answer as it should.
        `OSError`: if the disk is full.
    """
    try:
        yield
    except RevisionNotFoundError:
        raise error(f"The repository {repo!r} has no revision {revision!r}.") from None
    except GatedRepoError:
        raise error(
            f"The repository {repo!r} is gated: ask for access on its page on the Hub, then run `hf auth login`."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise error(
            f"There is no folder {repo!r} here, and no such repository can be read on the Hub. If it is private, run "
            "`hf auth login` first."
        ) from None
    except (LocalEntryNotFoundError, CacheNotFound, OfflineModeIsEnabled) as cause:
        if constants.HF_HUB_OFFLINE:
            where = repo if revision is None else f"{repo}@{revision}"
            raise error(
                f"There is no folder {repo!r} here, the Hub is switched off (HF_HUB_OFFLINE), and {where} is not "
                "downloaded yet, or not wholly. Do that once while online; files that arrived are kept."
            ) from None
        raise _unreachable(repo, cause.__cause__ or cause) from None
    except (HfHubHTTPError, httpx.HTTPError) as cause:
        raise _unreachable(repo, cause) from None
    except OSError as cause:
        if cause.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC,
            "The disk is full. Make room, then start again: files that arrived are kept. Or set HF_HOME to another "
            "disk.",
            constants.HF_HOME,
        ) from cause


def _unreachable(repo: str, cause: BaseException) -> ConnectionError:
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        login = "Is the token valid, and may it read this? Run `hf auth login`. "
        hint = {401: login, 403: login, 429: "Too many requests: wait a few minutes. "}.get(status, "")
        return ConnectionError(f"The Hub answered {status} when {repo!r} was asked for. {hint}{_AGAIN}")
    return ConnectionError(f"The Hub cannot be reached for {repo!r} ({type(cause).__name__}). {_AGAIN}")
