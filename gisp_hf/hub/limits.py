"""A time limit for the requests of a push. huggingface_hub sets none, and its client is shared by the whole process."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import httpx

from gisp_hf.upstream import add_request_hook

_limits: list[float] = []  # of the pushes that are under way; threads of the client must see them too


def check_timeout(timeout: float) -> float:
    """The timeout, if it is a positive number of seconds.

    Raises:
        ValueError: if not.
    """
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout}; 60 suits most connections")
    return timeout


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Inside, no request of huggingface_hub waits longer than this for a connection or for the next bytes.

    A large upload that makes progress is therefore never cut. Limits that a request has already, such as those of the
    user's own client, stay. Outside, requests are as they were. hf_xet has limits of its own (``HF_XET_CLIENT_*``).
    """
    add_request_hook(_limit)
    _limits.append(seconds)
    try:
        yield
    finally:
        _limits.remove(seconds)


def _limit(request: httpx.Request) -> None:
    limits = tuple(_limits)
    if limits:
        known = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            step: min(limits) if known.get(step) is None else known[step]
            for step in ("connect", "read", "write", "pool")
        }
