"""GISP's criterion: first-order Taylor, ``sum |w * g|`` over a structure's weights (arXiv 2510.18030, Section 3)."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from gisp_hf.criteria.base import Criterion, Sums, share_out, sum_to_entries
from gisp_hf.models.layout import Layout
from gisp_hf.models.shards import is_sharded, local_rows


def score_entries(
    weight: torch.Tensor, gradient: torch.Tensor, *, dim: int, first_row: int = 0, total_rows: int | None = None
) -> torch.Tensor:
    """``sum |w * g|`` of every row (``dim=0``) or column (``dim=1``) of one parameter.

    Args:
        weight: the parameter, of any floating dtype.
        gradient: its gradient, summed over the whole calibration pass *before* this call: same shape.
        dim: the dimension that stays; 0 for a bias.
        first_row, total_rows: if the two are some rows of the parameter only (`sum_to_entries`).

    Returns:
        float32 of shape ``(length of the whole along dim,)``.

    Raises:
        ValueError: if the shapes differ.
    """
    if weight.shape != gradient.shape:
        raise ValueError(f"weight {tuple(weight.shape)} and gradient {tuple(gradient.shape)} must have the same shape")
    product = weight.detach().to(torch.float32, copy=True).mul_(gradient).abs_()  # a copy: weights stay as they are
    return sum_to_entries(product, dim, first_row=first_row, total_rows=total_rows)


class Taylor(Criterion):
    """``sum |w * g|``: the first-order estimate of how much the loss changes when a structure goes.

    The gradient is that of the mean loss over the whole calibration pass: the absolute value is taken after summing.
    Where the number of backward passes in a calibration pass is known, each parameter is scored inside the last one, as
    soon as its gradient is complete, and the gradient is freed at once.
    """

    needs = "weight_gradients"

    def watch(self, model: nn.Module, layout: Layout, *, micro_batches: int = 0) -> AbstractContextManager[Any]:
        self.model = model
        self._entries: dict[tuple[str, int], torch.Tensor] = {}  # (parameter, dimension) -> scores along it
        self._dims: dict[str, list[int]] = {}
        for block in layout.blocks:
            for member in block.members:
                dims = self._dims.setdefault(member.parameter, [])
                dims += [] if member.dim in dims else [member.dim]
        self._passes: Counter[str] = Counter()  # parameter -> backward passes so far
        # A sharded parameter's gradient is complete only after the hooks of its module.
        early = micro_batches > 0 and not is_sharded(model.parameters())
        return self._score_early(micro_batches) if early else super().watch(model, layout)

    @contextmanager
    def _score_early(self, micro_batches: int) -> Iterator[None]:
        handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(name, micro_batches))
            for name in self._dims
            if (parameter := self.model.get_parameter(name)).requires_grad  # not those of protected layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, micro_batches: int) -> Callable[[torch.Tensor], None]:
        def score_when_complete(parameter: torch.Tensor) -> None:
            self._passes[name] += 1
            if self._passes[name] == micro_batches:
                self._score(name, parameter)

        return score_when_complete

    def _score(self, name: str, parameter: torch.Tensor) -> None:
        """Turns one parameter's gradient into scores, and frees it."""
        assert parameter.grad is not None
        weight, gradient = local_rows(parameter), local_rows(parameter.grad)
        for dim in self._dims[name]:
            self._entries[name, dim] = score_entries(
                weight.tensor, gradient.tensor, dim=dim, first_row=weight.first, total_rows=weight.total
            )
        parameter.grad = None

    def sums(self, layout: Layout, blocks: Sequence[int]) -> Sums:
        found: dict[tuple[int, str], torch.Tensor] = {}
        for number in blocks:
            block = layout.blocks[number]
            for member in block.members:
                name = member.parameter
                if (name, member.dim) not in self._entries:
                    parameter = self.model.get_parameter(name)
                    if parameter.grad is None:
                        raise ValueError(
                            f"{name} has no gradient: the loss does not depend on it, or its backward pass was "
                            "switched off. Pruning needs a loss that runs through every layer, with gradients on"
                        )
                    self._score(name, parameter)
                part = share_out(self._entries[name, member.dim], member, block.size)
                found[number, name] = found[number, name] + part if (number, name) in found else part
        self._entries.clear()
        self._passes.clear()
        return found
