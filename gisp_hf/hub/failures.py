"""Failures of the Hub: temporary or final, the time until the next try, the message for the user."""

import email.utils
import json
import random
import re
import time
from collections.abc import Mapping

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RemoteEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx, parse_ratelimit_headers

from gisp_hf.levels.files import checked_token as checked_token

TRIES = 8
LONGEST_WAIT = 60.0  # seconds between two tries, unless the Hub asks for more
LONGEST_PAUSE = 3600.0  # seconds that the Hub may ask for

_ROOM = "make room in the storage of the user or organisation, or extend it"
_HINTS = {
    401: "log in with `hf auth login`, or give a token that is valid",
    402: _ROOM,
    403: "give a token that may write there, of a member of the organisation if it is one",
    404: "check the name: the user or organisation must exist, and the token must have access",
    413: _ROOM,
}


class PushError(RuntimeError):
    """A push that cannot go on. The message says where, why, and what to do; it holds no token."""


class BranchMoved(Exception):
    """A branch is not where it was a moment ago."""

    def __init__(self) -> None:
        super().__init__("another push is writing to it")


# Besides some statuses. An error page where JSON was expected is no JSON.
_PASSING = (
    *(BranchMoved, ConnectionError, TimeoutError, json.JSONDecodeError),
    *(httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError),
)


def root(error: Exception) -> Exception:
    """What is behind the RuntimeError in which the client wraps any failure of an upload."""
    while type(error) is RuntimeError and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def delay(error: Exception, attempt: int) -> float | None:
    """Seconds until the next try, or None if that would fail likewise.

    Grows exponentially with ``attempt``, which counts from 1, and is random, since pushers that collided must part. The
    Hub may ask for more (``Retry-After``, ``ratelimit``).
    """
    if not _may_pass(error):
        return None
    seconds = min(LONGEST_WAIT, 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.5)
    asked = _asked_to_wait(error.response.headers) if isinstance(error, HfHubHTTPError) else 0.0
    return None if asked > LONGEST_PAUSE else max(seconds, asked)


def describe(error: Exception, token: str) -> str:
    """The reason in one line, without the token, other tokens, or signatures in URLs."""
    if isinstance(error, HfHubHTTPError):
        text = f"status {error.response.status_code}, {error.server_message or error.response.reason_phrase}"
    else:
        plain = isinstance(error, BranchMoved) or type(error) is ValueError
        text = str(error) if plain else f"{type(error).__name__}: {error}"
    text = re.sub(r"hf_[A-Za-z0-9]{6,}", "hf_***", text.replace(token, "***"))
    return " ".join(re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", text).split())[:500]


def way_out(error: Exception) -> str:
    """What the user can do about it, or nothing."""
    status = _status(error)
    if status == 403 and re.search("storage|quota|billing|payment", str(error), re.IGNORECASE):
        status = 402
    return _HINTS.get(status or 0, "")


def _may_pass(error: Exception) -> bool:
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, (RevisionNotFoundError, RemoteEntryNotFoundError)):
        return True  # somebody else has just removed a branch or a file
    status = _status(error)
    if status is not None:
        return status >= 500 or status in (408, 409, 412, 425, 429)
    return isinstance(error, _PASSING) or type(error) is RuntimeError


def _status(error: Exception) -> int | None:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    # hf_xet makes a ConnectionError of any status
    match = re.search(r"HTTP status (?:client|server) error \((\d{3})", str(error))
    return int(match[1]) if match else None


def _asked_to_wait(headers: Mapping[str, str]) -> float:
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    asked = headers.get("Retry-After", "0")
    if asked.isdecimal():
        return float(asked)
    try:
        return email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
    except ValueError:
        return 0.0
