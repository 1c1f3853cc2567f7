"""Uses of private parts of other libraries: each has a test that fails when the part changes."""

from collections.abc import Iterator

import pytest
import torch
from huggingface_hub import close_session, set_client_factory
from huggingface_hub.utils import get_session, httpx
from huggingface_hub.utils._http import default_client_factory
from transformers import Trainer, TrainerCallback, TrainingArguments

from gisp_hf import upstream
from gisp_hf.upstream import add_request_hook
from tests.tiny import tiny_blocks, tiny_model

# ---- handler_of ------------------------------------------------------------------------------------------------------


class FindHandler(TrainerCallback):
    found = None

    def on_init_end(self, args, state, control, **kwargs):
        self.found = upstream.handler_of(self)


def test_a_callback_finds_the_handler_that_calls_it(tmp_path) -> None:
    callback = FindHandler()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(tiny_model(), args, train_dataset=tiny_blocks(2), callbacks=[callback])
    assert callback.found is trainer.callback_handler


def test_nobody_calls_a_callback_outside_a_trainer() -> None:
    assert upstream.handler_of(FindHandler()) is None


# ---- replaced_loss_function ------------------------------------------------------------------------------------------


def loss(logits, labels, vocab_size, **kwargs):
    return logits.sum()


def test_a_replaced_loss_function_leaves_nothing_behind() -> None:
    model = tiny_model()
    before, default = dict(vars(model)), model.loss_function
    with upstream.replaced_loss_function(model, loss):
        assert model.loss_function is loss
        assert vars(model).keys() - before.keys() == {"_loss_function"}  # the private name
    assert dict(vars(model)) == before
    assert model.loss_function is default


def test_a_replaced_loss_function_gives_the_users_own_back() -> None:
    model = tiny_model()
    model.loss_function = loss
    with upstream.replaced_loss_function(model, lambda **kwargs: None):
        assert model.loss_function is not loss
    assert model.loss_function is loss


# ---- add_request_hook ------------------------------------------------------------------------------------------------

seen: list[str] = []


def hook(request: httpx.Request) -> None:
    seen.append(str(request.url))


@pytest.fixture()
def own_factory() -> Iterator[None]:
    """A factory of the user's own; the library's afterwards."""
    seen.clear()
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text="mine"))
    set_client_factory(lambda: httpx.Client(transport=transport, timeout=httpx.Timeout(None, read=7.0)))
    yield
    set_client_factory(default_client_factory)


@pytest.mark.usefixtures("own_factory")
def test_request_hook_is_called_and_the_client_in_use_stays() -> None:
    client = get_session()
    add_request_hook(hook)
    assert get_session() is client and client.get("http://hub/a").text == "mine"
    assert seen == ["http://hub/a"]


@pytest.mark.usefixtures("own_factory")
def test_request_hook_is_there_once_however_often_it_is_added() -> None:
    add_request_hook(hook)
    add_request_hook(hook)
    get_session().get("http://hub/a")
    close_session()
    add_request_hook(hook)
    get_session().get("http://hub/b")
    assert seen == ["http://hub/a", "http://hub/b"]


@pytest.mark.usefixtures("own_factory")
def test_later_clients_are_the_users_own_with_the_hook() -> None:
    add_request_hook(hook)
    close_session()  # as the library does after an error of the connection
    assert get_session().get("http://hub/a").text == "mine" and get_session().timeout.read == 7.0
    assert seen == ["http://hub/a"]


def test_a_backward_pass_is_told_from_a_forward_pass() -> None:
    seen: list[bool] = []
    weight = torch.ones(2, requires_grad=True)
    weight.register_hook(lambda gradient: seen.append(upstream.in_backward()))
    loss = weight.sum()
    seen.append(upstream.in_backward())
    loss.backward()
    assert seen == [False, True] and not upstream.in_backward()
