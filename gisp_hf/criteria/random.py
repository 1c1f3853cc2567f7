"""Random scores: the baseline that every other criterion has to beat."""

from collections.abc import Sequence

import torch

from gisp_hf.criteria.base import Criterion, Sums
from gisp_hf.models.layout import Layout


class Random(Criterion):
    """Uniform random numbers from a fixed seed, the same on every process. Reads neither data nor weights."""

    needs = "weights"

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def sums(self, layout: Layout, blocks: Sequence[int]) -> Sums:
        return {}

    def scores(self, layout: Layout, blocks: Sequence[int], sums: Sums) -> list[torch.Tensor]:
        return [torch.rand(layout.blocks[number].size, generator=self.generator) for number in blocks]
