"""When the Hub does not do what it was asked: once more, if that may help; otherwise an error for people."""

import errno
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import httpx

from ..errors import PublishError

T = TypeVar("T")

# 412, the branch has moved: perhaps by our own commit, whose answer was lost. The call looks once more.
_TRANSIENT = (408, 412, 429, 500, 502, 503, 504)
_WAITS = (1.0, 2.0, 4.0)  # seconds; huggingface_hub repeats some calls itself, within each of these
_LONGEST_WAIT = 60.0  # if the Hub asks for more, the user decides

_ADVICE = {
    401: "Log in with `hf auth login`, or set HF_TOKEN to a token with write access.",
    403: "The token may not write there. Use one with write access to this repository, or another repository.",
    404: "Is the name right, does its owner exist, and may the token see it?",
    409: "Something else is changing the repository. Run the same command again.",
    412: "Somebody else has committed meanwhile. Look at it, then run the same command again.",
    429: "The Hub limits how often it is asked. Wait, then run the same command again; files that arrived are kept.",
}


def patiently(call: Callable[[], T]) -> T:
    """
    Calls, and calls again after a dropped connection, a 429 (after its Retry-After) or a 5xx; up to four times.

    Args:
        call (`Callable`): safe to repeat.

    Raises:
        What `call` raised last.
    """
    for wait in _WAITS:
        try:
            return call()
        except (httpx.HTTPError, RuntimeError, LocalEntryNotFoundError, json.JSONDecodeError) as error:
            pause = _pause(_cause(error), wait)
            if pause > _LONGEST_WAIT:
                raise
        time.sleep(pause)
    return call()


def _cause(error: Exception) -> BaseException:
    """What a file failed with; huggingface_hub wraps it into a `RuntimeError` (up) or "not found" (down)."""
    return error.__cause__ or error if isinstance(error, RuntimeError | LocalEntryNotFoundError) else error


def _pause(error: BaseException, wait: float) -> float:
    """Seconds to wait; infinite if it is of no use."""
    if isinstance(error, HfHubHTTPError):
        if error.response.status_code not in _TRANSIENT:
            return float("inf")
        asked = error.response.headers.get("Retry-After", "")
        return max(wait, float(asked)) if asked.isdigit() else wait
    # Where an answer should be JSON and is not, a proxy has answered in the Hub's place.
    return wait if isinstance(error, httpx.TransportError | json.JSONDecodeError) else float("inf")


@contextmanager
def publish_errors(failed: str, token: str | None = None) -> Iterator[None]:
    """
    Turns what talking to the Hub raises into a `PublishError` that says what to do, without the token in it.

    Args:
        failed (`str`): what has failed then, as a sentence.
        token (`str`, *optional*): the token, if it is not the saved one.
    """
    try:
        yield
    except PublishError:
        raise
    except (httpx.HTTPError, RuntimeError, OSError, ValueError) as error:
        message = f"{failed} {_told(_cause(error))}"
        for secret in {token, get_token()} - {None, ""}:
            message = message.replace(str(secret), "[token]")
        # The error itself may show signed addresses, and headers with the token.
        raise PublishError(message) from None


def _told(error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError):
        code = error.response.status_code
        usual = "The Hub has trouble. Run the same command again later; files that arrived are kept."
        advice = _ADVICE.get(code, usual if code >= 500 else "")
        return f"The Hub answered {code} ({error.server_message or 'no reason given'}). {advice}".rstrip()
    if isinstance(error, LocalTokenNotFoundError):
        return _ADVICE[401]
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to publish, or use --dry_run."
    if isinstance(error, httpx.HTTPError | json.JSONDecodeError):
        return (
            f"The connection broke ({type(error).__name__}). Run the same command again; files that arrived are kept."
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"The disk is full ({error.filename or error}). Make room, then run the same command again."
    return f"{error}"
