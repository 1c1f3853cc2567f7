"""Private parts of dependencies that have no public twin: one small function each, with a test that watches it."""

from collections.abc import Callable

from huggingface_hub.utils import _http, get_session, httpx


def add_request_hook(hook: Callable[[httpx.Request], None]) -> None:
    """Calls ``hook`` with every request of huggingface_hub before it is sent; adding it twice changes nothing.

    The library shares one client in the process, and makes a new one after an error of the connection. It has no
    public way to read the factory of clients, which may be the user's own. ``set_client_factory`` would also close the
    client, which other threads may be using.
    """
    client = get_session()
    with _http._CLIENT_LOCK:
        if hook in client.event_hooks["request"]:
            return
        factory = _http._GLOBAL_CLIENT_FACTORY

        def with_hook() -> httpx.Client:
            made = factory()
            if hook not in made.event_hooks["request"]:
                made.event_hooks["request"].append(hook)
            return made

        client.event_hooks["request"].append(hook)
        _http._GLOBAL_CLIENT_FACTORY = with_hook
