"""The private parts of dependencies that we use are still there, and do what we use them for."""

from collections.abc import Iterator

import pytest
from huggingface_hub import close_session, set_client_factory
from huggingface_hub.utils import get_session, httpx
from huggingface_hub.utils._http import default_client_factory

from gisp_hf.upstream import add_request_hook

seen: list[str] = []


def hook(request: httpx.Request) -> None:
    seen.append(str(request.url))


@pytest.fixture(autouse=True)
def own_factory() -> Iterator[None]:
    """A factory of the user's own; the library's afterwards."""
    seen.clear()
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text="mine"))
    set_client_factory(lambda: httpx.Client(transport=transport, timeout=httpx.Timeout(None, read=7.0)))
    yield
    set_client_factory(default_client_factory)


def test_request_hook_is_called_and_the_client_in_use_stays() -> None:
    client = get_session()
    add_request_hook(hook)
    assert get_session() is client and client.get("http://hub/a").text == "mine"
    assert seen == ["http://hub/a"]


def test_request_hook_is_there_once_however_often_it_is_added() -> None:
    add_request_hook(hook)
    add_request_hook(hook)
    get_session().get("http://hub/a")
    close_session()
    add_request_hook(hook)
    get_session().get("http://hub/b")
    assert seen == ["http://hub/a", "http://hub/b"]


def test_later_clients_are_the_users_own_with_the_hook() -> None:
    add_request_hook(hook)
    close_session()  # as the library does after an error of the connection
    assert get_session().get("http://hub/a").text == "mine" and get_session().timeout.read == 7.0
    assert seen == ["http://hub/a"]
