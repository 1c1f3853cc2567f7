"""Temporary changes to the model and the arguments, all reverted at the end of a run."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from weakref import WeakSet, ref

from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from gisp_hf.models.shards import plain_parameters

_PRUNED_NOW: WeakSet[nn.Module] = WeakSet()  # models with a run under way


def is_being_pruned(model: nn.Module) -> bool:
    """Whether a run on the model is under way, or was stopped and has not given it back."""
    return model in _PRUNED_NOW


class CalibrationMode:
    """The state of a model during a run. `close` gives everything back; closing again does nothing.

    Freezing what has no score (embeddings, LM head, norms, protected layers) lets the backward pass end at the first
    layer that can be pruned.

    Attributes:
        model: may be replaced by the object that a wrapper puts in its place (FSDP2).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._stack = ExitStack()

    def close(self) -> None:
        self._stack.close()

    def enter(self, context: AbstractContextManager[Any]) -> Any:
        """Takes a context manager into the run: it ends with it."""
        return self._stack.enter_context(context)

    def on_close(self, action: Callable[[], None]) -> None:
        self._stack.callback(action)

    def freeze_all_but(self, names: Iterable[str]) -> None:
        """Gives exactly the named parameters a gradient; at the end, every parameter its own flag and no gradient."""
        flags = {name: parameter.requires_grad for name, parameter in plain_parameters(self.model)}
        # Weak: a wrapper that puts sharded parameters in the place of these frees them.
        same = [(ref(parameter), parameter.requires_grad) for _, parameter in plain_parameters(self.model)]

        def give_back() -> None:
            for name, parameter in plain_parameters(self.model):
                parameter.requires_grad_(flags.get(name, parameter.requires_grad))
                parameter.grad = None
            for reference, flag in same:  # once a layer is gone, another has its names
                if (found := reference()) is not None:
                    found.requires_grad_(flag)

        self.on_close(give_back)
        self.require_gradients(names)

    def require_gradients(self, names: Iterable[str]) -> None:
        """Changes which parameters have a gradient, during the run."""
        wanted = set(names)
        for name, parameter in plain_parameters(self.model):
            parameter.requires_grad_(name in wanted)

    def claim(self) -> None:
        """Makes sure that this is the only run on the model.

        Raises:
            ValueError: if another pruner is at work on it.
        """
        model = self.model
        if model in _PRUNED_NOW:
            raise ValueError("another GISPPruner is pruning this model already; give the Trainer one GISPPruner")
        _PRUNED_NOW.add(model)
        self.on_close(lambda: _PRUNED_NOW.discard(model))

    def keep_modes(self) -> None:
        """Gives every module its train or eval mode back."""
        modes = [(module, module.training) for module in self.model.modules()]

        def give_back() -> None:
            for module, mode in modes:
                module.training = mode

        self.on_close(give_back)

    def switch_off_dropout(self) -> None:
        """Sets every dropout probability to 0. The Trainer puts the model in train mode itself, before each batch."""
        for module in self.model.modules():
            for attribute in ("p", "attention_dropout"):
                value = getattr(module, attribute, None)
                if "dropout" not in attribute and "Dropout" not in type(module).__name__:
                    continue
                if isinstance(value, float) and value > 0:
                    self._stack.callback(setattr, module, attribute, value)
                    setattr(module, attribute, 0.0)

    def switch_off_clipping(self, args: TrainingArguments) -> float:
        """Sets ``max_grad_norm`` to 0, and returns what it was.

        Clipping scales the gradients of each layer pass by another factor, and spreads one NaN over all of them.
        """
        before = args.max_grad_norm or 0.0
        self._stack.callback(setattr, args, "max_grad_norm", args.max_grad_norm)
        args.max_grad_norm = 0.0
        return before
