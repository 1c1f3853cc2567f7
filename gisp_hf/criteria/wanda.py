"""Wanda-sp: ``sum |w| * norm of its input`` over the columns of a structure (Wanda, arXiv 2306.11695)."""

from collections.abc import Sequence

import torch

from gisp_hf.criteria.activations import ActivationCriterion, readers
from gisp_hf.criteria.base import Sums, share_out
from gisp_hf.models.layout import Layout


class WandaSP(ActivationCriterion):
    """``sum over columns j of norm(x_j) * sum over rows i of |w_ij|``, ``x_j`` being input ``j`` over all tokens.

    The structured variant published with FLAP (``prune_wanda_sp`` in CASIA-IVA-Lab/FLAP): only the weights that read a
    structure count, which are columns of ``o_proj`` and ``down_proj``; entries are added up over a head; every layer
    loses the same share. There each layer sees the inputs that the pruned layers before it give; here all layers are
    scored in the same pass, unless there are several steps.
    """

    def statistics(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.square().sum(dim=0)

    def scores(self, layout: Layout, blocks: Sequence[int], sums: Sums) -> list[torch.Tensor]:
        scores = []
        for number in blocks:
            block = layout.blocks[number]
            score = torch.zeros(block.size)
            for member in readers(block):
                squares = sums[number, member.parameter]  # (length,)
                entries = squares.sqrt() * self.weight(member.parameter, squares.device).abs().sum(dim=0)
                score = share_out(entries, member, block.size) + score.to(entries.device)
            scores.append(score)
        return scores
