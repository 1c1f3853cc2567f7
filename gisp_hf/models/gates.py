"""Gates: zeros in the activations of structures that are gone, where weights cannot be changed. Torch alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gisp_hf.models.layout import Layout


class Gates:
    """One switch a structure, on the input of the projection that reads it (``o_proj``, ``down_proj``).

    A shut gate sets that input to zero. The output of the model is then that of a model without the structure, and no
    gradient passes through. Weights stay as they are, in any format.

    Args:
        layout: of the model, which keeps its size.

    Raises:
        ValueError: if a kind of structure is read by no projection.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        for block in layout.blocks:
            if not any(member.dim == 1 for member in block.members):
                raise ValueError(f"the structures of {block.name} are read by no projection, where a gate could be put")
        self._used: set[str] = set()  # parameters with a gate that is shut
        # parameter -> which of its columns are shut
        self._shut = {name: torch.zeros(length, dtype=torch.bool) for name, dim, length in layout.lengths() if dim == 1}

    def shut(self, number: int, structures: torch.Tensor) -> None:
        """Shuts the gates of some structures, indices of shape ``(n,)``, of the block of this number."""
        for member in self._layout.blocks[number].members:
            if member.dim == 1:
                columns = self._shut[member.parameter]
                columns[member.rows(structures.to(columns.device)).flatten()] = True
                self._used |= {member.parameter} if len(structures) else set()

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Gates count inside, in training and in evaluation."""
        handles = []
        try:
            for name in self._shut:
                owner = model.get_submodule(name.rpartition(".")[0])
                handles.append(owner.register_forward_pre_hook(self._hook(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def close(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            if name not in self._used:
                return None
            shut = self._shut[name] = self._shut[name].to(args[0].device)
            return (args[0].masked_fill(shut, 0), *args[1:])  # not a product: infinity times zero is not a number

        return close
