"""Orders in which channels go by whole multiples. Torch alone."""

from collections.abc import Mapping, Sequence

import torch

from gisp_hf.models.layout import Layout


def in_multiples(
    layout: Layout, order: Sequence[torch.Tensor], multiples: Mapping[str, int]
) -> list[torch.Tensor]:
    """The same structures in an order in which those of a layer go by whole multiples.

    Rounding up alone gives every layer its remainder back, even one structure short of the next multiple, and all
    layers have to go further to reach the sparsity. Here the next ``multiple`` structures of a layer are one item, and
    items are ranked by the mean position of their structures: a layer gets its remainder back if less than about half
    of the item would be gone, and otherwise loses the rest of it. Items of a kind cost the same, so that this ranking
    solves the knapsack: which items go for a given number of parameters. Items are prefixes of a layer's own order, so
    that levels stay nested.

    Args:
        order: per block, positions, int32 of shape ``(block.size,)``; -1 = never removed.
        multiples: kind -> multiple.

    Returns:
        positions as in ``order``. Structures too few for a whole item come last. An order that goes by these multiples
        already comes back as it is.
    """
    items: list[tuple[float, int, list[int]]] = []
    rest: list[tuple[float, int, list[int]]] = []
    for number, (block, positions) in enumerate(zip(layout.blocks, order)):
        multiple = multiples.get(block.kind, 1)
        gone = int((positions >= 0).sum())
        structures = positions.argsort()[block.size - gone :].tolist()
        start = 0
        while start < gone:
            size = (block.size - start) % multiple or multiple  # the first item leaves a multiple
            item = structures[start : start + size]
            mean = float(positions[item].double().mean())
            (items if len(item) == size else rest).append((mean, number, item))
            start += size
    result = [torch.full_like(positions, -1) for positions in order]
    place = 0
    for _, number, item in sorted(items) + sorted(rest):
        for structure in item:
            result[number][structure] = place
            place += 1
    return result
