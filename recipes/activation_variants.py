"""Other ways to add up the derivatives of gates, for `recipes/ablations.yaml` and `recipes/powers.yaml`.

A module of its own shows how a criterion that the package does not have joins a run: ``imports`` in the settings.
"""

import torch

from gisp_hf.criteria.gate import Gate
from gisp_hf.pruning.methods import Method, register_method


class Power(Gate):
    """``(sum over tokens of |dL/dz_t|^power)^(1/power)``."""

    def reduce(self, gates: torch.Tensor) -> torch.Tensor:
        return gates.abs_().pow_(self.power).flatten(0, -2).sum(dim=0)


class Absolute(Power):
    power = 1


class ThreeHalves(Power):
    power = 1.5


class Squared(Power):
    """Its square is the diagonal of the empirical Fisher information of the gates."""

    power = 2


class PerSequence(Gate):
    """``sum over sequences of |sum over their tokens of dL/dz_t|``: one gate for a whole sequence."""

    power = 1

    def reduce(self, gates: torch.Tensor) -> torch.Tensor:
        return gates.sum(dim=-2).abs_().flatten(0, -2).sum(dim=0)


for name, criterion, description in (
    ("activation-absolute", Absolute, "absolute values of derivatives of gates"),
    ("activation-power-1.5", ThreeHalves, "derivatives of gates to the power 1.5"),
    ("activation-squared", Squared, "squares of derivatives of gates"),
    ("activation-per-sequence", PerSequence, "derivatives of gates, one absolute value a sequence"),
):
    register_method(name, Method(criterion, normalization="none", description=description))
