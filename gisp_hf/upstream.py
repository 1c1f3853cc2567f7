"""Private parts of other libraries, where no public part does the same. A test for each notices a change."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.utils import _http, get_session, httpx
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


def in_backward() -> bool:
    """Whether this thread is inside a backward pass, as the second forward pass of activation checkpointing is.

    torch 2.13: ``torch.utils.checkpoint`` asks the same function, and there is no public one.
    """
    return torch._C._current_graph_task_id() != -1


@contextmanager
def differentiable_4bit(model: nn.Module) -> Iterator[None]:
    """Keeps 4-bit layers of bitsandbytes in the format that gradients go through.

    bitsandbytes 0.50: on a CPU with AVX512-BF16, a forward pass in evaluation mode without gradients changes the
    weights to another format, for good. A backward pass then gives wrong gradients and no error. Only writing a state
    dict changes them back.
    """
    flag = "support_avx512bf16_for_cpu"
    modules = [module for module in model.modules() if getattr(module, flag, False)]
    try:
        for module in modules:
            setattr(module, flag, False)
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()
        yield
    finally:
        for module in modules:
            setattr(module, flag, True)


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
