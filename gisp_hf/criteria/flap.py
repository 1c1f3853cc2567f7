"""FLAP: fluctuation of the inputs x squared weight norm, standardised in each block (arXiv 2312.11983)."""

from collections.abc import Sequence

import torch

from gisp_hf.criteria.activations import ActivationCriterion, readers
from gisp_hf.criteria.base import Sums, share_out
from gisp_hf.models.layout import Layout, Member


class Flap(ActivationCriterion):
    """The variance of an input over tokens, times the squared norm of its column in ``o_proj`` or ``down_proj``.

    As in the authors' code with its defaults (CASIA-IVA-Lab/FLAP, metric WIFV, structure AL-AM): the values of a
    block's columns are standardised (mean 0, deviation 1), those of a head are averaged, and all structures of the
    model stand in one ranking against a budget of parameters. That code squares the values of attention first; so does
    this. Its bias compensation is a matter of the method: `gisp_hf.criteria.compensation`.

    Variances come from float32 sums of the inputs and of their squares, which add up over processes. They lose digits
    where a mean is hundreds of times the deviation.
    """

    def statistics(self, inputs: torch.Tensor) -> torch.Tensor:
        count = inputs.new_full((inputs.shape[1],), len(inputs))
        return torch.stack([count, inputs.sum(dim=0), inputs.square().sum(dim=0)])  # (3, length)

    def scores(self, layout: Layout, blocks: Sequence[int], sums: Sums) -> list[torch.Tensor]:
        scores = []
        for number in blocks:
            block = layout.blocks[number]
            score = torch.zeros(block.size)
            for member in readers(block):
                count, total, squares = sums[number, member.parameter]
                variance = ((squares - total.square() / count) / (count - 1).clamp_min(1)).clamp_min(0)
                values = variance * self.weight(member.parameter, variance.device).square().sum(dim=0)
                if block.kind in ("attention", "query"):
                    values = values.square()
                score = averages(standardized(values), member, block.size) + score.to(values.device)
            scores.append(score)
        return scores


def standardized(values: torch.Tensor) -> torch.Tensor:
    """Mean 0 and deviation 1: (length,) -> (length,). Zeros do not count: structures that are set to zero are gone."""
    there = values[values > 0]
    if len(there) < 2:
        return torch.zeros_like(values)
    return (values - there.mean()) / there.std().clamp_min(torch.finfo(values.dtype).tiny)


def averages(entries: torch.Tensor, member: Member, size: int) -> torch.Tensor:
    """The mean over a structure's columns: (length,) -> (size,)."""
    return share_out(entries, member, size) / member.width
