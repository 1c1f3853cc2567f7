"""Importance of structures: first-order Taylor, ``sum |w * g|`` (paper, Section 3). Torch alone."""

import torch

from gisp_hf.structures import Block


def score_slices(weight: torch.Tensor, gradient: torch.Tensor, *, dim: int, width: int) -> torch.Tensor:
    """``sum |w * g|`` over consecutive slices of one parameter.

    Args:
        weight: the parameter, of any floating dtype; 1-D (a bias) or 2-D.
        gradient: its gradient, summed over the whole calibration pass *before* this call: same shape.
        dim: the dimension that is cut into slices; ``dim=0`` for a bias.
        width: rows (or columns) per slice.

    Returns:
        float32 of shape ``(weight.shape[dim] // width,)``.

    Raises:
        ValueError: if the shapes differ or ``width`` does not divide the dimension.
    """
    if weight.shape != gradient.shape:
        raise ValueError(f"weight {tuple(weight.shape)} and gradient {tuple(gradient.shape)} must have the same shape")
    rows = weight.shape[dim]
    if rows % width:
        raise ValueError(f"width ({width}) must divide dimension {dim} of {tuple(weight.shape)}")
    product = weight.detach().to(torch.float32, copy=True).mul_(gradient).abs_()  # a copy: weights stay as they are
    if product.ndim == 2:
        product = product.sum(dim=1 - dim)
    return product.view(rows // width, width).sum(dim=1)


def normalizer(block: Block, normalization: str) -> int:
    """What the scores of a block are divided by, so that large and small structures can share one ranking.

    ``params``: the parameters of one structure (paper, Eq. 9). ``reference``: the constants of the published code,
    ``4 * h * d`` for each query head and ``3 * I`` (not ``3 * d``) for a channel. ``none``: 1.
    """
    if normalization == "params":
        return block.cost
    if normalization == "reference":
        return block.reference_cost
    if normalization == "none":
        return 1
    raise ValueError(f"normalization must be params, reference or none, got {normalization!r}")
