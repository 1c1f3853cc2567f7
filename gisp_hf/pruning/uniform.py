"""Selection for layers of one size: structures go in rounds, one of a kind from every layer. Torch alone."""

from collections.abc import Mapping, Sequence

import torch

from gisp_hf.models.layout import Layout
from gisp_hf.pruning.selection import allowed_sizes, kept_structures, plain_size


def select_rounds(
    layout: Layout,
    scores: Sequence[torch.Tensor | None],
    order: Sequence[torch.Tensor],
    *,
    minimum: Sequence[int],
    budget: int,
    limit: int,
    multiples: Mapping[str, int] | None = None,
) -> list[tuple[int, int]]:
    """The structures to remove next, so that all layers keep the same number of each kind.

    The next round of a kind takes the lowest scored structure of every layer. Rounds of all kinds share one ranking, by
    the mean score of their structures.

    A kind whose next size passes the next level waits until that level is reached; the kind with the smallest step
    goes on instead. Otherwise a level would have lost one group in every layer more than was asked for.

    Args:
        scores, order, minimum, budget, multiples: as `gisp_hf.pruning.selection.select`. Layers have one size, and the
            order so far was made by rounds.
        limit: parameters that are gone at the next level, at least ``budget``.

    Returns:
        ``(block, structure)`` index pairs in the order of removal; a round by layer. Equal rounds go by kind.
    """
    rounds = [
        _Rounds(layout, layout.of_kind(kind.name), scores, order, minimum=minimum, multiples=multiples or {})
        for kind in layout.kinds
    ]
    chosen: list[tuple[int, int]] = []
    while (gone := sum(kind.gone() for kind in rounds)) < budget:
        steps = [(step, kind) for kind in rounds if (step := kind.next_step())]
        if not steps:
            break
        smallest = min(step for step, _ in steps)
        fitting = [kind for step, kind in steps if step == smallest or gone + step <= limit]
        chosen += min(fitting, key=_Rounds.score).take()  # of equals the first
    return chosen


class _Rounds:
    """The rounds of one kind: the structures that go next in every layer, and the parameters that go with them."""

    def __init__(
        self,
        layout: Layout,
        numbers: Sequence[int],
        scores: Sequence[torch.Tensor | None],
        order: Sequence[torch.Tensor],
        *,
        minimum: Sequence[int],
        multiples: Mapping[str, int],
    ) -> None:
        self.numbers = numbers
        self.block = layout.blocks[numbers[0]]
        self.cost = sum(layout.blocks[number].cost for number in numbers)
        self.multiples, self.sizes = multiples, allowed_sizes(layout, self.block.kind, multiples)
        self.ordered = int((order[numbers[0]] >= 0).sum())  # rounds that stand in the order
        self.most = self.block.size - minimum[numbers[0]]
        self.taken = 0
        columns, values = [], []  # per layer: indices of what is left, lowest score first, and these scores
        for number in numbers:
            score = scores[number]
            if score is None:
                self.most = self.ordered  # not pruned
                continue
            left = (order[number] < 0).nonzero().squeeze(1)
            found = torch.sort(score.cpu()[left], stable=True)
            columns.append(left[found.indices].tolist())
            values.append(found.values.double())
        self.structures = list(zip(*columns))
        self.scores: list[float] = torch.stack(values).mean(dim=0).tolist() if values else []

    def kept(self, ordered: int) -> int:
        return plain_size(kept_structures(self.block, ordered, self.multiples), self.sizes)

    def gone(self) -> int:
        return (self.block.size - self.kept(self.ordered)) * self.cost

    def next_step(self) -> int:
        """Parameters that go once the layers come down to their next size; 0 if there is no smaller one."""
        now = self.kept(self.ordered)
        later = (self.kept(ordered) for ordered in range(self.ordered + 1, self.most + 1))
        return (now - next((kept for kept in later if kept < now), now)) * self.cost

    def score(self) -> float:
        return self.scores[self.taken]

    def take(self) -> list[tuple[int, int]]:
        """The next round."""
        chosen = list(zip(self.numbers, self.structures[self.taken]))
        self.taken += 1
        self.ordered += 1
        return chosen
