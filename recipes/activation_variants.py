"""Other ways to add up the derivatives of gates, for `recipes/ablations.yaml`.

A module of its own shows how a criterion that the package does not have joins a run: ``imports`` in the settings.
"""

import torch

from gisp_hf.criteria.gate import Gate
from gisp_hf.pruning.methods import Method, register_method


class Squared(Gate):
    """``sum over tokens of (dL/dz_t)^2``, the diagonal of the empirical Fisher information of the gates."""

    def reduce(self, gates: torch.Tensor) -> torch.Tensor:
        return gates.square_().flatten(0, -2).sum(dim=0)


class PerSequence(Gate):
    """``sum over sequences of |sum over their tokens of dL/dz_t|``: one gate for a whole sequence."""

    def reduce(self, gates: torch.Tensor) -> torch.Tensor:
        return gates.sum(dim=-2).abs_().flatten(0, -2).sum(dim=0)


register_method(
    "activation-squared", Method(Squared, normalization="none", description="squares of derivatives of gates")
)
register_method(
    "activation-per-sequence",
    Method(PerSequence, normalization="none", description="derivatives of gates, one absolute value a sequence"),
)
