"""Which structures go next: scores, costs, a budget and floors -> a removal order. Torch alone.

A *rank* is a structure's position in the removal order, counted from 0; -1 means that it is still there.
"""

import math
from collections.abc import Sequence

import torch

from gisp_hf.config import GISPConfig, protected_layers
from gisp_hf.models.layout import Block, Layout


def floors(layout: Layout, config: GISPConfig) -> list[int]:
    """Structures that each block must keep: all of a protected block's, the configured minimum of the others."""
    protected = protected_layers(layout.num_layers, first=config.protect_first, last=config.protect_last)
    kinds = {"both": ("attention", "mlp"), "heads": ("attention",), "channels": ("mlp",)}[config.prune]
    minimum = {"attention": config.min_groups, "mlp": config.min_channels}
    return [
        block.size if block.layer in protected or block.kind not in kinds else min(block.size, minimum[block.kind])
        for block in layout.blocks
    ]


def kept_structures(block: Block, num_ranked: int, channel_multiple: int) -> int:
    """Structures a block has left when ``num_ranked`` of it stand in the order, channels rounded up to the multiple."""
    kept = block.size - num_ranked
    if block.kind == "mlp" and num_ranked:
        kept = min(block.size, math.ceil(kept / channel_multiple) * channel_multiple)
    return kept


def removed_mask(block: Block, ranks: torch.Tensor, *, length: int, channel_multiple: int) -> torch.Tensor:
    """Which structures of a block are gone after the first ``length`` removals: bool of shape ``(block.size,)``.

    What rounding gives back are the structures removed last, so that a longer prefix always contains a shorter one.
    """
    ranked = (ranks >= 0) & (ranks < length)
    num_ranked = int(ranked.sum())
    num_removed = block.size - kept_structures(block, num_ranked, channel_multiple)
    if num_removed == num_ranked:
        return ranked
    order = torch.where(ranked, ranks, torch.iinfo(ranks.dtype).max).argsort()
    mask = torch.zeros_like(ranked)
    mask[order[:num_removed]] = True
    return mask


def removed_parameters(layout: Layout, ranks: Sequence[torch.Tensor], *, length: int, channel_multiple: int) -> int:
    """How many parameters are gone after the first ``length`` removals."""
    gone = 0
    for block, rank in zip(layout.blocks, ranks):
        num_ranked = int(((rank >= 0) & (rank < length)).sum())
        gone += (block.size - kept_structures(block, num_ranked, channel_multiple)) * block.cost
    return gone


def parameter_budget(layout: Layout, sparsity: float) -> int:
    """The number of parameters to remove for a sparsity (a fraction of the decoder layers' parameters), rounded up."""
    return math.ceil(sparsity * layout.total - 1e-6)


def highest_sparsity(layout: Layout, minimum: Sequence[int], channel_multiple: int) -> float:
    """The sparsity that is left when every block is down at its floor."""
    gone = sum(
        (block.size - kept_structures(block, block.size - floor, channel_multiple)) * block.cost
        for block, floor in zip(layout.blocks, minimum)
    )
    return gone / layout.total


def check_reachable(layout: Layout, config: GISPConfig) -> None:
    """Refuses levels that floors and protected layers make impossible, and more levels than structures.

    Raises:
        ValueError: with the highest sparsity that can be reached.
    """
    minimum = floors(layout, config)
    removable = sum(block.size - floor for block, floor in zip(layout.blocks, minimum))
    highest = highest_sparsity(layout, minimum, config.channel_multiple)
    if config.sparsity_levels[-1] > highest:
        raise ValueError(
            f"sparsity {config.sparsity_levels[-1]:g} cannot be reached: with prune={config.prune!r}, "
            f"protect_first={config.protect_first:g}, protect_last={config.protect_last:g}, "
            f"min_groups={config.min_groups}, min_channels={config.min_channels}, "
            f"channel_multiple={config.channel_multiple} the highest is {math.floor(highest * 1e4) / 1e4:.4f}. "
            "Lower the level, or protect fewer layers"
        )
    if len(config.sparsity_levels) > removable:
        raise ValueError(
            f"{len(config.sparsity_levels)} sparsity levels need as many structures, but only {removable} can go; "
            "give fewer levels"
        )


def select(
    layout: Layout,
    scores: Sequence[torch.Tensor | None],
    ranks: Sequence[torch.Tensor],
    *,
    minimum: Sequence[int],
    budget: int,
    channel_multiple: int = 1,
) -> list[tuple[int, int]]:
    """The structures to remove next, lowest score first, until ``budget`` parameters are gone in all.

    Args:
        scores: per block, normalised scores of shape ``(block.size,)``; None where nothing may be removed.
        ranks: per block, the order so far, int32 of shape ``(block.size,)``.
        minimum: per block, how many structures must stay (see ``floors``).
        budget: parameters that should be gone afterwards, those removed earlier included.

    Returns:
        ``(block, structure)`` index pairs in the order of removal. One ranking over all layers and both kinds; equal
        scores go by (layer, kind, index), so that every process chooses the same.
    """
    counts = [int((rank >= 0).sum()) for rank in ranks]
    gone = sum(
        (block.size - kept_structures(block, count, channel_multiple)) * block.cost
        for block, count in zip(layout.blocks, counts)
    )
    owners, indices, values = [], [], []
    for number, (block, score, rank) in enumerate(zip(layout.blocks, scores, ranks)):
        if score is None or block.size <= minimum[number]:
            continue
        candidates = (rank < 0).nonzero().squeeze(1)
        owners.append(torch.full_like(candidates, number))
        indices.append(candidates)
        values.append(score.cpu()[candidates])
    if not owners:
        return []
    # Blocks are ordered by (layer, kind) and candidates by index: a stable sort breaks ties as promised.
    order = torch.sort(torch.cat(values), stable=True).indices
    chosen: list[tuple[int, int]] = []
    for number, index in zip(torch.cat(owners)[order].tolist(), torch.cat(indices)[order].tolist()):
        if gone >= budget:
            break
        block = layout.blocks[number]
        if block.size - counts[number] <= minimum[number]:
            continue
        before = kept_structures(block, counts[number], channel_multiple)
        counts[number] += 1
        gone += (before - kept_structures(block, counts[number], channel_multiple)) * block.cost
        chosen.append((number, index))
    return chosen
