"""Shared by the criteria of activations: hooks on the projections that read a block's structures. Torch alone.

The output of a structure enters one projection: that of a key/value group enters ``o_proj``, that of a channel enters
``down_proj``. Those are the weights with a member along dimension 1, and their inputs are what is watched.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gisp_hf.criteria.base import Criterion, Needs, Sums
from gisp_hf.models.layout import Block, Layout, Member
from gisp_hf.models.shards import whole
from gisp_hf.models.wrapped import dense_weight
from gisp_hf.upstream import in_backward


class ActivationCriterion(Criterion):
    """A criterion from the inputs of ``o_proj`` and ``down_proj``. A subclass gives `statistics` and `scores`.

    Passes in eval mode or without gradients do not count, so an evaluation in the middle of a run changes nothing. Nor
    do tokens that a two-dimensional ``attention_mask``, given by keyword, leaves out.
    """

    needs: Needs = "activations"

    def statistics(self, inputs: torch.Tensor) -> torch.Tensor:
        """What adds up over tokens: inputs of one projection, float32 of shape ``(n, length)``, -> float32."""
        raise NotImplementedError

    @contextmanager
    def watch(self, model: nn.Module, layout: Layout, *, micro_batches: int = 0) -> Iterator[None]:
        self.model = model
        self._totals: dict[str, torch.Tensor] = {}  # parameter -> statistics since the last call of `sums`
        self._mask: torch.Tensor | None = None  # of the batch under way
        names = dict.fromkeys(name for block in layout.blocks for name in self.watched(block))
        # The inner model: PEFT calls the forward function of the outer one past its hooks.
        inner = getattr(model, "base_model", model)
        handles = [inner.register_forward_pre_hook(self._take_mask, with_kwargs=True)]
        try:
            for name in names:
                handles.append(self.hook(name))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._totals, self._mask = {}, None

    def _take_mask(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None

    def watched(self, block: Block) -> list[str]:
        """What is watched for a block: names under which statistics are kept."""
        return [member.parameter for member in readers(block)]

    def hook(self, name: str) -> RemovableHandle:
        """Watches one of these: calls `see` in every forward pass that counts."""

        def see(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            if not (module.training and torch.is_grad_enabled()):
                return None
            inputs = self.see(name, args[0])
            return None if inputs is None else (inputs, *args[1:])

        return self.model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(see)

    def see(self, parameter: str, inputs: torch.Tensor) -> torch.Tensor | None:
        """Takes in the inputs of one projection, shape ``(B, T, length)``, during a forward pass that counts.

        Returns:
            what the projection gets in their place; None: nothing changes.
        """
        if in_backward():  # activation checkpointing runs a layer a second time: each token counts once
            return None
        # Autocast would turn the float32 products back into half precision.
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            self.add(parameter, self.statistics(self._tokens(inputs)))
        return None

    def _tokens(self, inputs: torch.Tensor) -> torch.Tensor:
        """The tokens that count, float32: (B, T, length) -> (n, length)."""
        if self._mask is not None and self._mask.shape == inputs.shape[:-1]:
            return inputs[self._mask.to(inputs.device).bool()].float()
        return inputs.flatten(0, -2).float()

    def add(self, parameter: str, values: torch.Tensor) -> None:
        known = self._totals.get(parameter)
        self._totals[parameter] = values if known is None else known.add_(values)

    def sums(self, layout: Layout, blocks: Sequence[int]) -> Sums:
        names = [(number, name) for number in blocks for name in self.watched(layout.blocks[number])]
        for _, name in names:
            if name not in self._totals:
                raise ValueError(
                    f"{name} has seen no training pass: its input counts only in train mode with gradients on"
                )
        found = {(number, name): self._totals[name] for number, name in names}
        self._totals = {}
        return found

    def weight(self, parameter: str, device: torch.device) -> torch.Tensor:
        """A weight in float32, gathered over the ranks if it is sharded: (d, length)."""
        return whole(dense_weight(self.model, parameter)).to(device, torch.float32)


def readers(block: Block) -> list[Member]:
    """The members through which a block's structures are read: columns of ``o_proj`` or ``down_proj``."""
    return [member for member in block.members if member.dim == 1]
