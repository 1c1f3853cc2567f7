"""Uses of other libraries' private parts, where no public part does the same. One test each notices a change."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

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


def handler_of(callback: TrainerCallback) -> CallbackHandler | None:
    """The handler that is calling ``callback`` right now, or None.

    The Trainer puts the trackers of ``report_to`` before the callbacks of ``callbacks=[...]``, and hands a callback no
    way to its handler: the caller's frame is the only one. `gisp_hf.prune` knows the Trainer and does without.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, CallbackHandler) and callback in owner.callbacks:
            return owner
        frame = frame.f_back
    return None
