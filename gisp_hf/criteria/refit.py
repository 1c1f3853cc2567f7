"""Second order: the error that the best re-fit of a projection leaves when a structure goes (OSSCAR, ZipLM)."""

from collections.abc import Sequence

import torch

from gisp_hf.criteria.activations import ActivationCriterion, readers
from gisp_hf.criteria.base import Sums
from gisp_hf.models.layout import Layout

DAMPING = 1e-2  # of the mean diagonal; OSSCAR's default


class Refit(ActivationCriterion):
    """``1/2 tr(W_S^T ((G^-1)_SS)^-1 W_S)``, with ``G`` the Gram matrix of the inputs, ``W_S`` the weights of ``S``.

    That is half the squared error of the projection's output, summed over tokens, when the columns ``S`` are taken out
    and all others are fitted anew by least squares. OSSCAR (arXiv 2403.12983, mazumder-lab/OSSCAR) and ZipLM (arXiv
    2302.04089) choose by it, structure after structure. Both change the remaining weights as they go; here they stay,
    and each step scores the smaller model anew. OSSCAR takes the same share from every layer, and so does this; errors
    of different layers are no measure of each other.

    Costs float32 matrices of ``length x length`` for every projection (485 MB for 11,008 channels), and one inversion
    in float64 for each in every step. Gram matrices need full float32 products: leave TF32 off, as it is by default.
    There should be many more tokens than columns.
    """

    def statistics(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.T @ inputs

    def scores(self, layout: Layout, blocks: Sequence[int], sums: Sums) -> list[torch.Tensor]:
        scores = []
        for number in blocks:
            block = layout.blocks[number]
            score = torch.zeros(block.size)
            for member in readers(block):
                gram = sums[number, member.parameter]
                rows = member.rows(torch.arange(block.size, device=gram.device))
                errors = refit_errors(gram, self.weight(member.parameter, gram.device), rows)
                score = errors.float() + score.to(gram.device)
            scores.append(score)
        return scores


def refit_errors(gram: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The error of each structure, taken out alone, in float64.

    Args:
        gram: ``X^T X``, shape (length, length).
        weight: (d, length).
        columns: those of each structure, (size, width).

    Returns:
        shape ``(size,)``.
    """
    inverse = torch.linalg.inv(damped(gram))
    blocks = inverse[columns[:, :, None], columns[:, None, :]]  # (size, width, width)
    parts = weight.double().T[columns]  # (size, width, d)
    return (parts * torch.linalg.solve(blocks, parts)).sum(dim=(1, 2)) / 2


def damped(gram: torch.Tensor) -> torch.Tensor:
    """A Gram matrix in float64, with a share of its mean diagonal added to the diagonal."""
    gram = gram.double()
    diagonal = gram.diagonal()
    # Inputs that are always zero do not count in the mean: structures that are set to zero are gone.
    damping = DAMPING * diagonal.sum() / (diagonal > 0).sum().clamp_min(1)
    return gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
