"""Private parts of other libraries, where no public part does the same. A test for each notices a change."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.utils import _http, get_session, httpx
from peft.utils import constants as peft_constants
from torch import nn
from transformers import DynamicCache, TrainerCallback
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


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The key/value cache as an argument of the model's forward pass, by the name that this transformers has for it.

    transformers 5.23: ``past_key_values``; later ``cache``, where the old name warns.
    """
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    return {name: cache}


def add_to_notebook(handler: CallbackHandler | None, columns: Mapping[str, Any]) -> None:
    """Adds columns to the next line of the table that the Trainer shows in a notebook.

    transformers 5.24: ``NotebookProgressCallback`` writes the loss alone, but its table takes any column.
    """
    for callback in [] if handler is None else handler.callbacks:
        tracker = getattr(callback, "training_tracker", None)
        if tracker is not None:
            write = type(tracker).write_line
            tracker.write_line = lambda values, tracker=tracker, write=write: write(tracker, {**values, **columns})


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


def teach_peft(model_type: str, pruned_type: str) -> None:
    """Gives a pruned model type what PEFT knows of its family: the modules of LoRA, IA3 and other adapters.

    PEFT 0.21 keeps one table a method, by model type, and has no function to add to them.
    """
    for name, table in vars(peft_constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and model_type in table:
            table.setdefault(pruned_type, table[model_type])
    peft_constants.TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING[pruned_type] = _fit_prefix  # type: ignore


def _fit_prefix(states: tuple[torch.Tensor, ...]) -> DynamicCache:
    """The cache that prefix tuning starts from, with as many key/value heads as each layer has.

    PEFT 0.21 makes the same number for all layers, and cuts them to size for Gemma 4 alone. It hands its
    post-processing the tensors and nothing else: the caller's frame is the only way to the model.

    Args:
        states: per layer, keys and values of shape ``(2, B, K, T, h)``, with ``K`` of the unpruned model.
    """
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    config = frame.f_back.f_locals["base_model"].config
    cache = DynamicCache(config=config)
    for number, (layer, (keys, values)) in enumerate(zip(config.per_layer_config, states)):
        heads = slice(layer.num_key_value_heads)
        cache.update(keys[:, heads], values[:, heads], number)
    return cache
