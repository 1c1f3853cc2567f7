"""Sum of first and second order, as in Týr-the-Pruner (arXiv 2503.09657)."""

from collections.abc import Sequence

import torch

from gisp_hf.criteria.activations import readers
from gisp_hf.criteria.base import Sums
from gisp_hf.criteria.refit import Refit, damped
from gisp_hf.models.layout import Layout


class Tyr(Refit):
    """``tr(W_S^T (G W)_S) + 1/2 tr(W_S^T ((G^-1)_SS)^-1 W_S)``, ``G`` and ``W_S`` as in `Refit`.

    The second term is that of `Refit`: half the squared error of the best re-fit. The first one is the output of ``S``
    times the whole output of the projection, summed over tokens. So a structure that points the way of the whole output
    is worth more than the error of its re-fit, and one that points against it less; a score may be negative.

    That is the sum by which ``local_prune_core`` in the authors' code (AMD-AGI/Tyr-the-Pruner, ``src/local_pruner.py``)
    ranks heads and channels, with the same damping, of ``G`` in both terms. Not done here: the code removes in rounds
    within one projection (1 for heads, 16 for channels), and fits the remaining weights anew after each; ``G W`` there
    is that of the unpruned weights, here that of the model as it is in each step. It builds several sparsities of each
    layer, and searches for the best mixture of them; here every layer loses the same share.
    """

    def scores(self, layout: Layout, blocks: Sequence[int], sums: Sums) -> list[torch.Tensor]:
        scores = []
        for number, second in zip(blocks, super().scores(layout, blocks, sums)):
            block = layout.blocks[number]
            for member in readers(block):
                gram = sums[number, member.parameter]
                rows = member.rows(torch.arange(block.size, device=gram.device))
                second = second + outputs_along(gram, self.weight(member.parameter, gram.device), rows).float()
            scores.append(second)
        return scores


def outputs_along(gram: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The output of each structure times the whole output, summed over tokens, in float64: (size,).

    Args: as `gisp_hf.criteria.refit.refit_errors`.
    """
    weight = weight.double().T  # (length, d)
    return (weight * (damped(gram) @ weight)).sum(dim=1)[columns].sum(dim=1)
