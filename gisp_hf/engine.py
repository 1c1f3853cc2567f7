"""The work of pruning: gradients in, structures out. No I/O, no loop, no Trainer."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from gisp_hf.config import GISPConfig
from gisp_hf.scoring import normalizer, score_slices
from gisp_hf.selection import (
    check_reachable,
    floors,
    kept_structures,
    parameter_budget,
    removed_mask,
    removed_parameters,
    select,
)
from gisp_hf.structures import Layout
from gisp_hf.surgery import slice_structures, zero_structures


class NonFiniteGradientError(FloatingPointError):
    """A gradient holds NaN or infinity, so that no ranking can be trusted."""


@dataclass(frozen=True)
class Removal:
    """What one call of ``Engine.advance`` took out."""

    groups: int
    channels: int


class Engine:
    """Scores a model's structures from its gradients and removes the least important ones, again and again.

    One pruning step is one ``accumulate`` after the backward passes, then ``advance`` to one or more growing targets.

    Args:
        model: an unpruned model of a supported family; changed in place by ``advance``.
        layout: its blocks (``architectures.discover``).
        config: how to prune.
        shrink: slice structures out, so that later passes cost less; otherwise set them to zero. Both give the same
            removal order, up to structures whose scores differ by less than the rounding of the forward pass.

    Raises:
        ValueError: if the highest level cannot be reached.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, config: GISPConfig, *, shrink: bool = True) -> None:
        check_reachable(layout, config)
        self.model = model
        self.layout = layout
        self.config = config
        self.shrink = shrink
        self.minimum = floors(layout, config)
        self.ranks = [torch.full((block.size,), -1, dtype=torch.int32) for block in layout.blocks]
        self.length = 0  # structures ranked so far
        # Per block, which structures the model has lost. Fewer than are ranked, where channels are rounded up.
        self.gone = [torch.zeros(block.size, dtype=torch.bool) for block in layout.blocks]
        self.scores: list[torch.Tensor | None] = [None] * len(layout.blocks)

    @property
    def scored_parameters(self) -> list[str]:
        """Names of the parameters whose gradients are needed; everything else can be frozen."""
        return [
            member.parameter
            for block, minimum in zip(self.layout.blocks, self.minimum)
            if block.size > minimum
            for member in block.members
        ]

    @property
    def removed_parameters(self) -> int:
        return removed_parameters(
            self.layout, self.ranks, length=self.length, channel_multiple=self.config.channel_multiple
        )

    @property
    def sparsity(self) -> float:
        """The fraction of the decoder layers' parameters that is gone."""
        return self.removed_parameters / self.layout.total

    def accumulate(self) -> None:
        """Turns the gradients of all scored parameters into scores, and frees them.

        ``parameter.grad`` must hold the gradient of the whole calibration pass. Scores are float32, normalised, of
        shape ``(block.size,)`` and zero where a structure is gone already.

        Raises:
            ValueError: if a gradient is missing.
            NonFiniteGradientError: if one is not finite. Scores and model are as before.
        """
        finite: dict[str, torch.Tensor] = {}
        scores: list[torch.Tensor | None] = []
        for block, minimum, gone in zip(self.layout.blocks, self.minimum, self.gone):
            if block.size <= minimum:
                scores.append(None)
                continue
            total: torch.Tensor | None = None
            for member in block.members:
                parameter = self.model.get_parameter(member.parameter)
                if parameter.grad is None:
                    raise ValueError(
                        f"{member.parameter} has no gradient: the loss does not depend on it, or its backward pass was "
                        "switched off. Pruning needs a loss that runs through every layer, with gradients on"
                    )
                part = score_slices(parameter, parameter.grad, dim=member.dim, width=member.width)
                finite[member.parameter] = part.isfinite().all()
                total = part if total is None else total + part
                parameter.grad = None
            assert total is not None
            total = total / normalizer(block, self.config.normalization)
            if self.shrink:
                full = torch.zeros(block.size, device=total.device)
                full[(~gone).nonzero().squeeze(1).to(total.device)] = total
                total = full
            scores.append(total)
        if finite and not torch.stack(list(finite.values())).all():  # one wait for the device, not one per parameter
            bad = [name for name, ok in finite.items() if not ok]
            raise NonFiniteGradientError(f"the gradient of {bad[0]} is not finite (nor that of {len(bad) - 1} others)")
        self.scores = scores

    def advance(self, target: float) -> Removal:
        """Removes the lowest-scored structures until ``target`` (a fraction, 0-1) of the parameters is gone."""
        chosen = select(
            self.layout,
            self.scores,
            self.ranks,
            minimum=self.minimum,
            budget=parameter_budget(self.layout, target),
            channel_multiple=self.config.channel_multiple,
        )
        for number, index in chosen:
            self.ranks[number][index] = self.length
            self.length += 1
        before = self._counts()
        for number in sorted({number for number, _ in chosen}):
            self._operate(number)
        after = self._counts()
        return Removal(groups=after[0] - before[0], channels=after[1] - before[1])

    def kept(self) -> list[torch.Tensor]:
        """Per block, the increasing original indices of the structures that the model still has."""
        return [(~gone).nonzero().squeeze(1) for gone in self.gone]

    def _counts(self) -> tuple[int, int]:
        counts = {"attention": 0, "mlp": 0}
        for block, gone in zip(self.layout.blocks, self.gone):
            counts[block.kind] += int(gone.sum())
        return counts["attention"], counts["mlp"]

    def _operate(self, number: int) -> None:
        block, rank, gone = self.layout.blocks[number], self.ranks[number], self.gone[number]
        now = removed_mask(block, rank, length=self.length, channel_multiple=self.config.channel_multiple)
        assert int((~now).sum()) == kept_structures(block, int((rank >= 0).sum()), self.config.channel_multiple)
        fresh = now & ~gone
        if not fresh.any():
            return
        if self.shrink:
            slice_structures(self.model, block, (~fresh)[~gone].nonzero().squeeze(1))
        else:
            zero_structures(self.model, block, fresh.nonzero().squeeze(1))
        self.gone[number] = now
