"""A push that something goes wrong with: refused, repeated, resumed, and never half believed."""

import os

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # read when huggingface_hub is imported

import email.utils
import logging
import math
import multiprocessing
import shutil
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from gisp_hf.hub import PushError, push_levels
from gisp_hf.hub.failures import TRIES, delay, describe
from tests.hub_routes import Endpoints
from tests.hub_server import HubServer
from tests.test_hub_push import (
    EMPTY,
    NAMES,
    REPO,
    SECRET,
    TOKENS,
    assert_complete,
    assert_no_blob_twice,
    contents,
    make_run,
    push,
    uploader,
)

# The client's own, in the upload of every LFS file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(TOKENS) as server:
        yield server


# What will not work is refused


@pytest.mark.parametrize(
    ("repo", "options", "reason"),
    [
        (REPO, {"token": "hf_readerreader"}, "status 403.*give a token that may write"),
        (REPO, {"token": "hf_you"}, "status 403"),
        ("lab/other", {"token": "hf_you"}, "lab/other, the repository: status 403.*of a member of the organisation"),
        (REPO, {"token": "hf_wrongwrong"}, "status 401.*hf auth login"),
        (REPO, {"private": True}, "exists and is public, but private=True"),
    ],
)
def test_impossible_push_fails_before_the_run(hub: HubServer, repo: str, options: dict, reason: str) -> None:
    HfApi(endpoint=hub.url, token=SECRET).create_repo(REPO)
    with pytest.raises(PushError, match=reason):
        uploader(hub, repo, **options)


@pytest.mark.parametrize(
    ("repo", "options", "reason"),
    [
        ("a/b/c", {}, "'a/b/c'.*Give user/name"),
        (REPO, {"token": "hf_cut off\n"}, "the token holds spaces"),
    ],
)
def test_impossible_name_or_token_is_refused(hub: HubServer, repo: str, options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        uploader(hub, repo, **options)
    assert "cut off" not in str(error.value)


def test_member_of_an_organisation_and_bare_name(hub: HubServer) -> None:
    assert uploader(hub, "lab/other").repo_id == "lab/other" and uploader(hub, "bare").repo_id == "me/bare"


@pytest.mark.parametrize(
    ("name", "damage"), [("config.json", None), ("model.safetensors", None), ("trajectory.json", b"{}")]
)
def test_damaged_level_is_refused_before_a_request(
    hub: HubServer, run: Path, tmp_path: Path, name: str, damage: bytes | None
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / NAMES[1] / name).write_bytes(damage) if damage else (folder / NAMES[1] / name).unlink()
    with pytest.raises(ValueError, match=f"{folder / NAMES[1]}.* (lacks {name}; save|cannot be used)"):
        push(hub, folder)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"metrics": {0.25: {"perplexity": 1.0}}}, "metrics has sparsity-0.25, but the levels of"),
        ({"metrics": {0.2: {"perplexity": math.nan}}}, "sparsity-0.20: perplexity is nan; give a finite number"),
        ({"card": {"sparsity-0.2": "x"}}, "card has sparsity-0.2, but the branches are main, sparsity-0.20"),
        *(({"tag": tag}, "cannot be a tag here") for tag in ("main", NAMES[0], "", "a b", "../v", "v.lock", "v1.")),
    ],
)
def test_wrong_argument_is_refused_before_a_request(hub: HubServer, run: Path, options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        push(hub, run, **options)
    assert hub.requests == []


def test_folder_without_levels_is_refused_before_a_request(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match="give the output folder of a"):
            push(hub, folder)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ({"path_regex": f"/commit/{NAMES[1]}", "status": 403}, "status 403, ordered to fail; give a token that may"),
        ({"path_regex": f"/commit/{NAMES[1]}", "status": 413}, "status 413.* make room in the storage"),
        ({"method": "PUT", "nth": 3, "status": 403}, "status 403"),  # a RuntimeError of the client hides it
        ({"path_regex": f"/branch/{NAMES[1]}", "status": 404}, "status 404.* check the name"),
    ],
)
def test_what_will_not_pass_is_raised_at_once(hub: HubServer, run: Path, order: dict, reason: str) -> None:
    hub.fail(**order)
    waits: list[float] = []
    command = f"what the Hub has confirmed stays there, and `gisp-hf push {run} --repo {REPO}` does the rest"
    with pytest.raises(PushError, match=f"^{REPO}, {NAMES[1]}: {reason}.*; {command}$"):
        push(hub, run, wait=waits.append)
    assert waits == []
    assert hub.files(REPO, NAMES[0]) == {**EMPTY, **contents(run / NAMES[0])} and hub.files(REPO) == EMPTY
    push(hub, run)
    assert_complete(hub, run)


def test_gives_up_in_the_end(hub: HubServer, run: Path) -> None:
    hub.fail("POST", f"/commit/{NAMES[0]}", times=math.inf)
    waits: list[float] = []
    with pytest.raises(PushError, match=rf"{NAMES[0]}: status 503.*\({TRIES} tries\); what the Hub"):
        push(hub, run, wait=waits.append)
    assert len(waits) == TRIES - 1
    assert all(0.5 * 2**i <= wait <= min(1.5 * 2**i, 90) for i, wait in enumerate(waits)), waits


def test_the_end_of_a_run_does_not_wait_for_a_hub_that_is_down(hub: HubServer, run: Path) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        time.sleep(0.02)

    push_in_background = uploader(hub, wait=wait)
    hub.fail("POST", "/commit/", times=math.inf)
    for name in NAMES:
        push_in_background.submit(float(name.removeprefix("sparsity-")), run / name)
    with pytest.raises(PushError, match=f"{NAMES[0]}: status 503"):
        push_in_background.finish(run)
    assert len(waits) <= 3 * (TRIES - 1)  # not once more for each level
    hub.faults.clear()
    push_in_background.finish(run)
    assert_complete(hub, run)


def test_no_error_shows_the_token(hub: HubServer, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secrets = ["hf_wrongwrongwrong", "hf_wrong\nwrong", "hf_wrong wrong", "hf_wröng", "wrongwithoutprefix"]
    for secret in secrets:
        with pytest.raises((PushError, ValueError)) as error:
            push(hub, run, token=secret)
        shown = "".join(traceback.format_exception(error.value)) + caplog.text
        assert secret not in shown and repr(secret)[1:-1] not in shown
    assert hub.repos == {}
    said = ValueError(f"at https://host/path?X-Signature=abc with {secrets[-1]} and {SECRET}")
    assert describe(said, secrets[-1]) == "at https://host/path with *** and hf_***"
    with pytest.raises(ValueError, match="there is no token for the Hub; log in with"):
        push(hub, run, token="")


def test_the_hub_says_how_long_to_wait() -> None:
    def waited(status: int, headers: dict[str, str]) -> float | None:
        answer = httpx.Response(status, headers=headers, request=httpx.Request("POST", "http://hub"))
        return delay(HfHubHTTPError("no", response=answer), 1)

    assert waited(429, {"Retry-After": "40"}) == 40
    assert waited(429, {"ratelimit": '"api";r=0;t=55'}) == 56
    assert waited(503, {"Retry-After": email.utils.formatdate(time.time() + 100)}) == pytest.approx(100, abs=5)
    assert 0.5 <= waited(503, {"Retry-After": "soon"}) <= 1.5
    assert waited(429, {"Retry-After": "100000"}) is None
    assert waited(401, {"Retry-After": "1"}) is None
    assert delay(ConnectionError("Request error: HTTP status client error (403 Forbidden), domain: x"), 1) is None
    assert delay(ConnectionError("Request error: HTTP status server error (502 Bad Gateway), domain: x"), 1) >= 0.5


def test_nothing_is_believed_that_the_hub_does_not_hold(
    hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = Endpoints.apply
    with monkeypatch.context() as patch:
        patch.setattr(Endpoints, "apply", lambda *args: None if "tokenizer.json" in args[2]["path"] else apply(*args))
        with pytest.raises(PushError, match=f"{NAMES[0]}: the Hub took the commit, but does not hold .*tokenizer.json"):
            push(hub, run)
    push(hub, run)
    assert hub.files(REPO, NAMES[0]) == {**EMPTY, **contents(run / NAMES[0])}


def test_a_commit_on_top_is_noticed(hub: HubServer, run: Path) -> None:
    def meddle(method: str, path: str) -> None:
        """Somebody else's commit, between a commit and the look at it."""
        if path.endswith(f"/tree/{hub.branches(REPO).get(NAMES[1])}") and len(hub.log(REPO, NAMES[1])) == 2:
            hub.repos[REPO].add_commit(NAMES[1], {}, "meddled", "", "you")

    hub.on_request = lambda method, path: meddle(method, path) if REPO in hub.repos else None
    report = push(hub, run)
    assert [commit.title for commit in hub.log(REPO, NAMES[1])][:2] == [f"Level {NAMES[1]}", "meddled"]
    assert hub.files(REPO, NAMES[1]) == contents(run / NAMES[1])
    assert report.commits[NAMES[1]] == hub.head(REPO, NAMES[1])


# What may pass is done again


def push_as_a_process(url: str, run: str) -> None:
    push_levels(run, REPO, token=SECRET, endpoint=url, progress=False, wait=lambda seconds: None)


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.BaseContext:
    """Processes that have imported everything when they start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_hub_failures"])
    return context


@pytest.mark.slow
@pytest.mark.parametrize("done", [False, True], ids=["asked", "done"])
@pytest.mark.parametrize(
    ("method", "path", "nth"),
    [
        ("POST", "/repos/create", 1),
        ("POST", "/branch/", 2),
        ("PUT", "", 3),
        ("POST", "/commit/sparsity", 1),
        ("GET", "/tree/", 3),  # the look at the second level, after its commit
        ("POST", "/commit/main", 1),
    ],
)
def test_killed_and_resumed(
    processes: multiprocessing.context.BaseContext, run: Path, *, method: str, path: str, nth: int, done: bool
) -> None:
    """Killed while a request is under way, which the Hub has not acted on, or has."""
    with HubServer(TOKENS) as hub:
        process = processes.Process(target=push_as_a_process, args=(hub.url, str(run)))
        (hub.lose_answer if done else hub.drop)(method, path, nth=nth)
        seen = []

        def kill(*request: str) -> None:
            seen.extend([request] if request[0] == method and path in request[1] else [])
            if len(seen) == nth:
                process.kill()

        hub.on_request = kill
        process.start()
        process.join(30)
        assert process.exitcode == -9
        hub.on_request = lambda method, path: None
        time.sleep(0.05)  # what the Hub has begun it ends
        for branch in hub.branches(REPO) if REPO in hub.repos else []:
            files = hub.files(REPO, branch)
            assert files == EMPTY or (done and branch == "main") or files == {**EMPTY, **contents(run / branch)}
        push(hub, run)
        assert_complete(hub, run)
        assert_no_blob_twice(hub)


def test_many_faults_in_one_push(hub: HubServer, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.fail("POST", "/repos/create")
    hub.fail("GET", "/refs", status=500)
    hub.lose_answer("POST", f"/branch/{NAMES[0]}")
    hub.fail("PUT", nth=2)  # which the client repeats itself, after a second
    hub.fail("POST", "/validate-yaml", nth=2)
    hub.fail("POST", f"/commit/{NAMES[0]}", status=429, headers={"Retry-After": "77"})
    hub.lose_answer("POST", f"/commit/{NAMES[1]}")
    hub.drop("POST", f"/commit/{NAMES[2]}")
    hub.fail("POST", f"/commit/{NAMES[3]}", status=412)
    hub.fail("POST", "/commit/main", status=502)
    hub.lose_answer("POST", "/commit/main", nth=2)
    waits: list[float] = []
    report = push(hub, run, wait=waits.append)
    assert all(fault.seen >= fault.nth for fault in hub.faults), hub.faults
    assert_complete(hub, run)  # which also counts the commits
    assert_no_blob_twice(hub)
    assert len(waits) == 10 and waits.count(77.0) == 1 and all(0.5 <= wait <= 12 for wait in waits if wait != 77)
    assert report.sent == (*NAMES, "main")
    assert SECRET not in caplog.text and f"{REPO}, {NAMES[0]}: status 429, ordered to fail; trying again" in caplog.text


def test_two_pushers_at_once(hub: HubServer, run: Path) -> None:
    hub.slow("POST", "/commit/", 0.05)  # so that they meet
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(push, hub, run, wait=lambda seconds: time.sleep(seconds / 20)) for _ in range(2)]
        first, second = (job.result() for job in jobs)
    assert first.commits == second.commits
    assert_complete(hub, run)
    assert 412 in [record.status for record in hub.requests]
