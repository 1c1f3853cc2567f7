"""Selection: scores, costs, a budget and the structures that must stay -> a removal order. Torch alone.

*Order* is per block a tensor of positions, int32 of shape ``(block.size,)``: a structure's position in the removal
order, counted from 0; -1 means that it is still there. *Multiples* is kind -> what the number of its structures that a
layer keeps is rounded up to a multiple of; 1 for a kind that is not in it.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from gisp_hf.config import GISPConfig, protected_layers
from gisp_hf.models.layout import Block, Layout, kind_of

SETTINGS = {"mlp": "channel_multiple", "attention": "group_multiple"}  # kind -> the setting that names its multiple


def minimum_kept(layout: Layout, config: GISPConfig) -> list[int]:
    """Structures that each block must keep: all of a protected block's, the configured minimum of the others."""
    protected = protected_layers(layout.num_layers, first=config.protect_first, last=config.protect_last)
    return [
        block.size
        if block.layer in protected or not config.prunes(block.kind)
        else min(block.size, math.ceil(config.minimum_of(block.kind) / block.parts) * block.parts)
        for block in layout.blocks
    ]


def kept_structures(block: Block, num_ordered: int, multiples: Mapping[str, int]) -> int:
    """Structures a block has left when ``num_ordered`` of it stand in the order.

    Rounded up to the kind's multiple, and so that all parts of the block have the same number.
    """
    kept = block.size - num_ordered
    multiple = math.lcm(multiples.get(block.kind, 1), block.parts)
    if multiple > 1 and num_ordered:
        kept = min(block.size, math.ceil(kept / multiple) * multiple)
    return kept


def kept_counts(
    layout: Layout, ordered: Sequence[int], multiples: Mapping[str, int], *, uniform: bool = False
) -> list[int]:
    """Structures that every block has left when ``ordered`` of them stand in the order.

    Args:
        uniform: layers keep the same number of a kind: that of the layer that has most left, rounded up to one that
            the family's own class takes (`Layout.plain_sizes`).
    """
    kept = [kept_structures(block, count, multiples) for block, count in zip(layout.blocks, ordered)]
    for kind in layout.kinds if uniform else ():
        numbers = layout.of_kind(kind.name)
        most = plain_size(max(kept[number] for number in numbers), allowed_sizes(layout, kind.name, multiples))
        for number in numbers:
            kept[number] = most
    return kept


def allowed_sizes(layout: Layout, kind: str, multiples: Mapping[str, int]) -> list[int]:
    """The plain sizes of a kind (`Layout.plain_sizes`) that are multiples, and the full one; empty: any will do."""
    sizes = layout.plain_sizes.get(kind, ())
    return [size for size in sizes if size % multiples.get(kind, 1) == 0 or size == sizes[-1]]


def plain_size(count: int, sizes: Sequence[int]) -> int:
    """``count``, rounded up to one of ``sizes`` (increasing); any will do if there are none."""
    return next((size for size in sizes if size >= count), count)


def removed_masks(
    layout: Layout,
    order: Sequence[torch.Tensor],
    *,
    length: int,
    multiples: Mapping[str, int],
    uniform: bool = False,
) -> list[torch.Tensor]:
    """Per block, which structures are gone after the first ``length`` removals: bool of shape ``(block.size,)``.

    Rounding gives back the structures removed last, so that a longer prefix always contains a shorter one.
    """
    kept = kept_counts(layout, _ordered(order, length), multiples, uniform=uniform)
    return [
        _first_removed(positions, length=length, count=block.size - count)
        for block, positions, count in zip(layout.blocks, order, kept)
    ]


def _ordered(order: Sequence[torch.Tensor], length: int) -> list[int]:
    """Per block, how many structures are among the first ``length`` of the order."""
    return [int(((positions >= 0) & (positions < length)).sum()) for positions in order]


def _first_removed(order: torch.Tensor, *, length: int, count: int) -> torch.Tensor:
    """Mask of the first ``count`` structures of a block, among the first ``length`` of the whole order."""
    ordered = (order >= 0) & (order < length)
    if count == int(ordered.sum()):
        return ordered
    first = torch.where(ordered, order, torch.iinfo(order.dtype).max).argsort()
    mask = torch.zeros_like(ordered)
    mask[first[:count]] = True
    return mask


def removed_mask(block: Block, order: torch.Tensor, *, length: int, multiples: Mapping[str, int]) -> torch.Tensor:
    """`removed_masks` of one block, where layers may differ in size."""
    (num_ordered,) = _ordered([order], length)
    return _first_removed(order, length=length, count=block.size - kept_structures(block, num_ordered, multiples))


def removed_parameters(
    layout: Layout,
    order: Sequence[torch.Tensor],
    *,
    length: int,
    multiples: Mapping[str, int],
    uniform: bool = False,
) -> int:
    """How many parameters are gone after the first ``length`` removals."""
    kept = kept_counts(layout, _ordered(order, length), multiples, uniform=uniform)
    return sum((block.size - count) * block.cost for block, count in zip(layout.blocks, kept))


def parameter_budget(layout: Layout, sparsity: float) -> int:
    """The number of parameters to remove for a sparsity (a fraction of the decoder layers' parameters), rounded up."""
    return math.ceil(sparsity * layout.total - 1e-6)


def highest_sparsity(
    layout: Layout, minimum: Sequence[int], multiples: Mapping[str, int], *, uniform: bool = False
) -> float:
    """The sparsity with every block at its minimum. One structure of the model stays in any case."""
    ordered = [block.size - least for block, least in zip(layout.blocks, minimum)]
    kept = kept_counts(layout, ordered, multiples, uniform=uniform)
    gone = sum((block.size - count) * block.cost for block, count in zip(layout.blocks, kept))
    return min(gone, layout.total - max(block.cost for block in layout.blocks)) / layout.total


def check_multiples(layout: Layout, multiples: Mapping[str, int]) -> None:
    """Refuses a rounding that has nothing to round, and a multiple of groups that a layer of full size is not.

    Raises:
        ValueError: with the kinds of structure that there are, or with the groups of a layer.
    """
    for kind, multiple in multiples.items():
        setting = f"{SETTINGS.get(kind, kind)}={multiple}"
        if multiple > 1 and not layout.of_kind(kind):
            removed = ", ".join(kind.plural for kind in layout.kinds)
            raise ValueError(
                f"{setting} rounds the number of {kind_of(kind).plural}, but only {removed} are removed; leave it out"
            )
    sizes = {layout.blocks[number].size for number in layout.of_kind("attention")}
    multiple = multiples.get("attention", 1)
    if odd := sorted(size for size in sizes if multiple > 1 and size % multiple):
        raise ValueError(
            f"group_multiple={multiple} does not divide the {odd[0]} key/value groups of a layer, which a layer that "
            f"loses none keeps; use a divisor of {math.gcd(*sizes)}"
        )


def check_reachable(layout: Layout, config: GISPConfig) -> None:
    """Refuses levels that minima and protected layers make impossible, more levels than structures, and unknown kinds.

    Raises:
        ValueError: with the highest sparsity that can be reached.
    """
    minimum = minimum_kept(layout, config)
    names = [kind.name for kind in layout.kinds]
    if not any(config.prunes(name) for name in names):
        raise ValueError(
            f"prune={config.prune!r} leaves nothing to remove: method {config.method!r} removes {', '.join(names)}; "
            "use prune='both', or another method"
        )
    check_multiples(layout, config.multiples)
    if unknown := sorted(set(config.minimum_kept) - set(names)):
        raise ValueError(f"minimum_kept names {', '.join(unknown)}, but this model has {', '.join(names)}")
    removable = sum(block.size - least for block, least in zip(layout.blocks, minimum))
    highest = highest_sparsity(layout, minimum, config.multiples, uniform=config.uniform)
    if config.sparsity_levels[-1] > highest:
        least = ", ".join(f"{name}: {config.minimum_of(name)}" for name in names)
        raise ValueError(
            f"sparsity {config.sparsity_levels[-1]:g} cannot be reached: with prune={config.prune!r}, "
            f"protect_first={config.protect_first:g}, protect_last={config.protect_last:g}, "
            f"minimum_kept={{{least}}}, channel_multiple={config.channel_multiple}, "
            f"group_multiple={config.group_multiple}, layout={config.layout!r} the highest is "
            f"{math.floor(highest * 1e4) / 1e4:.4f}. Lower the level, or protect fewer layers"
        )
    if len(config.sparsity_levels) > removable:
        raise ValueError(
            f"{len(config.sparsity_levels)} sparsity levels need as many structures, but only {removable} can go; "
            "give fewer levels"
        )


def fractions_of_block(
    layout: Layout,
    scores: Sequence[torch.Tensor | None],
    order: Sequence[torch.Tensor],
    *,
    offsets: Mapping[int, float] | None = None,
) -> list[torch.Tensor | None]:
    """Scores that make `select` take the same fraction from every block, its lowest scored structures first.

    The score of a structure becomes the share at which it goes. With ``n`` structures in the block, the ``k``-th goes
    at ``(k - 1/2) / n``: a share ``s`` takes the number nearest to ``s * n``. So a block of three groups loses one
    between a sixth and a half, and no block is more than half a structure away from the share.

    Args:
        offsets: layer -> what its share is above that of the others; None: the same share everywhere.
    """
    fractions: list[torch.Tensor | None] = []
    for block, score, positions in zip(layout.blocks, scores, order):
        if score is None:
            fractions.append(None)
            continue
        left = (positions < 0).nonzero().squeeze(1)
        ascending = left[torch.sort(score.cpu()[left], stable=True).indices]
        fraction = torch.zeros(block.size, dtype=torch.float64)
        gone = block.size - len(left)
        fraction[ascending] = (torch.arange(gone, block.size, dtype=torch.float64) + 0.5) / block.size
        fractions.append(fraction - (offsets or {}).get(block.layer, 0.0))
    return fractions


def _in_sets(block: Block, candidates: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Structures in sets of one from each part, the lowest scored of each together; a set has the mean of its scores.

    The highest of all parts are the last set, the second highest the one before: if one part has lost more than
    another in a set that is not complete yet, what is missing of that set comes first.

    Args:
        candidates: increasing indices of structures, int64 of shape ``(n,)``.
        scores: theirs, ``(n,)``.

    Returns:
        Both in the order of removal, scores not falling.
    """
    part = candidates // (block.size // block.parts)
    place = torch.empty_like(candidates)  # of each structure, the number of its set, counted from the last
    for number in part.unique():
        own = (part == number).nonzero().squeeze(1)
        place[own[torch.sort(scores[own], stable=True).indices]] = torch.arange(len(own) - 1, -1, -1)
    sums = torch.zeros(int(place.max()) + 1, dtype=scores.dtype).index_add_(0, place, scores)
    means = sums / place.bincount()
    rising = means.flip(0).cummax(0).values.flip(0)
    by_set = torch.sort(place, descending=True, stable=True).indices
    return candidates[by_set], rising[place[by_set]]


def select(
    layout: Layout,
    scores: Sequence[torch.Tensor | None],
    order: Sequence[torch.Tensor],
    *,
    minimum: Sequence[int],
    budget: int,
    multiples: Mapping[str, int] | None = None,
) -> list[tuple[int, int]]:
    """The structures to remove next, lowest score first, until ``budget`` parameters are gone in all.

    Args:
        scores: per block, normalised scores of shape ``(block.size,)``; None where nothing may be removed.
        order: per block, the order so far, int32 of shape ``(block.size,)``.
        minimum: per block, how many structures must stay (see `minimum_kept`).
        budget: parameters that should be gone afterwards, those removed earlier included.

    Returns:
        ``(block, structure)`` index pairs in the order of removal. One ranking over all layers and kinds; equal scores
        go by (layer, kind, index), so that every process chooses the same.
    """
    multiples = multiples or {}
    counts = [int((positions >= 0).sum()) for positions in order]
    gone = sum(
        (block.size - kept_structures(block, count, multiples)) * block.cost
        for block, count in zip(layout.blocks, counts)
    )
    owners, indices, values = [], [], []
    for number, (block, score, positions) in enumerate(zip(layout.blocks, scores, order)):
        if score is None or block.size <= minimum[number]:
            continue
        candidates = (positions < 0).nonzero().squeeze(1)
        found = score.cpu()[candidates]
        if block.parts > 1:
            candidates, found = _in_sets(block, candidates, found)
        owners.append(torch.full_like(candidates, number))
        indices.append(candidates)
        values.append(found)
    if not owners:
        return []
    # Blocks are ordered by (layer, kind) and candidates by index: a stable sort breaks ties as promised.
    ascending = torch.sort(torch.cat(values), stable=True).indices
    chosen: list[tuple[int, int]] = []
    for number, index in zip(torch.cat(owners)[ascending].tolist(), torch.cat(indices)[ascending].tolist()):
        if gone >= budget:
            break
        block = layout.blocks[number]
        if block.size - counts[number] <= minimum[number]:
            continue
        before = kept_structures(block, counts[number], multiples)
        counts[number] += 1
        gone += (before - kept_structures(block, counts[number], multiples)) * block.cost
        chosen.append((number, index))
    return chosen
