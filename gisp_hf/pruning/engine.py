"""The work of pruning: sums of a criterion in, structures out. No I/O, no loop, no Trainer."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from gisp_hf.config import GISPConfig
from gisp_hf.criteria.base import Criterion, Needs, Sums
from gisp_hf.criteria.compensation import Compensation
from gisp_hf.models import family_of
from gisp_hf.models.gates import Gates
from gisp_hf.models.layout import Layout
from gisp_hf.models.plain import find_plain_sizes
from gisp_hf.models.shards import add_over_ranks, all_ranks, is_sharded, plain_parameters, shard_group
from gisp_hf.models.surgery import check_compensable, compensated, slice_structures, zero_structures
from gisp_hf.pruning.methods import find_method
from gisp_hf.pruning.normalization import normalizer, standardize
from gisp_hf.pruning.selection import (
    check_reachable,
    fractions_of_block,
    minimum_kept,
    parameter_budget,
    removed_masks,
    removed_parameters,
    select,
)
from gisp_hf.pruning.uniform import select_rounds

# What a criterion's sums were made of, for the message that one is not finite.
_QUANTITY = {
    "weights": "the weight",
    "activations": "the input",
    "activation_gradients": "the gradient of the input",
    "weight_gradients": "the gradient",
}


class NonFiniteGradientError(FloatingPointError):
    """A gradient (or whatever else the criterion reads) holds NaN or infinity, so that no ranking can be trusted."""


class ZeroScoreError(ValueError):
    """All scores of a pass are zero: the loss does not depend on any structure."""


class Engine:
    """Scores a model's structures and removes the least important ones, again and again.

    One pruning step is ``accumulate`` after the backward passes (once for each layer pass, if there are several), then
    ``advance`` to one or more growing targets.

    Args:
        model: a model of a supported family; changed in place by ``advance``.
        layout: its blocks (`gisp_hf.models.discover`).
        config: how to prune; its method says by which criterion.
        shrink: slice structures out, so that later passes cost less; otherwise set them to zero. Both give the same
            removal order, up to structures whose scores differ by less than the rounding of the forward pass.
        layer_passes: into how many parts the scored layers are split, each with a pass over the data of its own.
        gates: set activations to zero in place of weights (`gisp_hf.models.gates`), inside `watch`; not with
            ``shrink``. For weights that cannot be changed. The same removal order again.

    Attributes:
        order: per block, the removal order so far, int32 of shape ``(block.size,)``; -1 = still there.
        now: the layout of the model as it is now.

    Raises:
        ValueError: if the highest level cannot be reached, there are more passes than layers to score, or the model has
            no place for the biases of a method with compensation.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        config: GISPConfig,
        *,
        shrink: bool = True,
        layer_passes: int = 1,
        gates: bool = False,
    ) -> None:
        assert not (shrink and gates)
        self.method = find_method(config.method)
        if config.uniform:
            layout = replace(layout, plain_sizes=find_plain_sizes(model, layout))
        check_reachable(layout, config)
        self.model = model
        self.layout = layout
        self.now = layout
        self.config = config
        self.criterion: Criterion = self.method.criterion()
        self.shares = None if self.method.layer_shares is None else self.method.layer_shares()
        self.offsets: dict[int, float] = {}  # layer -> its share minus that of all layers together
        self.compensation = Compensation() if self.method.compensation else None
        if self.compensation is not None:
            if gates:
                raise ValueError(
                    f"method {config.method!r} gives levels more biases, and those of a quantized model or one with "
                    "adapters are cut out of its unquantized files; use a method without compensation, such as flap"
                )
            check_compensable(model, layout)
        self.shrink = shrink
        self.gates = Gates(layout) if gates else None
        self.minimum = minimum_kept(layout, config)
        self.order = [torch.full((block.size,), -1, dtype=torch.int32) for block in layout.blocks]
        self.length = 0  # structures in the order so far
        # Per block, which structures the model has lost. Fewer than are in the order, where counts are rounded up.
        self.gone = [torch.zeros(block.size, dtype=torch.bool) for block in layout.blocks]
        self.scores: list[torch.Tensor | None] = [None] * len(layout.blocks)
        self.ranking = self.scores  # what structures are compared by
        self.passes = self._split(layer_passes)
        self._watch_anew: Callable[[], None] | None = None

    def _split(self, count: int) -> list[list[int]]:
        """Block numbers of each layer pass, for the blocks that can lose anything."""
        if count != 1 and self.criterion.needs != "weight_gradients":
            raise ValueError(
                f"layer_passes={count} bounds the memory of weight gradients, and method {self.config.method!r} has "
                "none; use layer_passes=1"
            )
        scored = [number for number, block in enumerate(self.layout.blocks) if block.size > self.minimum[number]]
        layers = sorted({self.layout.blocks[number].layer for number in scored})
        if not 1 <= count <= len(layers):
            raise ValueError(
                f"layer_passes must lie between 1 and the {len(layers)} layers that are pruned, got {count}"
            )
        bounds = [len(layers) * i // count for i in range(count + 1)]
        parts = [set(layers[low:high]) for low, high in zip(bounds, bounds[1:])]
        return [[number for number in scored if self.layout.blocks[number].layer in part] for part in parts]

    def scored_parameters(self, layer_pass: int | None = None) -> list[str]:
        """Names of the parameters that belong to scored structures, of all passes or of one."""
        numbers = [n for part in self.passes for n in part] if layer_pass is None else self.passes[layer_pass]
        names = (member.parameter for number in numbers for member in self.now.blocks[number].members)
        return list(dict.fromkeys(names))

    def trained_parameters(self) -> list[str]:
        """Names of the parameters that need a gradient; the Trainer's backward pass needs one at least."""
        if self.criterion.needs == "weight_gradients":
            return self.scored_parameters()
        layers = family_of(self.model).layers + "."
        parameters = list(plain_parameters(self.model))
        small = [name for name, parameter in parameters if parameter.ndim == 1 and not name.startswith(layers)]
        return small[-1:] or [name for name, _ in parameters][-1:]  # the final norm

    @property
    def removed_parameters(self) -> int:
        return removed_parameters(
            self.layout,
            self.order,
            length=self.length,
            multiples=self.config.multiples,
            uniform=self.config.uniform,
        )

    @property
    def sparsity(self) -> float:
        """The fraction of the decoder layers' parameters that is gone."""
        return self.removed_parameters / self.layout.total

    def watch(self, *, micro_batches: int = 0) -> AbstractContextManager[None]:
        """Lets the criterion look at the model, until the context ends: at the blocks that can lose structures.

        Raises:
            ValueError: if the method compensates and parameters are sharded.
        """
        if self.compensation is not None and is_sharded(self.model.parameters()):
            raise ValueError(
                f"method {self.config.method!r} gives levels more biases, which needs parameters that are not sharded; "
                "use DDP or a single process, or a method without compensation"
            )
        return self._watch(micro_batches)

    @contextmanager
    def _watch(self, micro_batches: int) -> Iterator[None]:
        watchers = [w for w in (self.criterion, self.shares, self.compensation) if w is not None]
        with ExitStack() as outer, ExitStack() as stack:
            if self.gates is not None:  # before the criterion, which then sees the zeros
                outer.enter_context(self.gates.attached(self.model))

            def watch_anew() -> None:
                stack.close()
                scored = [self.now.blocks[number] for part in self.passes for number in part]
                layout = replace(self.now, blocks=tuple(block for block in scored if block.size))
                for watcher in watchers:
                    stack.enter_context(watcher.watch(self.model, layout, micro_batches=micro_batches))

            watch_anew()
            self._watch_anew = watch_anew
            try:
                yield
            finally:
                self._watch_anew = None

    def accumulate(self, layer_pass: int = 0) -> None:
        """Turns the criterion's sums of one pass into scores.

        Scores are float32, normalised, of shape ``(block.size,)`` and zero where a structure is gone already.

        Raises:
            ValueError: if the pass has not given what the criterion needs.
            NonFiniteGradientError: if something is not finite. Scores and model are as before.
            ZeroScoreError: if all scores are zero.
        """
        numbers = [number for number in self.passes[layer_pass] if self.now.blocks[number].size]
        if not numbers:  # every layer that may go is gone
            return
        everywhere = [number for part in self.passes for number in part if self.now.blocks[number].size]
        if self.shares is not None:
            seen = self._over_ranks(self.shares.sums(self.now, everywhere), self.shares.needs)
            self.offsets = self.shares.offsets(self.now, everywhere, seen)
        if self.compensation is not None:
            seen = self._over_ranks(self.compensation.sums(self.now, everywhere), self.compensation.needs)
            self.compensation.take_means(seen)
        if self.criterion.needs == "weights" and self.scores[numbers[0]] is not None:
            return  # weights never change
        sums = self._over_ranks(self.criterion.sums(self.now, numbers), self.criterion.needs)
        scores = self.criterion.scores(self.now, numbers, sums)
        if self.criterion.needs == "activation_gradients" and (group := all_ranks()) is not None:
            # A loss is scaled up by the number of processes, for the mean over them that parameters' gradients get.
            scores = [score / dist.get_world_size(group) for score in scores]
        if not torch.stack([score.any() for score in scores]).any():  # one wait for the device
            raise ZeroScoreError(
                "all scores are zero: the loss depends on no structure. Are all labels -100, or is the loss a "
                "constant? Look at one batch of the data set"
            )
        for number, score in zip(numbers, scores):
            score = score / normalizer(self.layout.blocks[number], self.config.normalization)
            self.scores[number] = self._average(self._in_place(score, number), self.scores[number])
        if layer_pass == len(self.passes) - 1:
            # Once a step: a level on the way to the step's target must not change the scale.
            standardized = self.config.normalization == "standardized"
            self.ranking = standardize(self.layout, self.scores, self.order) if standardized else self.scores

    def _average(self, score: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """The moving average of a block's scores; the first step's score begins it."""
        momentum = self.config.score_momentum
        return score if before is None or not momentum else torch.lerp(score, before.to(score.device), momentum)

    def _over_ranks(self, sums: Sums, needs: Needs) -> Sums:
        """The sums of all processes. Every process finds out alike that one of them is not finite."""
        if needs.startswith("weight"):
            parameters = (self.model.get_parameter(name) for name in self.scored_parameters())
            group = next((found for p in parameters if (found := shard_group(p)) is not None), None)
        else:
            group = all_ranks()
        names, parts = list(sums), add_over_ranks(list(sums.values()), group)
        if parts:
            counts = torch.stack([(~part.isfinite()).sum() for part in parts])
            if counts.any():  # one wait for the device, not one per tensor
                bad = [name for (_, name), count in zip(names, counts.tolist()) if count]
                everything = (
                    ": the loss is not, or a norm over all of them has spread it" if len(bad) == len(names) else ""
                )
                raise NonFiniteGradientError(
                    f"{_QUANTITY[needs]} of {bad[0]} is not finite (nor that of {len(bad) - 1} others{everything})"
                )
        return dict(zip(names, parts))

    def _in_place(self, scores: torch.Tensor, number: int) -> torch.Tensor:
        """Scores of what the model still has, put at the original indices."""
        if not self.shrink:
            return scores
        full = torch.zeros(self.layout.blocks[number].size, device=scores.device)
        full[(~self.gone[number]).nonzero().squeeze(1).to(scores.device)] = scores
        return full

    def advance(self, target: float) -> Mapping[str, int]:
        """Removes the lowest-scored structures until ``target`` (a fraction, 0-1) of the parameters is gone.

        Returns:
            kind -> structures that went.
        """
        scores = self.ranking
        if self.method.scope == "layer":
            scores = fractions_of_block(self.layout, scores, self.order, offsets=self.offsets)
        budget = parameter_budget(self.layout, target)
        if self.config.uniform:
            level = min(level for level in self.config.sparsity_levels if level >= target - 1e-9)
            chosen = select_rounds(
                self.layout,
                scores,
                self.order,
                minimum=self.minimum,
                budget=budget,
                limit=parameter_budget(self.layout, level),
                multiples=self.config.multiples,
            )
        else:
            chosen = select(
                self.layout,
                scores,
                self.order,
                minimum=self.minimum,
                budget=budget,
                multiples=self.config.multiples,
            )
        for number, index in chosen:
            self.order[number][index] = self.length
            self.length += 1
        return self._operate()

    def averages(self) -> dict[str, torch.Tensor]:
        """Block -> moving average of its scores, which a run that goes on needs; empty without `score_momentum`."""
        if not self.config.score_momentum:
            return {}
        pairs = zip(self.layout.blocks, self.scores)
        return {block.name: score.float().cpu() for block, score in pairs if score is not None}

    def restore(self, order: Sequence[torch.Tensor], averages: Mapping[str, torch.Tensor] | None = None) -> None:
        """Takes over a removal order made earlier, and removes from the unpruned model what it says is gone.

        Args:
            averages: as `averages` gave them.

        Raises:
            ValueError: if the method compensates, since the mean outputs of what is gone are not known any more.
        """
        assert self.length == 0
        if self.compensation is not None:
            raise ValueError(
                f"a run of method {self.config.method!r} cannot be resumed: its checkpoints do not hold the mean "
                "outputs of removed structures. Start it anew, without resume_from_checkpoint, in another folder"
            )
        if self.criterion.needs != "weights":  # scores of weights never change: they are made anew
            self.scores = [(averages or {}).get(block.name) for block in self.layout.blocks]
        self.ranking = self.scores
        self.order = [positions.clone() for positions in order]
        self.length = sum(int((positions >= 0).sum()) for positions in order)
        self._operate()

    def kept(self) -> list[torch.Tensor]:
        """Per block, the increasing original indices of the structures that the model still has."""
        return [(~gone).nonzero().squeeze(1) for gone in self.gone]

    def as_level(self) -> AbstractContextManager[frozenset[str]]:
        """The model as it is saved and evaluated: with the biases of a method that compensates, until the context ends.

        Yields:
            the names of the parameters whose values are not those of the unpruned model.
        """
        if self.compensation is None:
            return nullcontext(frozenset())
        return compensated(self.model, self.now, self.compensation.biases)

    def slice_zeros(self) -> None:
        """Slices out the structures that are zeros so far; from now on, structures are sliced out at once."""
        kept = self.kept()
        reduced = self.now.reduced(kept)
        slice_structures(self.model, self.now, kept)
        self.now, self.shrink = reduced, True

    def _operate(self) -> Mapping[str, int]:
        """Brings the model in line with the order."""
        masks = removed_masks(
            self.layout,
            self.order,
            length=self.length,
            multiples=self.config.multiples,
            uniform=self.config.uniform,
        )
        fresh = [now & ~gone for now, gone in zip(masks, self.gone)]
        counts: Counter[str] = Counter()
        for block, mask in zip(self.layout.blocks, fresh):
            counts[block.kind] += int(mask.sum())
        if not any(counts.values()):
            return counts
        if self.compensation is not None:
            removed = [mask[~gone] if self.shrink else mask for mask, gone in zip(fresh, self.gone)]
            self.compensation.add_removed(self.now, [mask.nonzero().squeeze(1) for mask in removed], sliced=self.shrink)
        if self.gates is not None:
            for number, mask in enumerate(fresh):
                self.gates.shut(number, mask.nonzero().squeeze(1))
        elif self.shrink:
            kept = [(~mask)[~gone].nonzero().squeeze(1) for mask, gone in zip(fresh, self.gone)]
            reduced = self.now.reduced(kept)
            slice_structures(self.model, self.now, kept)
            self.now = reduced
            if self.now.whole and self._watch_anew is not None:  # layers have new names
                self._watch_anew()
        else:
            for block, mask in zip(self.layout.blocks, fresh):
                if mask.any():
                    zero_structures(self.model, block, mask.nonzero().squeeze(1))
        self.gone = masks
        return counts
