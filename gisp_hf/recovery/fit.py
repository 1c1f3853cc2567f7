"""The re-fit of output projections in closed form: no gradient, no training.

For each decoder layer in order, first ``o_proj``, then ``down_proj``: with ``X`` (tokens x inputs) what enters the
projection in the pruned model so far, ``W`` (out x inputs) its weight and ``T`` (tokens x out) a target, the weight
becomes ``W + D``, where ``D`` minimises ``sum_t |T_t - (W + D) X_t|^2 + ridge * mean(diag X^T X) * |D|^2``.

Targets (the blend mixes them):
- own: what the unpruned projection puts out if the unpruned attention or MLP is given the pruned model's stream;
- residual: what takes the pruned model's residual stream back to that of the unpruned model behind this projection. In
  families with a norm behind the projection (Gemma) it is what the unpruned projection puts out in its own stream.

A second sweep over restored layers would bring nothing new: a layer's inputs and targets depend on earlier layers only.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging as progress_bars

from gisp_hf.models.discovery import family_of
from gisp_hf.models.fingerprint import tensor_checksum
from gisp_hf.models.shards import add_over_ranks, all_ranks
from gisp_hf.recovery.batches import Batch, mask_of
from gisp_hf.recovery.config import RestoreConfig
from gisp_hf.recovery.grams import Grams, best_ridge, solve_ridge, tokens_that_count
from gisp_hf.recovery.hidden import Hidden
from gisp_hf.recovery.layers import Layers, Reached
from gisp_hf.recovery.record import LayerError

HELD_OUT = 10  # one sequence in so many is held out for the choice of the ridge


@dataclass(frozen=True)
class Fit:
    """A restored weight, in the dtype in which the level stores it.

    ``checksum``: the entry of this weight in a fingerprint (`gisp_hf.models.fingerprint.combine_checksums`).
    """

    parameter: str
    weight: torch.Tensor
    error: LayerError
    tokens: int
    checksum: tuple[str, tuple[int, ...], tuple[int, int]]

    def without_weight(self) -> "Fit":
        """The facts alone, which take no memory."""
        return replace(self, weight=self.weight.new_empty(0))


@torch.no_grad()
def restored_weights(
    pruned: Layers,
    dense: Layers,
    batches: Sequence[Batch],
    *,
    config: RestoreConfig,
    blend: float,
    progress: bool = True,
) -> Iterator[Fit]:
    """Restores layer after layer and yields each weight as it is done.

    In memory at once: one layer of each model, two Gram matrices (one for a single ridge), and the hidden states of
    ``batches``.

    Args:
        batches: of `batches_of`. With several processes each
            takes its share, and all of them yield the same weights.

    Raises:
        FloatingPointError: if inputs or targets are not finite; the message names the layer.
    """
    group = all_ranks()
    projections = _projections(pruned)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gisp-"))) if config.spill else None
        work = _Work(pruned, dense, batches, config=config, blend=blend, group=group, folder=folder)
        total = sum(len(names) for names in projections)
        bar = stack.enter_context(progress_bars.tqdm(total=total, desc="Restoring", disable=not progress))
        for number, names in enumerate(projections):
            for fit in work.layer(number, names):
                yield fit
                bar.update()
                bar.set_postfix_str(
                    f"layer {fit.error.layer} {fit.error.projection.rpartition('.')[2]}: "
                    f"{fit.error.before:.3f} -> {fit.error.after:.3f}"
                )


def _projections(layers: Layers) -> list[list[str]]:
    """Per layer, the linear maps through which its structures are read, in the order in which they are run."""
    rows = family_of(layers.shell).blocks
    names = dict.fromkeys(p.module for row in rows for p in row.projections if p.dim == 1)
    found = []
    for layer in layers.layers:
        modules = dict(layer.named_modules())
        found.append([name for name in names if isinstance(modules.get(name), nn.Linear)])
    return found


class _Work:
    """The streams of both models, and the restoration of one layer after the other."""

    def __init__(
        self,
        pruned: Layers,
        dense: Layers,
        batches: Sequence[Batch],
        *,
        config: RestoreConfig,
        blend: float,
        group: dist.ProcessGroup | None,
        folder: Path | None,
    ) -> None:
        self.pruned, self.dense = pruned, dense
        first = [0, *accumulate(len(batch["input_ids"]) for batch in batches)]  # number of a batch's first sequence
        mine = slice(None) if group is None else slice(dist.get_rank(group), None, dist.get_world_size(group))
        self.batches, self.first = list(batches)[mine], first[:-1][mine]
        self.config, self.blend, self.group, self.folder = config, blend, group, folder
        self.device = pruned.device
        self.stream, self.dense_stream = Hidden(folder, "pruned"), Hidden(folder, "dense")
        for number, hidden in enumerate(pruned.embed(self.batches)):
            self.stream.put(number, hidden)
        # A projection that no module but the layer holds has no target of its own.
        self.follow_dense = blend > 0 or any("." not in name for names in _projections(pruned) for name in names)
        if self.follow_dense:
            for number, hidden in enumerate(dense.embed(self.batches)):
                self.dense_stream.put(number, hidden)
        self._adds_up: bool | None = None  # whether a layer adds the outputs of its projections to the stream

    def layer(self, number: int, names: Sequence[str]) -> Iterator[Fit]:
        with self.pruned.loaded(number) as layer, self.dense.loaded(number) as dense_layer:
            goals = {name: Hidden(self.folder, f"goal-{name}") for name in names[1:]}
            for index in range(len(names)):
                yield self._fit(
                    number, layer, dense_layer, names=names[: index + 1], following=names[index + 1 :], goals=goals
                )
            for batch in range(len(self.batches)):
                out = self.pruned.run(number, self._hidden(batch), self.batches[batch])
                assert out is not None
                self.stream.put(batch, out)

    def _hidden(self, batch: int) -> torch.Tensor:
        return self.stream.get(batch, self.device)

    def _fit(
        self,
        number: int,
        layer: nn.Module,
        dense_layer: nn.Module,
        *,
        names: Sequence[str],
        following: Sequence[str],
        goals: Mapping[str, Hidden],
    ) -> Fit:
        """Restores the last of ``names``; those before it are restored already."""
        name = names[-1]
        projection = layer.get_submodule(name)
        assert isinstance(projection, nn.Linear)
        parameter = f"{self.pruned.prefix}.{number}.{name}.weight"
        shape = projection.in_features, projection.out_features
        choose = len(self.config.ridge) > 1
        grams = Grams(*shape, device=self.device)
        held_out = Grams(*shape, device=self.device) if choose else grams
        reference = torch.zeros((), device=self.device)  # sum |T|^2
        for batch, inputs in enumerate(self.batches):
            goal = self._goal(number, dense_layer, batch, names=names, following=following, goals=goals)
            seen = self._see(number, layer, batch, names=names)
            x = seen["input"]
            output = F.linear(x, projection.weight, projection.bias)
            target = torch.zeros_like(output, dtype=torch.float32)
            own = self._own(dense_layer, name, seen) if self.blend < 1 else None
            blend = self.blend if own is not None else 1.0
            if own is not None:
                target += (1 - blend) * own.float()
            if goal is not None and blend > 0:
                target += blend * (goal.float() - seen["stream"].float() if self._adds_up else goal.float())
            rest = target - output.float()
            mask = mask_of(inputs)
            reference += tokens_that_count(target, mask).square().sum()
            if choose:
                out_of = (torch.arange(len(x)) + self.first[batch]) % HELD_OUT == HELD_OUT - 1
                for part, rows in ((grams, ~out_of), (held_out, out_of)):
                    if rows.any():
                        part.add(x[rows], rest[rows], mask=None if mask is None else mask[rows])
            else:
                grams.add(x, rest, mask=mask)
        grams.add_over_ranks(self.group)
        if choose:
            held_out.add_over_ranks(self.group)
        (reference,) = add_over_ranks([reference], self.group)
        if not (grams.is_finite() and held_out.is_finite() and bool(reference.isfinite())):
            raise FloatingPointError(
                f"what enters or leaves {parameter} on the calibration tokens is not finite: weights of a model are "
                "damaged, or its dtype overflows; nothing has been changed"
            )
        ridge = self.config.middle_ridge
        if choose:
            if float(held_out.tokens):
                ridge = best_ridge(grams, held_out, self.config.ridge)
            grams.merge(held_out)
        tokens = int(grams.tokens)
        change = solve_ridge(grams.gram, grams.cross, ridge).T
        before, dtype = projection.weight.double(), self.pruned.stored[parameter]
        weight = (before + change).to(dtype)  # rounded once, here
        if not bool(weight.isfinite().all()):
            raise FloatingPointError(f"the restored {parameter} overflows {dtype}; raise ridge")
        after = grams.squared_error(weight.double() - before)
        # Not copied into the old one, which may be that of a model in memory.
        projection.weight = nn.Parameter(weight.to(projection.weight.dtype), requires_grad=False)
        error = LayerError(
            layer=number,
            projection=name,
            inputs=projection.in_features,
            ridge=ridge,
            before=_ratio(grams.squared_error(), float(reference)),
            after=_ratio(after, float(reference)),
        )
        checksum = parameter, tuple(weight.shape), tensor_checksum(weight)
        return Fit(parameter, weight.cpu(), error, tokens, checksum)

    # ---- targets -------------------------------------------------------------------------------------------------

    def _goal(
        self,
        number: int,
        dense_layer: nn.Module,
        batch: int,
        *,
        names: Sequence[str],
        following: Sequence[str],
        goals: Mapping[str, Hidden],
    ) -> torch.Tensor | None:
        """The stream that the residual target leads to; behind a norm, the projection's output. None if not needed."""
        if not self.follow_dense:
            return None
        if len(names) > 1:
            return goals[names[-1]].get(batch, self.device)
        hidden = self.dense_stream.get(batch, self.device)
        outputs: dict[str, torch.Tensor] = {}
        everything = (*names, *following)
        hooks = [(name, _keep_output(outputs, name)) for name in everything]
        out = self.dense.run(number, hidden, self.batches[batch], hooks)
        assert out is not None
        if self._adds_up is None:
            self._adds_up = _adds_up(hidden, list(outputs.values()), out)
        total, first = hidden, None
        for name in everything:
            total = total + outputs[name]
            goal = total if self._adds_up else outputs[name]
            if first is None:
                first = goal
            else:
                goals[name].put(batch, goal)
        self.dense_stream.put(batch, out)
        return first

    def _see(self, number: int, layer: nn.Module, batch: int, *, names: Sequence[str]) -> dict[str, Any]:
        """What enters a projection of the pruned model, the stream before its output, and its sublayer's arguments."""
        seen: dict[str, Any] = {"stream": self._hidden(batch)}
        outputs: dict[str, torch.Tensor] = {}
        hooks: list[tuple[str, Callable[[nn.Module], Any]]] = [
            (name, _keep_output(outputs, name)) for name in names[:-1]
        ]
        sublayer = names[-1].rpartition(".")[0]
        if sublayer:

            def keep_arguments(_: nn.Module, args: Any, kwargs: Any) -> None:
                seen["arguments"] = args, kwargs

            hooks.append((sublayer, lambda module: module.register_forward_pre_hook(keep_arguments, with_kwargs=True)))

        def keep_input(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen["input"] = args[0]
            raise Reached

        hooks.append((names[-1], lambda module: module.register_forward_pre_hook(keep_input)))
        self.pruned.run(number, seen["stream"], self.batches[batch], hooks)
        for output in outputs.values():
            seen["stream"] = seen["stream"] + output
        return seen

    def _own(self, dense_layer: nn.Module, name: str, seen: Mapping[str, Any]) -> torch.Tensor | None:
        """The output of the unpruned projection for the pruned model's stream; None if no module holds it."""
        if "arguments" not in seen:
            return None
        args, kwargs = seen["arguments"]
        outputs: dict[str, torch.Tensor] = {}
        handle = _keep_output(outputs, name)(dense_layer.get_submodule(name))
        try:
            dense_layer.get_submodule(name.rpartition(".")[0])(*args, **kwargs)
        finally:
            handle.remove()
        return outputs[name]


def _keep_output(outputs: dict[str, torch.Tensor], name: str) -> Callable[[nn.Module], Any]:
    def keep(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        outputs[name] = output

    return lambda module: module.register_forward_hook(keep)


def _adds_up(hidden: torch.Tensor, outputs: Sequence[torch.Tensor], out: torch.Tensor) -> bool:
    """Whether a layer adds its projections' outputs to the stream as they are, with no norm or factor between."""
    total = hidden.float() + sum(output.float() for output in outputs)
    update = (out.float() - hidden.float()).norm(dim=-1)
    off = (out.float() - total).norm(dim=-1)
    return bool((off <= 0.1 * update).float().mean() > 0.5)  # of most tokens: a few have huge, badly rounded entries


def _ratio(error: float, reference: float) -> float:
    return math.sqrt(error / reference) if reference > 0 else 0.0
