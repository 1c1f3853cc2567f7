"""A small model Hub in memory, served over HTTP to the unmodified ``huggingface_hub`` and ``transformers``.

    with HubServer(tokens={"hf_owner": "me"}) as hub:
        api = HfApi(endpoint=hub.url, token="hf_owner")

It answers what a push and a load ask for, in the shapes, statuses and ``X-Error-Code`` headers of the real Hub. It can
be told to misbehave (``fail``, ``drop``, ``lose_answer``, ``hang``, ``slow``), notes every request that it answers
(``requests``), and shows its contents (``branches``, ``head``, ``files``, ``log``). Large files travel by classic LFS
to a second port, as the real Hub leaves them to a storage host: the client must run with ``HF_HUB_DISABLE_XET=1``.
Model repositories only.
"""

import contextlib
import json
import math
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qsl, unquote

from tests.hub_routes import GIT_ATTRIBUTES, PATTERNS, ROUTES, Commit, Endpoints, Refused, Repo

__all__ = ["GIT_ATTRIBUTES", "HubServer", "Record", "Token"]


class Record(NamedTuple):
    """One request: ``path`` is without the query, sizes are bytes of body, ``status`` is 0 if no answer was sent."""

    method: str
    path: str
    status: int
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True)
class Token:
    """Whose a token is and what it may do: ``role`` is "read" or "write", ``orgs`` are further namespaces."""

    user: str
    role: str = "write"
    orgs: tuple[str, ...] = ()

    def owns(self, repo_id: str) -> bool:
        return repo_id.split("/")[0] in (self.user, *self.orgs)


@dataclass
class Fault:
    """Hits the ``nth`` matching request and those after it, ``times`` in all."""

    kind: str
    method: str
    path_regex: str
    nth: int = 1
    times: float = 1
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    seen: int = 0

    def hits(self, method: str, path: str) -> bool:
        matches = bool(re.fullmatch(self.method, method) and re.search(self.path_regex, path))
        self.seen += matches
        return matches and self.nth <= self.seen < self.nth + self.times


class HubServer:
    """The Hub, from construction until ``close()`` or the end of the ``with`` block.

    A request is picked by ``method``, a pattern for all of it, and ``path_regex``, searched in the path without the
    query: ``hub.fail("POST", "/commit/")``, ``hub.total("PUT|DELETE")``.

    Args:
        tokens: token -> its ``Token``, or just the name of a user who may write.
        page_size: entries a page of the listings of trees and commits.

    Attributes:
        url: what ``HF_ENDPOINT`` must be.
        requests: the requests so far, in the order of their answers; ``requests.clear()`` forgets them.
        faults: the orders to misbehave; ``faults.clear()`` takes them back.
        on_request: called with method and path when the head of a request has come and nothing has been done yet.
    """

    def __init__(self, tokens: Mapping[str, str | Token] | None = None, *, page_size: int = 1000):
        tokens = {"hf_owner": "me"} if tokens is None else tokens
        self.tokens = {key: Token(value) if isinstance(value, str) else value for key, value in tokens.items()}
        self.page_size = page_size
        self.requests: list[Record] = []
        self.on_request: Callable[[str, str], None] = lambda method, path: None
        self.repos: dict[str, Repo] = {}
        self.lock = threading.RLock()
        self.closed = threading.Event()
        self.faults: list[Fault] = []
        handler = type("_HubHandler", (_Handler,), {"hub": self})
        # Another port is another host to the client: it does not follow a HEAD there, and takes its token off.
        self._listeners = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.storage_url = (f"http://127.0.0.1:{listener.server_port}" for listener in self._listeners)
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End what hangs, stop listening, and cut the connections that are open at their next request."""
        self.faults[:] = [Fault("drop", ".*", "", times=math.inf)]
        self.closed.set()
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()

    def environment(self, token: str, home: str) -> dict[str, str]:
        """The variables that make another Python process a client, with its cache in ``home``."""
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": token, "HF_HOME": home, "NO_PROXY": "127.0.0.1", **switches}

    def total(self, method: str = ".*", path_regex: str = "") -> tuple[int, int]:
        """The number of matching requests, and the bytes of body received with them, even if the upload broke off."""
        with self.lock:
            picked = [r for r in self.requests if re.fullmatch(method, r.method) and re.search(path_regex, r.path)]
        return len(picked), sum(record.bytes_in for record in picked)

    def fail(
        self,
        method: str = ".*",
        path_regex: str = "",
        *,
        nth: int = 1,
        times: float = 1,
        status: int = 503,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answer with ``status`` and do nothing; ``times=math.inf`` lasts."""
        self.faults.append(Fault("fail", method, path_regex, nth, times, status, headers or {}))

    def drop(self, method: str = ".*", path_regex: str = "", *, nth: int = 1, times: float = 1) -> None:
        """Read half of the body, then close the connection; nothing is done."""
        self.faults.append(Fault("drop", method, path_regex, nth, times))

    def lose_answer(self, method: str = ".*", path_regex: str = "", *, nth: int = 1, times: float = 1) -> None:
        """Do what was asked, then close the connection without an answer."""
        self.faults.append(Fault("lose", method, path_regex, nth, times))

    def hang(self, method: str = ".*", path_regex: str = "", *, nth: int = 1, times: float = 1) -> None:
        """Read the request, then say nothing until the Hub is closed; nothing is done."""
        self.faults.append(Fault("hang", method, path_regex, nth, times))

    def slow(self, method: str, path_regex: str, seconds: float) -> None:
        """Wait before each matching request."""
        self.faults.append(Fault("slow", method, path_regex, times=math.inf, seconds=seconds))

    def branches(self, repo: str) -> dict[str, str]:
        """Branch -> commit id."""
        with self.lock:
            return dict(self.repos[repo].refs["branch"])

    def tags(self, repo: str) -> dict[str, str]:
        """Tag -> commit id."""
        with self.lock:
            return dict(self.repos[repo].refs["tag"])

    def head(self, repo: str, branch: str = "main") -> str:
        """The id of the newest commit of a branch."""
        return self.branches(repo)[branch]

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content."""
        with self.lock:
            return {path: file.data for path, file in self.repos[repo].find(revision).files.items()}

    def log(self, repo: str, revision: str = "main") -> list[Commit]:
        """The commits of a revision, the newest first."""
        with self.lock:
            return self.repos[repo].history(revision)

    def strike(self, method: str, path: str) -> dict[str, Fault]:
        """Kind -> the fault that this request meets; every fault that matches counts it."""
        with self.lock:
            return {fault.kind: fault for fault in self.faults if fault.hits(method, path)}


class _Handler(Endpoints, BaseHTTPRequestHandler):
    """One connection: ``do_GET`` takes a request of any method from its head to its answer; an endpoint makes that."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body leave in one packet: two would wait for the client's delayed acknowledgement

    def do_GET(self) -> None:
        self.route, _, query = self.path.partition("?")
        self.query, self.status, self.out = dict(parse_qsl(query)), 200, {}
        self.hub.on_request(self.command, self.route)
        faults = self.hub.strike(self.command, self.route)
        time.sleep(faults["slow"].seconds if "slow" in faults else 0)
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length // 2 if "drop" in faults else length)
        if "hang" in faults:
            self.hub.closed.wait()
            self.close_connection = True
            return
        if "drop" in faults or len(self.body) < length:  # a body that ends early: the client was killed
            reply = None
        elif "fail" in faults:
            self.status, self.out, reply = faults["fail"].status, faults["fail"].headers, {"error": "ordered to fail"}
        else:
            reply = self.dispatch()
        self.send_reply(None if "lose" in faults else reply)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def dispatch(self) -> Any:
        with self.hub.lock:
            try:
                for (method, _, need, endpoint), pattern in zip(ROUTES, PATTERNS, strict=True):
                    match = pattern.fullmatch(self.route)
                    if match is not None and method == self.command.replace("HEAD", "GET"):
                        self.parts = {key: unquote(value) for key, value in match.groupdict().items()}
                        self.authorize(need)
                        return getattr(self, endpoint)()
                raise Refused(404, f"no such endpoint: {self.command} {self.route}")
            except Refused as refused:
                self.status, self.out = refused.status, {**self.out, **refused.headers}
                return refused.body

    def authorize(self, need: str | None) -> None:
        """Set ``token`` and ``repo``, or refuse; a private repository looks like a missing one to strangers."""
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        repo_id = self.parts.get("repo", "")
        self.token, self.repo = self.hub.tokens.get(key), self.hub.repos.get(repo_id)
        if need == "storage":
            if key:
                raise Refused(400, "only one auth mechanism allowed: a token came with a signed URL")
            return
        if key and self.token is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        if need in ("read", "write"):
            hidden = self.repo is None or (self.repo.private and not (self.token and self.token.owns(repo_id)))
            if hidden:  # the client takes a 401 without a code for "not found" too, but from https:// alone
                raise Refused(404 if self.token else 401, "Repository not found", code="RepoNotFound")
        if need in ("write", "log in") and self.token is None:
            raise Refused(401, "Invalid username or password.")
        if need == "write":
            self.check_write(repo_id)

    def send_reply(self, reply: Any) -> None:
        """Send the answer, or close the connection if there is none (None)."""
        body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        sent = b"" if self.command == "HEAD" or reply is None else body
        status = 0 if reply is None else self.status
        with self.hub.lock:  # before the answer leaves, so that whoever has the answer finds the record
            self.hub.requests.append(Record(self.command, self.route, status, len(self.body), len(sent)))
        if reply is None:
            self.close_connection = True
            return
        self.send_response(self.status)
        for name, value in {"Content-Type": "application/json", **self.out, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # tests kill clients on purpose
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        """Silent: ``HubServer.requests`` is the log."""
