"""Normalisation: the divisors that let large and small structures share one ranking. Torch alone."""

from gisp_hf.models.layout import Block


def normalizer(block: Block, normalization: str) -> int:
    """The divisor of a block's scores.

    ``params``: the parameters of one structure (paper, Eq. 9). ``reference``: the constants of the published code,
    ``4 * h * d`` for each query head and ``3 * I`` (not ``3 * d``) for a channel; for kinds that it does not know, as
    ``params``. ``none``: 1.

    Raises:
        ValueError: for any other name.
    """
    if normalization == "params":
        return block.cost
    if normalization == "reference":
        return block.cost if block.reference_cost is None else block.reference_cost
    if normalization == "none":
        return 1
    raise ValueError(f"normalization must be params, reference or none, got {normalization!r}")
