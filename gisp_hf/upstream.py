"""Uses of private interfaces of dependencies: one small function each, with a test that notices when it changes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_ABSENT = object()


@contextmanager
def replaced_loss_function(model: nn.Module, loss: Callable[..., Any]) -> Iterator[None]:
    """``model.loss_function = loss`` inside; afterwards the model has what it had, also if that was nothing of its own.

    transformers 5.23: ``PreTrainedModel.loss_function`` has a setter but no deleter, so the attribute behind it has to
    be deleted by its private name.
    """
    own = vars(model).get("_loss_function", _ABSENT)
    model.loss_function = loss  # type: ignore[assignment]
    try:
        yield
    finally:
        if own is _ABSENT:
            del model._loss_function
        else:
            model.loss_function = own
