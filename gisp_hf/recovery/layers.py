"""Runs the decoder layers of a model one at a time, through the model's own code, with one layer's weights in memory.

A *shell* is a model without weights, on the meta device. The weights come from elsewhere: a model in memory, or files.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from gisp_hf.models.discovery import family_of
from gisp_hf.models.layout import Rows
from gisp_hf.models.shards import plain_parameters, whole
from gisp_hf.models.surgery import slice_tensor
from gisp_hf.recovery.batches import model_inputs


class Weights(Protocol):
    """Parameters and stored buffers by name."""

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Name -> tensor, in the dtype in which it is stored."""
        ...


class ModelWeights:
    """The weights of a model in memory.

    Args:
        model: only read. With sharded parameters every process must read the same names in the same order.
        cuts: the rows that count, for a model whose removed structures are zeros (`Layout.rows_kept`).
    """

    def __init__(self, model: nn.Module, cuts: Rows | None = None) -> None:
        self._tensors: dict[str, torch.Tensor] = {**dict(model.named_buffers()), **dict(plain_parameters(model))}
        self._cuts = cuts or {}

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: slice_tensor(whole(self._tensors[name].detach()), self._cuts.get(name, ())) for name in names}


class CutWeights:
    """The rows that a level keeps of other weights (`Layout.rows_kept`), cut as they are read."""

    def __init__(self, weights: Weights, cuts: Rows) -> None:
        self._weights, self._cuts = weights, cuts

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: slice_tensor(t, self._cuts.get(name, ())) for name, t in self._weights.read(names).items()}


class StoredWeights:
    """A copy of a model's weights in host memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: self._tensors[name] for name in names}


def shell_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and config without weights."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


class Reached(Exception):
    """Ends the forward pass of a layer whose later part is not needed."""


class Layers:
    """The decoder layers of one model.

    Args:
        shell: the model without weights; this object owns it from now on.
        weights: of that model.
        device: where layers run.
        dtype: in which they run: that of the weights, or float32.

    Attributes:
        stored: parameter -> dtype in which the weights hold it.
    """

    def __init__(self, shell: PreTrainedModel, weights: Weights, *, device: torch.device, dtype: torch.dtype) -> None:
        self.shell = shell.eval()
        self.weights, self.device, self.dtype = weights, device, dtype
        self.stored: dict[str, torch.dtype] = {}  # of parameters that were loaded once
        self.prefix = family_of(shell).layers
        self._backbone = shell.get_submodule(self.prefix.rpartition(".")[0])
        self.layers = list(shell.get_submodule(self.prefix).children())
        self._embedding = shell.get_input_embeddings()
        for layer in self.layers:
            layer.forward = _hand_on
        inside = {id(module) for layer in self.layers for module in layer.modules()}
        for name, module in self._backbone.named_modules():
            if id(module) not in inside and module is not self._embedding:
                self._load(module, _join(self.prefix.rpartition(".")[0], name), recurse=False)

    def __len__(self) -> int:
        return len(self.layers)

    @torch.no_grad()
    def embed(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> Iterator[torch.Tensor]:
        """What enters the first layer, batch by batch, shape ``(B, T, d)``."""
        name = next(name for name, module in self.shell.named_modules() if module is self._embedding)
        self._load(self._embedding, name)
        found: list[torch.Tensor] = []
        first = self.layers[0]

        def keep(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            found.append(hidden)
            return hidden

        first.forward = keep
        try:
            for batch in batches:
                self._backbone(**_on(model_inputs(batch), self.device), use_cache=False)
                yield found.pop()
        finally:
            first.forward = _hand_on
            self._embedding.to("meta")

    @contextmanager
    def loaded(self, number: int) -> Iterator[nn.Module]:
        """Layer ``number`` with its weights, which are dropped at the end."""
        layer = self.layers[number]
        self._load(layer, f"{self.prefix}.{number}")
        try:
            yield layer
        finally:
            layer.to("meta")

    @torch.no_grad()
    def run(
        self, number: int, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], hooks: "Hooks | None" = None
    ) -> torch.Tensor | None:
        """The output of a loaded layer for one batch; None if a hook has raised `Reached`.

        The model itself makes masks and position embeddings, as in any forward pass: the other layers hand on what
        they are given.
        """
        layer = self.layers[number]
        found: list[torch.Tensor] = []

        def run_layer(_: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            with suppress(Reached):
                found.append(type(layer).forward(layer, hidden, *args, **kwargs))
            return hidden

        layer.forward = run_layer
        with ExitStack() as stack:
            stack.callback(setattr, layer, "forward", _hand_on)
            for module, hook in hooks or ():
                stack.callback(hook(layer.get_submodule(module)).remove)
            rest = {key: value for key, value in model_inputs(batch).items() if key != "input_ids"}
            self._backbone(inputs_embeds=hidden, **_on(rest, self.device), use_cache=False)
        return found[0] if found else None

    def _load(self, module: nn.Module, prefix: str, *, recurse: bool = True) -> None:
        """Gives a module on the meta device its parameters and buffers."""
        for part in module.modules() if recurse else (module,):
            lost = {n: b for n, b in part._buffers.items() if b is not None and n in part._non_persistent_buffers_set}
            for name, buffer in lost.items():
                part._buffers[name] = torch.empty_like(buffer, device=self.device)
            if lost:
                self.shell._init_weights(part)  # rotary frequencies and the like, which no checkpoint holds
        names = [name for name, _ in (*module.named_parameters(recurse=recurse), *_stored(module, recurse=recurse))]
        read = self.weights.read([_join(prefix, name) for name in names])
        for name in names:
            owner, _, own = name.rpartition(".")
            stored = read[_join(prefix, name)]
            self.stored[_join(prefix, name)] = stored.dtype
            tensor = stored.to(self.device, self.dtype)
            part = module.get_submodule(owner)
            if own in part._parameters:
                part._parameters[own] = nn.Parameter(tensor, requires_grad=False)
            else:
                part._buffers[own] = tensor


Hooks = Sequence[tuple[str, Callable[[nn.Module], Any]]]  # module of the layer -> registers a hook, returns its handle


def _hand_on(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _on(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {key: value.to(device) for key, value in batch.items()}


def _stored(module: nn.Module, *, recurse: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that checkpoints hold."""
    for path, part in module.named_modules() if recurse else (("", module),):
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield _join(path, name), buffer
