"""The work of pruning: gradients in, structures out. No I/O, no loop, no Trainer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from gisp_hf.config import GISPConfig
from gisp_hf.criteria.taylor import normalizer, score_slices
from gisp_hf.models.layout import Block, Layout, Member
from gisp_hf.models.shards import add_over_shards, local_rows, shard_group
from gisp_hf.models.surgery import slice_structures, zero_structures
from gisp_hf.pruning.selection import (
    check_reachable,
    floors,
    parameter_budget,
    removed_mask,
    removed_parameters,
    select,
)


class NonFiniteGradientError(FloatingPointError):
    """A gradient holds NaN or infinity, so that no ranking can be trusted."""


@dataclass(frozen=True)
class Removal:
    """What one call of ``Engine.advance`` took out."""

    groups: int
    channels: int


class Engine:
    """Scores a model's structures from its gradients and removes the least important ones, again and again.

    One pruning step is ``accumulate`` after the backward passes (once for each layer group, if there are several), then
    ``advance`` to one or more growing targets.

    Args:
        model: an unpruned model of a supported family; changed in place by ``advance``.
        layout: its blocks (``architectures.discover``).
        config: how to prune.
        shrink: slice structures out, so that later passes cost less; otherwise set them to zero. Both give the same
            removal order, up to structures whose scores differ by less than the rounding of the forward pass.
        layer_groups: into how many groups of consecutive layers the scored ones are split, each with a pass of its own.

    Raises:
        ValueError: if the highest level cannot be reached, or there are more groups than layers to score.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        config: GISPConfig,
        *,
        shrink: bool = True,
        layer_groups: int = 1,
    ) -> None:
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
        self.groups = self._split(layer_groups)
        self._parts: dict[str, torch.Tensor] = {}  # parameter -> its share of its block's scores

    def _split(self, count: int) -> list[list[int]]:
        """Block numbers of each layer group, for the blocks that can lose anything."""
        scored = [number for number, block in enumerate(self.layout.blocks) if block.size > self.minimum[number]]
        layers = sorted({self.layout.blocks[number].layer for number in scored})
        if not 1 <= count <= len(layers):
            raise ValueError(
                f"layer_groups must lie between 1 and the {len(layers)} layers that are pruned, got {count}"
            )
        bounds = [len(layers) * i // count for i in range(count + 1)]
        parts = [set(layers[low:high]) for low, high in zip(bounds, bounds[1:])]
        return [[number for number in scored if self.layout.blocks[number].layer in part] for part in parts]

    def scored_parameters(self, group: int | None = None) -> list[str]:
        """Names of the parameters whose gradients are needed, in all or in one layer group; the rest can be frozen."""
        numbers = [n for part in self.groups for n in part] if group is None else self.groups[group]
        return [member.parameter for number in numbers for member in self.layout.blocks[number].members]

    @property
    def removed_parameters(self) -> int:
        return removed_parameters(
            self.layout, self.ranks, length=self.length, channel_multiple=self.config.channel_multiple
        )

    @property
    def sparsity(self) -> float:
        """The fraction of the decoder layers' parameters that is gone."""
        return self.removed_parameters / self.layout.total

    def score_early(self) -> list[RemovableHandle]:
        """Scores each parameter as soon as its gradient is complete, and frees the gradient at once.

        Only right where one backward pass is the whole calibration pass: with more, the gradients must be summed before
        the absolute value is taken. Returns handles that switch it off.
        """
        handles = []
        for number in (n for part in self.groups for n in part):
            for member in self.layout.blocks[number].members:
                parameter = self.model.get_parameter(member.parameter)
                handles.append(parameter.register_post_accumulate_grad_hook(self._hook(member)))
        return handles

    def _hook(self, member: Member) -> Callable[[torch.Tensor], None]:
        return lambda parameter: self._score(parameter, member)

    def _score(self, parameter: torch.Tensor, member: Member) -> None:
        assert parameter.grad is not None
        weight, gradient = local_rows(parameter), local_rows(parameter.grad)
        self._parts[member.parameter] = score_slices(
            weight.tensor,
            gradient.tensor,
            dim=member.dim,
            width=member.width,
            first_row=weight.first,
            total_rows=weight.total,
        )
        parameter.grad = None

    def accumulate(self, group: int = 0) -> None:
        """Turns the gradients of a layer group's parameters into scores, and frees them.

        ``parameter.grad`` must hold the gradient of the whole calibration pass. Scores are float32, normalised, of
        shape ``(block.size,)`` and zero where a structure is gone already.

        Raises:
            ValueError: if a gradient is missing.
            NonFiniteGradientError: if one is not finite. Scores and model are as before.
        """
        blocks = [(number, self.layout.blocks[number]) for number in self.groups[group]]
        shards = None
        for _, block in blocks:
            for member in block.members:
                parameter = self.model.get_parameter(member.parameter)
                shards = shards or shard_group(parameter)
                if member.parameter in self._parts:
                    continue
                if parameter.grad is None:
                    raise ValueError(
                        f"{member.parameter} has no gradient: the loss does not depend on it, or its backward pass was "
                        "switched off. Pruning needs a loss that runs through every layer, with gradients on"
                    )
                self._score(parameter, member)
        parts, self._parts = self._parts, {}
        broken = torch.stack([(~part.isfinite()).sum() for part in parts.values()])
        sums = [torch.stack([parts[member.parameter] for member in block.members]).sum(dim=0) for _, block in blocks]
        *sums, counts = add_over_shards([*sums, broken.float()], shards)
        if counts.any():  # one wait for the device, not one per parameter
            bad = [name for name, count in zip(parts, counts.tolist()) if count]
            raise NonFiniteGradientError(f"the gradient of {bad[0]} is not finite (nor that of {len(bad) - 1} others)")
        for (number, block), total in zip(blocks, sums):
            self.scores[number] = self._in_place(block, total / normalizer(block, self.config.normalization), number)

    def _in_place(self, block: Block, scores: torch.Tensor, number: int) -> torch.Tensor:
        """Scores of what the model still has, put at the original indices."""
        if not self.shrink:
            return scores
        full = torch.zeros(block.size, device=scores.device)
        full[(~self.gone[number]).nonzero().squeeze(1).to(scores.device)] = scores
        return full

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
        return self._operate()

    def restore(self, ranks: Sequence[torch.Tensor]) -> None:
        """Takes over a removal order made earlier, and removes from the unpruned model what it says is gone."""
        assert self.length == 0
        self.ranks = [rank.clone() for rank in ranks]
        self.length = sum(int((rank >= 0).sum()) for rank in ranks)
        self._operate()

    def kept(self) -> list[torch.Tensor]:
        """Per block, the increasing original indices of the structures that the model still has."""
        return [(~gone).nonzero().squeeze(1) for gone in self.gone]

    def _operate(self) -> Removal:
        """Brings the model in line with the order."""
        counts = {"attention": 0, "mlp": 0}
        for number, (block, rank, gone) in enumerate(zip(self.layout.blocks, self.ranks, self.gone)):
            now = removed_mask(block, rank, length=self.length, channel_multiple=self.config.channel_multiple)
            fresh = now & ~gone
            if not fresh.any():
                continue
            counts[block.kind] += int(fresh.sum())
            if self.shrink:
                slice_structures(self.model, block, (~fresh)[~gone].nonzero().squeeze(1))
            else:
                zero_structures(self.model, block, fresh.nonzero().squeeze(1))
            self.gone[number] = now
        return Removal(groups=counts["attention"], channels=counts["mlp"])
