"""Sizes of the layers of an elastic model at any sparsity, from its table and its removal order. Torch alone.

This file travels with elastic checkpoints, beside ``modeling_elastic.py``, which explains the table.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

LAYERS = "model.layers"
# kind -> modules of a layer whose rows (0) or columns (1) belong to its structures, the output projection last
PROJECTIONS = {
    "attention": (("self_attn.q_proj", 0), ("self_attn.k_proj", 0), ("self_attn.v_proj", 0), ("self_attn.o_proj", 1)),
    "mlp": (("mlp.gate_proj", 0), ("mlp.up_proj", 0), ("mlp.down_proj", 1)),
}
# kind -> keys of a layer's config; the last one counts its structures
CONFIG_KEYS = {"attention": ("num_attention_heads", "num_key_value_heads"), "mlp": ("intermediate_size",)}


class SizeTable:
    """Counts at any sparsity, from ``config.elastic`` and the removal order."""

    def __init__(self, table: dict[str, Any], order: torch.Tensor) -> None:
        kinds, layers = list(table["sizes"]), range(len(next(iter(table["sizes"].values()))))
        self.blocks = [(layer, kind) for layer in layers for kind in kinds]
        self.sizes = [table["sizes"][kind][layer] for layer, kind in self.blocks]
        self.costs = [table["costs"][kind][layer] for layer, kind in self.blocks]
        self.multiples = [table["multiples"].get(kind, 1) for _, kind in self.blocks]
        self.total = table["total"]
        self.order = order.cpu().split(self.sizes)
        positions = torch.cat(self.order)
        removed = positions >= 0
        owner = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))
        self._owners = owner[removed][positions[removed].argsort()]  # block of each removal, the first one first

    @property
    def highest(self) -> float:
        """The sparsity at the end of the removal order."""
        return self._gone(self._counts_after(len(self._owners))) / self.total

    def counts(self, sparsity: float) -> list[int]:
        """Structures that each block keeps after the fewest removals that reach ``sparsity``.

        Raises:
            ValueError: if it is negative, or beyond the end of the order.
        """
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must lie in [0, 1), got {sparsity:g}; 20 % is written 0.2, full width is 0")
        budget = math.ceil(sparsity * self.total - 1e-6)
        low, high = 0, len(self._owners)
        if self._gone(self._counts_after(high)) < budget:
            raise ValueError(
                f"sparsity {sparsity:g} lies beyond this checkpoint, whose removal order ends at {self.highest:.4f}"
            )
        while low < high:
            middle = (low + high) // 2
            reached = self._gone(self._counts_after(middle)) >= budget
            low, high = (low, middle) if reached else (middle + 1, high)
        return self._counts_after(low)

    def sorted_structures(self, block: int) -> torch.Tensor:
        """Original indices of a block's structures: those that stay first, the one that goes first last."""
        positions = self.order[block]
        last = torch.iinfo(positions.dtype).max
        return torch.where(positions < 0, last, positions).argsort(descending=True, stable=True)

    def _counts_after(self, length: int) -> list[int]:
        gone = torch.bincount(self._owners[:length], minlength=len(self.sizes)).tolist()
        return [
            min(size, -(-(size - n) // multiple) * multiple) if n else size
            for size, n, multiple in zip(self.sizes, gone, self.multiples)
        ]

    def _gone(self, counts: Sequence[int]) -> int:
        return sum((size - count) * cost for size, count, cost in zip(self.sizes, counts, self.costs))


def overrides_of(
    blocks: Sequence[tuple[int, str]], counts: Sequence[int], heads_per_group: int
) -> dict[int | str, dict[str, int]]:
    """``per_layer_config`` of a model with these counts."""
    overrides: dict[int | str, dict[str, int]] = {}
    for (layer, kind), count in zip(blocks, counts):
        sizes = overrides.setdefault(layer, {})
        if kind == "attention":
            sizes["num_attention_heads"] = count * heads_per_group
        sizes[CONFIG_KEYS[kind][-1]] = count
    return overrides


def prefixes(table: SizeTable, counts: Sequence[int]) -> dict[str, tuple[int, int, int]]:
    """Parameter -> (dimension, structures kept, structures stored)."""
    return {
        f"{LAYERS}.{layer}.{path}.{name}": (dim, count, size)
        for (layer, kind), count, size in zip(table.blocks, counts, table.sizes)
        for path, dim in PROJECTIONS[kind]
        for name in ("weight", "bias")
        if dim == 0 or name == "weight"
    }
