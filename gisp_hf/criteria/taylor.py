"""Importance of structures: first-order Taylor, ``sum |w * g|`` (paper, Section 3). Torch alone."""

import torch

from gisp_hf.models.layout import Block


def score_slices(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    *,
    dim: int,
    width: int,
    first_row: int = 0,
    total_rows: int | None = None,
) -> torch.Tensor:
    """``sum |w * g|`` over consecutive slices of one parameter.

    Args:
        weight: the parameter, of any floating dtype; 1-D (a bias) or 2-D.
        gradient: its gradient, summed over the whole calibration pass *before* this call: same shape.
        dim: the dimension that is cut into slices; ``dim=0`` for a bias.
        width: rows (or columns) per slice.
        first_row, total_rows: if the two are some rows of the parameter only: where they begin, and how many the whole
            has. The scores of all parts add up to those of the whole.

    Returns:
        float32 of shape ``(size of the whole along dim // width,)``.

    Raises:
        ValueError: if the shapes differ or ``width`` does not divide the dimension.
    """
    if weight.shape != gradient.shape:
        raise ValueError(f"weight {tuple(weight.shape)} and gradient {tuple(gradient.shape)} must have the same shape")
    total_rows = weight.shape[0] if total_rows is None else total_rows
    size = total_rows if dim == 0 else weight.shape[dim]
    if size % width:
        raise ValueError(f"width ({width}) must divide dimension {dim} of {(total_rows, *weight.shape[1:])}")
    product = weight.detach().to(torch.float32, copy=True).mul_(gradient).abs_()  # a copy: weights stay as they are
    if product.ndim == 2:
        product = product.sum(dim=1 - dim)
    if dim == 0 and len(product) < total_rows:  # a shard may begin and end in the middle of a slice
        rows = torch.zeros(total_rows, device=product.device)
        rows[first_row : first_row + len(product)] = product
        product = rows
    return product.view(size // width, width).sum(dim=1)


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
