"""Bias compensation of FLAP: the mean output of removed structures becomes a bias (arXiv 2312.11983)."""

from collections.abc import Sequence

import torch

from gisp_hf.criteria.activations import ActivationCriterion, readers
from gisp_hf.criteria.base import Sums
from gisp_hf.models.layout import Layout


class Compensation(ActivationCriterion):
    """``W[:, removed] @ mean(x[removed])`` for each projection that reads structures, ``x`` its input over all tokens.

    As ``compress`` in CASIA-IVA-Lab/FLAP: the layer's output then keeps the mean that it had on the calibration data.
    There all structures go at once, and the means are those of the unpruned model. With several steps, a structure's
    mean is that of the model just before it goes.

    Neither the removal order nor the model in the run depends on the biases; only levels have them.

    Attributes:
        biases: parameter -> what goes to the bias beside it, float32 of shape ``(d,)``, over all removals so far.
    """

    def __init__(self) -> None:
        self.biases: dict[str, torch.Tensor] = {}
        self._means: dict[str, torch.Tensor] = {}  # parameter -> (length,)

    def statistics(self, inputs: torch.Tensor) -> torch.Tensor:
        count = inputs.new_full((inputs.shape[1],), len(inputs))
        return torch.stack([count, inputs.sum(dim=0)])  # (2, length)

    def take_means(self, sums: Sums) -> None:
        self._means = {name: total / count for (_, name), (count, total) in sums.items()}

    @torch.no_grad()
    def add_removed(self, layout: Layout, removed: Sequence[torch.Tensor], *, sliced: bool) -> None:
        """Adds to the biases what structures put out, just before they go.

        Args:
            layout: of the model as it is now.
            removed: per block of it, the increasing indices of the structures that go.
            sliced: whether they are sliced out, so that later indices are smaller; otherwise they become zeros.
        """
        kept = []
        for block, structures in zip(layout.blocks, removed):
            stays = torch.ones(block.size, dtype=torch.bool)
            stays[structures] = False
            kept.append(stays.nonzero().squeeze(1))
            for member in readers(block) if len(structures) else ():
                mean = self._means[member.parameter]
                rows = member.rows(structures).flatten().to(mean.device)
                lost = self.weight(member.parameter, mean.device)[:, rows] @ mean[rows]
                known = self.biases.get(member.parameter)
                self.biases[member.parameter] = lost if known is None else known + lost
        for name, cuts in layout.rows_kept(kept).items() if sliced else ():
            for dim, rows in cuts:
                if dim == 1 and name in self._means:
                    self._means[name] = self._means[name][rows.to(self._means[name].device)]
