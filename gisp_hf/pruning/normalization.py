"""Normalisation: large and small structures in one ranking. Torch alone."""

from collections.abc import Sequence

import torch

from gisp_hf.models.layout import Block, Layout


def normalizer(block: Block, normalization: str) -> float:
    """The divisor of a block's scores.

    ``params``: the parameters of one structure (paper, Eq. 9). ``root``: their square root. ``reference``: the
    constants of the published code, ``4 * h * d`` for each query head and ``3 * I`` (not ``3 * d``) for a channel; for
    kinds that it does not know, as ``params``. ``none`` and ``standardized`` (`standardize`): 1.

    Raises:
        ValueError: for any other name.
    """
    if normalization == "params":
        return block.cost
    if normalization == "root":
        return block.cost**0.5
    if normalization == "reference":
        return block.cost if block.reference_cost is None else block.reference_cost
    if normalization in ("none", "standardized"):
        return 1
    raise ValueError(f"normalization must be params, root, reference, standardized or none, got {normalization!r}")


def standardize(
    layout: Layout, scores: Sequence[torch.Tensor | None], order: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Scores with mean 0 and deviation 1 over all structures of their kind that are still there.

    Args:
        scores: per block, shape ``(block.size,)``; None where nothing may be removed: such a block does not count.
        order: per block, the removal order so far; -1 = still there.

    Returns:
        per block, float32 of the same shape, on the CPU; None where there was no score.
    """
    result: list[torch.Tensor | None] = [None if score is None else score.cpu().float() for score in scores]
    for kind in layout.kinds:
        numbers = [number for number in layout.of_kind(kind.name) if result[number] is not None]
        left = [score[order[number] < 0] for number in numbers if (score := result[number]) is not None]
        if not left:
            continue
        values = torch.cat(left).double()
        deviation = values.std(correction=0) if len(values) else values.new_ones(())
        for number in numbers:
            score = result[number]
            assert score is not None
            result[number] = ((score.double() - values.mean()) / (deviation if deviation > 0 else 1)).float()
    return result
