"""Private interfaces of dependencies: each use has a test that fails when the interface changes."""

from gisp_hf import upstream
from tests.tiny import tiny_model


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
