"""The protocol of a criterion: the worth of structures, from what a run shows of them. Torch alone.

A new criterion is one new file beside this one, and one row in ``gisp_hf/pruning/methods.py``; or, from outside the
package, a subclass and `gisp_hf.pruning.methods.register_method`.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from gisp_hf.models.layout import Layout, Member

Needs = Literal["weights", "activations", "activation_gradients", "weight_gradients"]

# (number of the block, name) -> a float32 tensor that adds up over processes and shards
Sums = Mapping[tuple[int, str], torch.Tensor]


class Criterion:
    """Tells what structures are worth; the lowest go first.

    The engine calls `watch` once, for the length of the run, and then in every pass `sums` and `scores`. It adds the
    sums up over processes in between, normalises the scores and ranks them. A criterion therefore knows nothing of
    processes, of the removal order, or of earlier removals: ``layout`` is always that of the model as it is now.

    Attributes:
        needs: what the sums are made of. ``weights``: nothing of the data, so that one scoring serves the whole run.
            ``activations``: a forward pass on each process's share of the data. ``activation_gradients``: a backward
            pass through activations too; scores are to be proportional to the loss, which the processes scale up.
            ``weight_gradients``: ``.grad`` of every parameter of the blocks.
    """

    needs: Needs = "weights"

    def watch(self, model: nn.Module, layout: Layout, *, micro_batches: int = 0) -> AbstractContextManager[Any]:
        """Starts to look at ``model``: puts hooks in, where any are needed, and takes them out on exit.

        Args:
            layout: its blocks that can lose structures; those of protected layers are left out. Numbers of blocks, as
                in the other calls, do not fit this layout.
            micro_batches: backward passes that make up one calibration pass; 0 if that is not known.
        """
        self.model = model
        return nullcontext()

    def sums(self, layout: Layout, blocks: Sequence[int]) -> Sums:
        """Raw sums of what this process saw since the last call, for the blocks of these numbers; then starts anew.

        Raises:
            ValueError: if the pass has not given what the criterion needs.
        """
        raise NotImplementedError

    def scores(self, layout: Layout, blocks: Sequence[int], sums: Sums) -> list[torch.Tensor]:
        """Per block, in the order of ``blocks``: float32 scores of shape ``(block.size,)``, not normalised.

        By default the sums of a block are added up.
        """
        return [torch.stack([part for (owner, _), part in sums.items() if owner == n]).sum(dim=0) for n in blocks]


def share_out(entries: torch.Tensor, member: Member, size: int) -> torch.Tensor:
    """Adds up entries along a member's dimension structure by structure: (length,) -> (size,)."""
    rows = member.rows(torch.arange(size, device=entries.device))  # (size, width)
    return entries[rows].sum(dim=1)


def sum_to_entries(
    values: torch.Tensor, dim: int, *, first_row: int = 0, total_rows: int | None = None
) -> torch.Tensor:
    """Sums a tensor of a parameter's shape over all dimensions but ``dim``.

    Args:
        values: float32, of the parameter's shape, or of some rows of it.
        first_row, total_rows: if it holds some rows only: where they begin, and how many the whole has. The results of
            all parts add up to that of the whole.

    Returns:
        float32 of shape ``(length of the whole along dim,)``.
    """
    if values.ndim > 1:
        values = values.sum(dim=[other for other in range(values.ndim) if other != dim])
    if dim == 0 and total_rows is not None and len(values) < total_rows:
        whole = values.new_zeros(total_rows)
        whole[first_row : first_row + len(values)] = values
        return whole
    return values
