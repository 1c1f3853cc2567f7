"""A Hub that accepts the connection and then says nothing: every request of a push ends in time."""

import os

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # read when huggingface_hub is imported

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import close_session, set_client_factory
from huggingface_hub.utils import _http, get_session, httpx

from gisp_hf.hub import PushError
from gisp_hf.hub.limits import time_limit
from tests.hub_server import HubServer
from tests.test_hub_push import NAMES, REPO, TOKENS, assert_complete, make_run, push, uploader

# The client's own, in the upload of every LFS file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TIMEOUT = 0.3  # seconds
TRIES = 3  # fewer than outside tests, to save time


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(TOKENS) as server:
        yield server


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits up to 8 s between its own tries, which are six for an upload or a listing."""
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr("gisp_hf.hub.repository.TRIES", TRIES)


def error_of(action: Callable[[], object], *, seconds: float = 60.0) -> BaseException | None:
    """What ``action`` raises; fails if it has not ended in time."""
    found: list[BaseException] = []

    def work() -> None:
        try:
            action()
        except (PushError, OSError, ValueError, httpx.HTTPError) as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"still waiting after {seconds} s"
    return found[0] if found else None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path", "what"),
    [
        ("POST", "/repos/create", "the repository"),
        ("GET", "/refs", "the branches"),
        ("GET", "/tree/", "commit"),
        ("POST", "/branch/", NAMES[0]),
        ("PUT", "/storage/", NAMES[0]),
        ("POST", "/commit/sparsity", NAMES[0]),
        ("POST", "/commit/main", "main"),
    ],
)
def test_silence_ends_in_an_error(hub: HubServer, run: Path, method: str, path: str, what: str) -> None:
    hub.hang(method, path, times=math.inf)
    waits: list[float] = []
    error = error_of(lambda: push(hub, run, timeout=TIMEOUT, wait=waits.append))
    assert isinstance(error, PushError) and len(waits) == TRIES - 1
    assert f"{REPO}, {what}" in str(error) and "Timeout" in str(error) and f"({TRIES} tries)" in str(error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/repos/create"),
        ("POST", "/preupload/"),
        ("POST", "/objects/batch"),
        ("PUT", "/storage/"),
        ("POST", "/objects/verify"),
        ("POST", "/commit/"),
        ("POST", "/tag/"),
    ],
)
def test_silence_that_passes_costs_a_try(hub: HubServer, run: Path, method: str, path: str) -> None:
    hub.hang(method, path)
    assert error_of(lambda: push(hub, run, tag="v1", timeout=TIMEOUT)) is None
    assert_complete(hub, run)


@pytest.mark.slow
def test_uploader_is_limited_too(hub: HubServer, run: Path) -> None:
    background = uploader(hub, timeout=TIMEOUT)
    hub.hang("POST", f"/commit/{NAMES[0]}", times=math.inf)
    background.submit(0.2, run / NAMES[0])
    error = error_of(lambda: background.finish(run))
    assert isinstance(error, PushError) and "Timeout" in str(error)


@pytest.mark.parametrize("timeout", [0, -1.0, math.inf, math.nan])
def test_timeout_must_be_seconds(hub: HubServer, run: Path, timeout: float) -> None:
    with pytest.raises(ValueError, match=f"timeout must be a positive number of seconds, got {timeout}"):
        push(hub, run, timeout=timeout)


@pytest.mark.slow
def test_upload_that_makes_progress_is_not_cut() -> None:
    """24 MB that are taken a megabyte at a time, for three times the limit."""
    size, step, pause = 24 * 2**20, 2**20, 0.1
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)  # little is taken before it is read
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def take() -> None:
            connection, _ = listener.accept()
            with connection:
                left = size
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(2**10)
                left -= len(head.partition(b"\r\n\r\n")[2])
                while left > 0:
                    time.sleep(pause)
                    taken = 0
                    while taken < step and left > 0:
                        got = len(connection.recv(min(step, left)))
                        taken, left = taken + got, left - got
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=take, daemon=True).start()
        start = time.monotonic()
        with time_limit(8 * pause):
            answer = get_session().put(f"http://127.0.0.1:{listener.getsockname()[1]}/", content=bytes(size))
        assert answer.status_code == 200 and time.monotonic() - start > 16 * pause


def timeouts_seen(seen: list[dict]) -> Callable[[], httpx.Client]:
    """A user's own factory: 7 s to read, no other limit."""
    transport = httpx.MockTransport(lambda request: seen.append(request.extensions["timeout"]) or httpx.Response(200))
    return lambda: httpx.Client(transport=transport, timeout=httpx.Timeout(None, read=7.0))


def test_limits_of_the_users_own_client_stay() -> None:
    seen: list[dict] = []
    set_client_factory(timeouts_seen(seen))
    try:
        with time_limit(60.0):
            get_session().get("http://hub/a")
            close_session()  # as the library does after an error of the connection
            get_session().get("http://hub/b")
            get_session().get("http://hub/c", timeout=None)  # as listings ask
        get_session().get("http://hub/d")
    finally:
        set_client_factory(_http.default_client_factory)
    limited = {"connect": 60.0, "read": 7.0, "write": 60.0, "pool": 60.0}
    assert seen[:2] == [limited] * 2 and seen[2] == dict.fromkeys(limited, 60.0)
    assert seen[3] == {"connect": None, "read": 7.0, "write": None, "pool": None}


def test_shortest_limit_counts_while_pushes_overlap() -> None:
    seen: list[dict] = []
    set_client_factory(timeouts_seen(seen))
    try:
        with time_limit(60.0):
            with time_limit(5.0):
                get_session().get("http://hub/a")
            get_session().get("http://hub/b")
    finally:
        set_client_factory(_http.default_client_factory)
    assert [timeout["connect"] for timeout in seen] == [5.0, 60.0]
