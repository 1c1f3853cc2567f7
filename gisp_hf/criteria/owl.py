"""OWL: layers with more outliers lose less (Outlier Weighed Layerwise sparsity, arXiv 2310.05175)."""

from collections.abc import Sequence

import torch

from gisp_hf.criteria.activations import ActivationCriterion
from gisp_hf.criteria.base import Sums
from gisp_hf.models.layout import Block, Layout


class Owl(ActivationCriterion):
    """Shares of layers, for any method that ranks by layer (`gisp_hf.pruning.methods.Method.layer_shares`).

    As in the authors' code (luuyin/OWL, ``lib/prune_all.py``): the outlier ratio of a layer is the share of its entries
    ``|weight| x norm of its input``, over all weight matrices of the layer together, that exceed ``threshold`` times
    their mean. The ratios are stretched to a range of ``2 x spread``; a layer's share is that of all layers together,
    plus the mean of the stretched ratios, minus its own. Shares therefore differ from each other by at most
    ``2 x spread``, and their mean is the share of all layers together.

    Three differences. Only blocks that can lose structures count. A method with several steps measures the ratios in
    each step, on the model as it is then, since a resumed run knows no other; the code measures the unpruned model, as
    a method with one step does here. Entries that are zero do not count: structures that are set to zero are gone.

    A share below zero takes nothing. Where that happens, at low sparsities, the other layers make up for it.

    Args:
        threshold: ``M`` in the paper; 5 in the authors' commands for LLaMA-7B, 3 as default of their code.
        spread: lambda in the paper; 0.08 in those commands and as default.
    """

    def __init__(self, threshold: float = 5.0, spread: float = 0.08) -> None:
        self.threshold, self.spread = threshold, spread

    def watched(self, block: Block) -> list[str]:
        names = dict.fromkeys(member.parameter for member in block.members)
        return [name for name in names if self.model.get_parameter(name).ndim == 2]

    def statistics(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.square().sum(dim=0)

    def offsets(self, layout: Layout, blocks: Sequence[int], sums: Sums) -> dict[int, float]:
        """Layer -> its share minus the share of all layers together; their mean is 0.

        Args:
            layout: of the model as it is now.
            blocks: numbers of all blocks that can lose structures.
            sums: squared norms of the inputs, by block and parameter.
        """
        ratios: dict[int, float] = {}
        for layer in dict.fromkeys(layout.blocks[number].layer for number in blocks):
            parts = {name: part for (number, name), part in sums.items() if layout.blocks[number].layer == layer}
            ratios[layer] = self._outlier_ratio(parts)
        return layer_offsets(ratios, spread=self.spread)

    def _outlier_ratio(self, squares: dict[str, torch.Tensor]) -> float:
        total, count = 0.0, 0
        for name, part in squares.items():
            entries = self._entries(name, part)
            total += float(entries.sum(dtype=torch.float64))
            count += int((entries > 0).sum())
        limit = self.threshold * total / max(count, 1)
        # A second time, rather than all weights of a layer in memory at once.
        return sum(int((self._entries(name, part) > limit).sum()) for name, part in squares.items()) / max(count, 1)

    def _entries(self, name: str, squares: torch.Tensor) -> torch.Tensor:
        return self.weight(name, squares.device).abs() * squares.sqrt()


def layer_offsets(ratios: dict[int, float], *, spread: float) -> dict[int, float]:
    """Outlier ratios -> what each layer's share is above the mean; all 0 if the ratios are equal."""
    low, high = min(ratios.values()), max(ratios.values())
    if low == high:
        return dict.fromkeys(ratios, 0.0)
    stretched = {layer: (ratio - low) / (high - low) * 2 * spread for layer, ratio in ratios.items()}
    mean = sum(stretched.values()) / len(stretched)
    return {layer: mean - value for layer, value in stretched.items()}
