"""Output projections that all levels of a run share: one set of weights that is good for each level.

Notation: ``W`` (out x in) the weight of an output projection in the unpruned model, ``K_l`` the inputs that level
``l`` keeps (nested), ``X_l`` (tokens x in) what enters the projection at level ``l``, zero outside ``K_l``, ``T_l`` its
target, ``w_l`` the weight of the level. The full width is a level that keeps all inputs. The change ``D`` minimises

    sum_l w_l (sum_t |T_l,t - (W + D) X_l,t|^2 + ridge_l |D on K_l|^2),  ridge_l = ridge * mean(diag X_l^T X_l),

which one solution of ``sum_l w_l (X_l^T X_l + ridge_l P_l) D^T = sum_l w_l X_l^T (T_l - W X_l)`` gives, ``P_l`` the
projection on ``K_l``. With one level it is the re-fit of `gisp_hf.recovery.fit`.

If each ``X_l`` is a part of the unpruned model's inputs, of Gram matrix ``G``, and ``T_l`` the output of the unpruned
projection, that is ``(M o G + ridge diag(c)) W'^T = diag(c) (G + ridge) W^T``, where ``c_i`` is the summed weight of
the levels that keep input ``i`` and ``M_ij = min(c_i, c_j)`` (`fit_common`). Otherwise each level has a stream of its
own, with the weights that earlier layers share already (`shared_weights`).
"""

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging as progress_bars

from gisp_hf.models.layout import Layout
from gisp_hf.pruning.trajectory import Trajectory
from gisp_hf.recovery.batches import Batch, mask_of
from gisp_hf.recovery.config import RestoreConfig
from gisp_hf.recovery.grams import Grams, mean_diagonal, solve_positive
from gisp_hf.recovery.hidden import Hidden
from gisp_hf.recovery.layers import Layers, Reached

logger = logging.getLogger(__name__)

FULL = 0.0  # the sparsity of full width
FULL_WEIGHT = 12.0  # of full width in the fit; levels have 1
FULL_WEIGHT_BESIDE_NORMS = 100.0  # where the levels, and not full width, get norms of their own, which repair them


@dataclass(frozen=True)
class SharedFit:
    """A weight that all levels share, unsorted, in the dtype of the model's files.

    Attributes:
        errors: sparsity -> relative output error of that level, ``sqrt(sum |T - W' X|^2 / sum |T|^2)``, before and
            after the fit.
    """

    parameter: str
    weight: torch.Tensor
    errors: Mapping[float, tuple[float, float]]


# ---- one projection --------------------------------------------------------------------------------------------------


def fit_levels(
    grams: Sequence[Grams], keeps: Sequence[torch.Tensor], weights: Sequence[float], *, ridge: float
) -> torch.Tensor:
    """The change ``D``, float64 of shape ``(out, in)``, from each level's sums.

    Args:
        grams: of each level: ``X_l`` with zeros outside ``K_l``, and ``T_l - W X_l``.
        keeps: ``K_l`` of each level, bool of shape ``(in,)``.
        weights: ``w_l``, positive.
    """
    size = len(keeps[0])
    device = grams[0].gram.device
    normal = torch.zeros(size, size, dtype=torch.float64, device=device)
    right = torch.zeros(size, grams[0].cross.shape[1], dtype=torch.float64, device=device)
    for sums, keep, weight in zip(grams, keeps, weights):
        normal += weight * sums.gram.double()
        normal.diagonal().add_(weight * ridge * mean_diagonal(sums.gram) * keep.to(device))
        right += weight * sums.cross.double()
    return _solve(normal, right)


def fit_common(
    gram: torch.Tensor,
    keeps: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    weight: torch.Tensor,
    ridge: float,
) -> torch.Tensor:
    """The shared weight ``W'``, float64 of shape ``(out, in)``, if all levels see parts of the same inputs.

    Args:
        gram: ``G`` of the unpruned model's inputs, shape ``(in, in)``.
        keeps, weights: as in `fit_levels`; the sets must be nested.
        weight: ``W``.
        ridge: a fraction of the mean of ``diag G``.
    """
    counts = torch.stack([w * keep.double() for keep, w in zip(keeps, weights)]).sum(dim=0).to(gram.device)  # c
    shared = torch.minimum(counts[:, None], counts[None, :])  # M
    damping = ridge * mean_diagonal(gram)
    w = weight.to(gram.device, torch.float64)
    normal = shared * gram.double()
    # for the change D = W' - W both sides lose W: diag(c) (G + ridge) W^T - (M o G + ridge diag(c)) W^T
    right = (counts[:, None] * gram.double() - normal) @ w.T
    normal.diagonal().add_(damping * counts)
    return w + _solve(normal, right)


def _solve(normal: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``D`` of ``normal D^T = right``; an input that no level keeps, or that is always zero, does not change."""
    used = normal.diagonal() > 0
    change = torch.zeros_like(right)
    change[used] = solve_positive(normal[used][:, used], right[used])
    return change.T


# ---- all layers ------------------------------------------------------------------------------------------------------


def full_weight(norms: str) -> float:
    """The weight of full width in the fit by default, for norms of ``base``, ``levels`` or ``all``."""
    return FULL_WEIGHT_BESIDE_NORMS if norms == "levels" else FULL_WEIGHT


def level_weights(
    levels: Sequence[float], full: float = FULL_WEIGHT, others: Mapping[float, float] | None = None
) -> dict[float, float]:
    """Sparsity -> weight in the fit: ``full`` for full width, 1 for each of ``levels`` unless ``others`` names it.

    Raises:
        ValueError: if a weight is not positive, or belongs to no level.
    """
    weights = {FULL: float(full), **dict.fromkeys(sorted(levels), 1.0)}
    for level, weight in (others or {}).items():
        if level not in weights:
            raise ValueError(f"there is a weight for level {level:g}, but the levels are {', '.join(map(str, levels))}")
        weights[level] = float(weight)
    for level, weight in weights.items():
        if not 0 < weight < math.inf:
            raise ValueError(f"the weight of level {level:g} must be positive and finite, got {weight:g}")
    return weights


def kept_inputs(trajectory: Trajectory, sparsity: float) -> dict[str, torch.Tensor]:
    """Parameter -> inputs that the level keeps, bool of shape ``(in,)``, for every output projection."""
    layout = trajectory.layout
    kept = [torch.arange(block.size) for block in layout.blocks] if sparsity == FULL else trajectory.kept(sparsity)
    inputs = {}
    for block, keep in zip(layout.blocks, kept):
        for member in block.members:
            if member.dim == 1:
                mask = torch.zeros(block.size * member.width, dtype=torch.bool)
                mask[member.rows(keep).flatten()] = True
                inputs[member.parameter] = mask
    return inputs


@torch.no_grad()
def shared_weights(
    dense: Layers,
    trajectory: Trajectory,
    batches: Sequence[Batch],
    *,
    weights: Mapping[float, float],
    config: RestoreConfig | None = None,
    streams: Literal["own", "unpruned"] = "unpruned",
    progress: bool = True,
) -> Iterator[SharedFit]:
    """Fits the output projections of one layer after the other and yields each weight as it is done.

    In memory at once: one layer, the Gram matrices of one projection, and the hidden states of each level (of one with
    ``streams="unpruned"``), which ``config.spill`` moves to files.

    Args:
        dense: the layers of the unpruned model.
        trajectory: made from that model.
        batches: ``input_ids`` (B, T) and perhaps ``attention_mask`` (B, T).
        weights: sparsity -> ``w_l`` (`level_weights`); 0 is the full width.
        config: its ``ridge`` (the middle one), ``blend`` of the targets and ``spill`` count.
        streams: ``"unpruned"``: all levels see what the unpruned model makes of the calibration text, one forward pass;
            ``"own"``: each sees what it makes of the text itself, about 2.5 passes a level.

    Raises:
        ValueError: if a level lies beyond the trajectory.
        FloatingPointError: if inputs are not finite; the message names the layer.
    """
    config = config or RestoreConfig()
    keeps = {level: kept_inputs(trajectory, level) for level in weights}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gisp-"))) if config.spill else None
        work = _Streams(dense, batches, keeps, weights=weights, config=config, folder=folder)
        names = [_projections(trajectory.layout, number, dense.prefix) for number in range(len(dense))]
        bar = progress_bars.tqdm(total=sum(map(len, names)), desc="Sharing", disable=not progress)
        stack.callback(bar.close)
        fit_layer = work.fit_own if streams == "own" else work.fit_unpruned
        for number, projections in enumerate(names):
            for fit in fit_layer(number, projections):
                yield fit
                bar.update()


def _projections(layout: Layout, number: int, prefix: str) -> list[str]:
    """Output projections of a layer, as modules of it, in the order in which they run."""
    parameters = [m.parameter for block in layout.blocks if block.layer == number for m in block.members if m.dim == 1]
    return [name.removeprefix(f"{prefix}.{number}.").removesuffix(".weight") for name in dict.fromkeys(parameters)]


class _Streams:
    """The hidden states of each level, and the fit of one layer after the other."""

    def __init__(
        self,
        dense: Layers,
        batches: Sequence[Batch],
        keeps: Mapping[float, Mapping[str, torch.Tensor]],
        *,
        weights: Mapping[float, float],
        config: RestoreConfig,
        folder: Path | None,
    ) -> None:
        self.dense, self.batches, self.keeps = dense, batches, keeps
        self.weights, self.config, self.folder = weights, config, folder
        self.streams: dict[float | None, Hidden] = {None: Hidden(folder, "unpruned")}  # None: the unpruned model
        for number, hidden in enumerate(dense.embed(batches)):
            self.streams[None].put(number, hidden)
        self._adds_up: bool | None = None

    def fit_unpruned(self, number: int, names: Sequence[str]) -> Iterator[SharedFit]:
        with self.dense.loaded(number) as layer:
            linear = {name: _linear(layer, name) for name in names}
            sums = {name: Grams(linear[name].in_features, device=self.dense.device) for name in names}
            for batch, inputs in enumerate(self.batches):
                hooks = [(name, _add_input(sums[name], mask_of(inputs))) for name in names]
                out = self.dense.run(number, self.streams[None].get(batch, self.dense.device), inputs, hooks)
                assert out is not None
                self.streams[None].put(batch, out)
            for name in names:
                parameter, w = self._parameter(number, name), linear[name].weight.double()
                self._check(parameter, sums[name])
                gram, keeps = sums[name].gram, [keep[parameter] for keep in self.keeps.values()]
                shared = fit_common(gram, keeps, list(self.weights.values()), weight=w, ridge=self.config.middle_ridge)
                reference = float(((w @ gram.double()) * w).sum())
                errors = {}
                for level, keep in zip(self.weights, keeps):
                    lacks = [w - part * keep.to(w.device) for part in (w, shared)]  # (out, in): what level l is off by
                    errors[level] = tuple(_ratio(float(((d @ gram.double()) * d).sum()), reference) for d in lacks)
                yield self._fit(parameter, shared, errors)  # type: ignore[arg-type]

    def fit_own(self, number: int, names: Sequence[str]) -> Iterator[SharedFit]:
        device = self.dense.device
        for level in self.weights:
            if level not in self.streams:
                self.streams[level] = Hidden(self.folder, f"level-{level:g}")
                for batch in range(len(self.batches)):  # all start with the same embeddings
                    self.streams[level].put(batch, self.streams[None].get(batch, device))
        with self.dense.loaded(number) as layer:
            goals = self._goals(number, names)
            for index, name in enumerate(names):
                parameter, projection = self._parameter(number, name), _linear(layer, name)
                found, errors = [], {}
                for level in self.weights:
                    sums, reference = self._sums(number, layer, level, names=names[: index + 1], goals=goals)
                    self._check(parameter, sums)
                    found.append((level, sums, reference))
                keeps = [self.keeps[level][parameter] for level in self.weights]
                change = fit_levels(
                    [sums for _, sums, _ in found], keeps, list(self.weights.values()), ridge=self.config.middle_ridge
                )
                for level, sums, reference in found:
                    pair = sums.squared_error(), sums.squared_error(change)
                    errors[level] = _ratio(pair[0], reference), _ratio(pair[1], reference)
                fit = self._fit(parameter, projection.weight.double() + change, errors)
                # a new parameter: the old one may be the unpruned model's own, which is only read
                shared = fit.weight.to(device, projection.weight.dtype)
                projection.weight = nn.Parameter(shared, requires_grad=False)
                yield fit
            for level in self.weights:
                hooks = [(name, _keep_inputs(self._mask(number, name, level))) for name in names]
                for batch, inputs in enumerate(self.batches):
                    out = self.dense.run(number, self.streams[level].get(batch, device), inputs, hooks)
                    assert out is not None
                    self.streams[level].put(batch, out)

    # ---- one projection of one level ---------------------------------------------------------------------------------

    def _goals(self, number: int, names: Sequence[str]) -> dict[str, Hidden]:
        """Where the unpruned model's stream is behind each projection; in families with a norm there, its output."""
        goals = {name: Hidden(self.folder, f"goal-{name}") for name in names}
        if self._blend(FULL) == 0:
            return goals
        for batch, inputs in enumerate(self.batches):
            hidden = self.streams[None].get(batch, self.dense.device)
            outputs: dict[str, torch.Tensor] = {}
            out = self.dense.run(number, hidden, inputs, [(name, _keep_output(outputs, name)) for name in names])
            assert out is not None
            if self._adds_up is None:
                total = hidden.float() + sum(output.float() for output in outputs.values())
                self._adds_up = bool((out.float() - total).norm() <= 0.1 * (out.float() - hidden.float()).norm())
            total = hidden
            for name in names:
                total = total + outputs[name]
                goals[name].put(batch, total if self._adds_up else outputs[name])
            self.streams[None].put(batch, out)
        return goals

    def _sums(
        self, number: int, layer: nn.Module, level: float, *, names: Sequence[str], goals: Mapping[str, Hidden]
    ) -> tuple[Grams, float]:
        """Sums of ``X_l`` and ``T_l - W X_l`` for the last of ``names``, and the sum of ``|T_l|^2``."""
        name, device, blend = names[-1], self.dense.device, self._blend(level)
        projection = _linear(layer, name)
        sums = Grams(projection.in_features, projection.out_features, device=device)
        reference = 0.0
        keep = self._mask(number, name, level).to(device)
        for batch, inputs in enumerate(self.batches):
            stream, outputs, seen = self.streams[level].get(batch, device), {}, []  # type: ignore[var-annotated]
            hooks: list[tuple[str, Callable[[nn.Module], Any]]] = []
            for before in names[:-1]:
                hooks.append((before, _keep_inputs(self._mask(number, before, level))))
                hooks.append((before, _keep_output(outputs, before)))
            hooks.append((name, _stop_with_input(seen)))
            self.dense.run(number, stream, inputs, hooks)
            (x,) = seen  # (B, T, in), of the unpruned sublayer: nothing is left out yet
            own = F.linear(x, projection.weight, projection.bias)
            x = x * keep
            output = F.linear(x, projection.weight, projection.bias)
            target = (1 - blend) * own.float()
            if blend:
                goal = goals[name].get(batch, device).float()
                if self._adds_up:
                    goal = goal - stream.float() - sum(out.float() for out in outputs.values())
                target += blend * goal
            mask = mask_of(inputs)
            sums.add(x, target - output.float(), mask=mask)
            counted = target if mask is None else target[mask.to(device).bool()]
            reference += float(counted.square().sum())
        return sums, reference

    def _blend(self, level: float) -> float:
        return self.config.blend_at(level)

    def _mask(self, number: int, name: str, level: float) -> torch.Tensor:
        return self.keeps[level][self._parameter(number, name)]

    def _parameter(self, number: int, name: str) -> str:
        return f"{self.dense.prefix}.{number}.{name}.weight"

    def _fit(self, parameter: str, weight: torch.Tensor, errors: Mapping[float, tuple[float, float]]) -> SharedFit:
        stored = self.dense.weights.read([parameter])[parameter].dtype
        rounded = weight.to(stored)  # once, here
        if not bool(rounded.isfinite().all()):
            raise FloatingPointError(f"the shared {parameter} overflows {stored}; raise ridge")
        return SharedFit(parameter, rounded.cpu(), errors)

    @staticmethod
    def _check(parameter: str, sums: Grams) -> None:
        if not sums.is_finite():
            raise FloatingPointError(
                f"what enters {parameter} on the calibration tokens is not finite: the model's weights are damaged, or "
                "its dtype overflows; nothing has been changed"
            )


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    module = layer.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _add_input(sums: Grams, mask: torch.Tensor | None) -> Callable[[nn.Module], Any]:
    return lambda module: module.register_forward_pre_hook(lambda _, args: sums.add(args[0], mask=mask))


def _keep_inputs(keep: torch.Tensor) -> Callable[[nn.Module], Any]:
    """Zeros in place of the inputs that a level lacks: the output is that of the sliced projection."""
    return lambda module: module.register_forward_pre_hook(lambda _, args: (args[0] * keep.to(args[0].device),))


def _keep_output(outputs: dict[str, torch.Tensor], name: str) -> Callable[[nn.Module], Any]:
    def keep(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        outputs[name] = output

    return lambda module: module.register_forward_hook(keep)


def _stop_with_input(seen: list[torch.Tensor]) -> Callable[[nn.Module], Any]:
    def stop(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0])
        raise Reached

    return lambda module: module.register_forward_pre_hook(stop)


def _ratio(error: float, reference: float) -> float:
    return math.sqrt(max(error, 0.0) / reference) if reference > 0 else 0.0
