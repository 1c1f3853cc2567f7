"""The removal order, from which every nested model can be built."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from gisp_hf.atomic import replacement, write_text_atomic
from gisp_hf.config import OLD_MINIMA, GISPConfig, multiples_of
from gisp_hf.deprecated import accept_old_arguments, warn_renamed
from gisp_hf.models import discover
from gisp_hf.models.fingerprint import fingerprint
from gisp_hf.models.layout import Block, Layout, Member
from gisp_hf.models.shards import plain_parameters
from gisp_hf.models.surgery import as_pruned_model, slice_structures
from gisp_hf.pruning.methods import METHODS
from gisp_hf.pruning.selection import check_multiples, parameter_budget, removed_masks, removed_parameters
from gisp_hf.untrusted import check_object, check_trajectory, read_json

ORDER_FILE = "trajectory.safetensors"
FACTS_FILE = "trajectory.json"
FORMAT = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One row of the step table. Sparsities are fractions of the decoder layers' parameters.

    ``loss`` is the calibration loss of the model *before* this step's removals; None until the Trainer has logged it.
    ``removed`` counts by kind what this step removed; ``parameters`` is what the decoder layers have left.
    """

    step: int
    target: float
    sparsity: float
    parameters: int
    removed: Mapping[str, int] = field(default_factory=dict)
    loss: float | None = None

    @property
    def groups(self) -> int:
        """Key/value groups that this step removed."""
        return self.removed.get("attention", 0)

    @property
    def channels(self) -> int:
        """MLP channels that this step removed."""
        return self.removed.get("mlp", 0)

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> "Step":
        """Reads the rows of version 0.1 too, which count ``groups`` and ``channels``."""
        facts = dict(facts)
        old = {kind: facts.pop(name) for kind, name in (("attention", "groups"), ("mlp", "channels")) if name in facts}
        return cls(**{"removed": old, **facts})


@dataclass(frozen=True)
class Base:
    """The model that a trajectory was made from.

    ``unpruned``: parameters that the decoder layers had before anything was removed, if the base is itself a pruned
    model; None if it is not.
    """

    id: str
    revision: str | None
    fingerprint: str
    unpruned: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "unpruned" or value is not None}


@accept_old_arguments({"ranks": "order"})
@dataclass(frozen=True)
class Trajectory:
    """A total order over the structures of one model. Every sparsity is a prefix of it, so that all levels are nested.

    ``order``: per block of ``layout``, int32 of shape ``(block.size,)``: the position in the removal order, -1 = never
    removed. ``restoration``: the settings with which the saved levels of the run are restored (`gisp_hf.recovery`);
    None: all their weights are those of the base.
    """

    layout: Layout
    order: tuple[torch.Tensor, ...]
    config: GISPConfig
    base: Base
    steps: tuple[Step, ...] = ()
    calibration: dict[str, Any] = field(default_factory=dict)
    restoration: dict[str, Any] | None = None

    @property
    def ranks(self) -> tuple[torch.Tensor, ...]:
        warn_renamed("Trajectory.ranks", "Trajectory.order")
        return self.order

    def __repr__(self) -> str:
        return (
            f"Trajectory({self.layout.architecture}, {self.layout.num_layers} layers, base {self.base.id!a}: "
            f"{len(self):,} of {sum(block.size for block in self.layout.blocks):,} structures removed, sparsity "
            f"{self.highest_sparsity():.4f})"
        )

    def summary(self) -> str:
        """A table of the levels that the order reaches: structures and parameters that the decoder layers have left."""
        from gisp_hf.report.tables import format_table

        rows = []
        for sparsity in (0.0, *self._levels()):
            length = self.prefix(sparsity) if sparsity else 0
            left = {kind.name: 0 for kind in self.layout.kinds}
            for block, keep in zip(self.layout.blocks, self.kept_at(length)):
                left[block.kind] += len(keep)
            parameters = round((1 - self.sparsity_at(length)) * self.layout.total)
            rows.append({"sparsity": sparsity, **left, "parameters": parameters})
        columns = {"sparsity": "sparsity", **{kind.name: kind.title or kind.plural for kind in self.layout.kinds}}
        return f"{self!r}\n\n" + format_table(
            rows, {**columns, "parameters": "decoder-layer parameters"}, formats={"sparsity": ".0%"}
        )

    def plot(self, path: str | Path) -> None:
        """Draws what each layer has lost at each level (`gisp_hf.report.plot_removed`); needs matplotlib.

        Args:
            path: the file to write; its suffix picks the format (``.png``, ``.svg``, ``.pdf``).

        Raises:
            ValueError: if the order reaches none of the config's levels.
        """
        from gisp_hf.report.plots import plot_removed

        if not self._levels():
            raise ValueError(
                f"{self!r} reaches none of the levels {self.config.sparsity_levels}; there is nothing to draw"
            )
        plot_removed({sparsity: self.removed_by_layer(sparsity) for sparsity in self._levels()}, path)

    def removed_by_layer(self, sparsity: float) -> dict[str, list[float]]:
        """Kind -> the fraction of its structures (0-1) that each layer has lost at ``sparsity``."""
        fractions = {kind.name: [0.0] * self.layout.num_layers for kind in self.layout.kinds}
        for block, keep in zip(self.layout.blocks, self.kept(sparsity)):
            fractions[block.kind][block.layer] = 1 - len(keep) / block.size
        return {kind.title or kind.plural: fractions[kind.name] for kind in self.layout.kinds}

    def _levels(self) -> list[float]:
        """The levels of the config that the order reaches."""
        return [level for level in self.config.sparsity_levels if level <= self.highest_sparsity() + 1e-9]

    def __len__(self) -> int:
        """The number of structures in the order."""
        return sum(int((positions >= 0).sum()) for positions in self.order)

    def digest(self) -> str:
        """64 hex digits of the order: equal only if every structure has the same position."""
        digest = hashlib.sha256()
        for positions in self.order:
            digest.update(positions.numpy().tobytes())
        return digest.hexdigest()

    def sparsity_at(
        self, length: int, *, channel_multiple: int | None = None, group_multiple: int | None = None
    ) -> float:
        """The sparsity after the first ``length`` removals (a fraction of the decoder layers' parameters)."""
        multiples = self._multiples(channel_multiple, group_multiple)
        return self._gone(length, multiples) / self.layout.total

    def _gone(self, length: int, multiples: Mapping[str, int]) -> int:
        return removed_parameters(
            self.layout, self.order, length=length, multiples=multiples, uniform=self.config.uniform
        )

    def of_unpruned(self, sparsity: float) -> float:
        """The sparsity counted from the unpruned model: another number than ``sparsity`` if the base is pruned itself.

        Both are fractions of decoder layers' parameters: ``sparsity`` of those of the base, the result of those that
        the unpruned model had.
        """
        return 1 - (1 - sparsity) * self.layout.total / (self.base.unpruned or self.layout.total)

    def _multiples(self, channel_multiple: int | None, group_multiple: int | None) -> dict[str, int]:
        multiples = multiples_of(
            self.config.channel_multiple if channel_multiple is None else channel_multiple,
            self.config.group_multiple if group_multiple is None else group_multiple,
        )
        check_multiples(self.layout, multiples)
        return multiples

    def highest_sparsity(self, *, channel_multiple: int | None = None, group_multiple: int | None = None) -> float:
        return self.sparsity_at(len(self), channel_multiple=channel_multiple, group_multiple=group_multiple)

    def prefix(self, sparsity: float, *, channel_multiple: int | None = None, group_multiple: int | None = None) -> int:
        """The fewest removals that reach ``sparsity``.

        Raises:
            ValueError: if the sparsity is outside (0, 1), or beyond the end of the order.
        """
        if not 0 < sparsity < 1:
            raise ValueError(f"sparsity must lie in (0, 1), got {sparsity:g}; 20 % is written 0.2")
        multiples = self._multiples(channel_multiple, group_multiple)
        budget = parameter_budget(self.layout, sparsity)

        def gone(length: int) -> int:
            return self._gone(length, multiples)

        low, high = 0, len(self)
        if gone(high) < budget:
            groups = f", group_multiple={multiples['attention']}" if multiples["attention"] > 1 else ""
            raise ValueError(
                f"sparsity {sparsity:g} lies beyond this trajectory: it ends at {gone(high) / self.layout.total:.4f} "
                f"with channel_multiple={multiples['mlp']}{groups}; ask for less, or prune to a higher level"
            )
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if gone(middle) >= budget else (middle + 1, high)
        return low

    def kept(
        self, sparsity: float, *, channel_multiple: int | None = None, group_multiple: int | None = None
    ) -> list[torch.Tensor]:
        """Per block, the increasing indices of the structures that stay at ``sparsity``."""
        length = self.prefix(sparsity, channel_multiple=channel_multiple, group_multiple=group_multiple)
        return self.kept_at(length, channel_multiple=channel_multiple, group_multiple=group_multiple)

    def kept_at(
        self, length: int, *, channel_multiple: int | None = None, group_multiple: int | None = None
    ) -> list[torch.Tensor]:
        """Per block, the increasing indices of the structures that stay after the first ``length`` removals."""
        multiples = self._multiples(channel_multiple, group_multiple)
        masks = removed_masks(self.layout, self.order, length=length, multiples=multiples, uniform=self.config.uniform)
        return [(~mask).nonzero().squeeze(1) for mask in masks]

    def apply(
        self,
        model: PreTrainedModel,
        *,
        sparsity: float,
        channel_multiple: int | None = None,
        group_multiple: int | None = None,
    ) -> PreTrainedModel:
        """Slices the base model, in place, down to any sparsity up to the highest.

        Args:
            model: the model that this trajectory was made from, unpruned.
            sparsity: a fraction of the decoder layers' parameters.
            channel_multiple: channels kept per layer are rounded up to a multiple of this; by default as in the run.
            group_multiple: the same of key/value groups.

        Returns:
            The same object, now of the pruned class, ready for ``save_pretrained`` and ``generate``.

        Raises:
            ValueError: if the model is not the base, or the sparsity cannot be reached.
        """
        kept = self.kept(sparsity, channel_multiple=channel_multiple, group_multiple=group_multiple)
        self.check_base(model)
        warn_if_compensated(self.config)
        slice_structures(model, self.discover(model), kept)
        return as_pruned_model(model, self.layout, [len(keep) for keep in kept])

    def discover(self, model: PreTrainedModel) -> Layout:
        """The blocks of a model, of the kinds that this trajectory is about.

        Raises:
            ValueError: as `gisp_hf.models.discover`.
        """
        return discover(model, [kind.name for kind in self.layout.kinds])

    def check_base(self, model: PreTrainedModel) -> None:
        """Refuses a model other than the one this trajectory was made from.

        Raises:
            ValueError: if the structure or the weights differ; the message says which.
        """
        found = self.discover(model)
        if found.identity != self.layout.identity:
            raise ValueError(
                f"this trajectory was made from {self.base.id} ({self.layout.architecture}, {self.layout.num_layers} "
                f"layers, {self.layout.total:,} parameters in them); the model given is {found.architecture} with "
                f"{found.num_layers} layers and {found.total:,} parameters. Load the original, unpruned model"
            )
        found_fingerprint = fingerprint(plain_parameters(model))
        if found_fingerprint != self.base.fingerprint:
            raise ValueError(
                f"the weights are not those of {self.base.id}"
                f"{f' at revision {self.base.revision}' if self.base.revision else ''}: fingerprint "
                f"{found_fingerprint[:12]}, expected {self.base.fingerprint[:12]}. A fine-tuned or already pruned "
                "model needs a trajectory of its own"
            )

    def save(self, folder: str | Path) -> None:
        """Writes ``trajectory.safetensors`` (the order) and ``trajectory.json`` (everything else); no pickle."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {
            "format": FORMAT,
            "base": self.base.to_dict(),
            "config": self.config.to_dict(),
            "calibration": self.calibration,
            "architecture": self.layout.architecture,
            "num_layers": self.layout.num_layers,
            "total": self.layout.total,
            "blocks": [block.to_dict() for block in self.layout.blocks],
            "steps": [asdict(step) for step in self.steps],
        }
        if self.config.uniform:
            facts["plain_sizes"] = {kind: list(sizes) for kind, sizes in self.layout.plain_sizes.items()}
        if self.restoration is not None:
            facts["restoration"] = self.restoration
        order = {block.name: positions.contiguous() for block, positions in zip(self.layout.blocks, self.order)}
        with replacement(folder / ORDER_FILE) as file:
            save_file(order, file)
        write_text_atomic(folder / FACTS_FILE, json.dumps(facts, indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "Trajectory":
        """Reads what ``save`` wrote, and trusts none of it before it is checked.

        Raises:
            FileNotFoundError: if there is no trajectory in the folder.
            ValueError: if the files are damaged or their contents contradict each other.
        """
        folder = Path(folder)
        for name in (ORDER_FILE, FACTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}; point at the output folder of a pruning run")
        try:
            facts = read_json(folder / FACTS_FILE)
            if facts["format"] != FORMAT:
                raise ValueError(f"it has format {facts['format']!r}, this version of gisp_hf reads format {FORMAT}")
            check_trajectory(facts)
            layout = Layout(
                architecture=facts["architecture"],
                blocks=tuple(_block_from(entry) for entry in facts["blocks"]),
                total=facts["total"],
                num_layers=facts["num_layers"],
                plain_sizes={kind: tuple(sizes) for kind, sizes in facts.get("plain_sizes", {}).items()},
            )
            tensors = load_file(folder / ORDER_FILE)
            _check_order(layout, tensors)
            config = _config_from(facts["config"])
            if config.uniform:
                _check_uniform(layout)
            return cls(
                layout=layout,
                order=tuple(tensors[block.name] for block in layout.blocks),
                config=config,
                base=Base(**facts["base"]),
                steps=tuple(Step.from_dict(step) for step in facts["steps"]),
                calibration=facts["calibration"],
                restoration=None
                if facts.get("restoration") is None
                else check_object(facts["restoration"], "restoration"),
            )
        except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
            raise ValueError(f"the trajectory in {folder} cannot be used: {error}") from error


def warn_if_compensated(config: GISPConfig) -> None:
    """Says that a level built from the removal order lacks the biases which the run's own levels have."""
    method = METHODS.get(config.method)
    if method is not None and method.compensation:
        logger.warning(
            "the levels that this run saved have biases in the place of removed structures (method %s); a level built "
            "from the removal order has none. Load the saved levels to have them",
            config.method,
        )


def _block_from(entry: dict[str, Any]) -> Block:
    return Block(**{**entry, "members": tuple(Member(**member) for member in entry["members"])})


def _config_from(facts: dict[str, Any]) -> GISPConfig:
    """The config, written by this version or by 0.1, whose minima had names of their own."""
    facts = dict(facts)
    old = {kind: facts.pop(name) for name, kind in OLD_MINIMA.items() if name in facts}
    minimum = {**facts.get("minimum_kept", {}), **{kind: count for kind, count in old.items() if count != 1}}
    return GISPConfig.from_dict({**facts, "minimum_kept": minimum})


def _check_order(layout: Layout, tensors: dict[str, torch.Tensor]) -> None:
    expected = {block.name: block.size for block in layout.blocks}
    if set(tensors) != set(expected) or len(expected) != len(layout.blocks):
        odd = sorted(set(tensors) ^ set(expected))
        raise ValueError(f"blocks of the two files differ: {', '.join(odd[:5]) or 'a name twice'}")
    if not expected:
        raise ValueError("there are no blocks, so there is nothing that could be removed")
    for name, size in expected.items():
        if tensors[name].dtype != torch.int32 or tuple(tensors[name].shape) != (size,):
            raise ValueError(
                f"{name} should be int32 of shape ({size},), got {tensors[name].dtype} {tuple(tensors[name].shape)}"
            )
    positions = torch.cat(list(tensors.values()))
    removed = positions[positions >= 0].sort().values
    if bool((positions < -1).any()) or not torch.equal(removed, torch.arange(len(removed), dtype=torch.int32)):
        raise ValueError("this is not a removal order: each position from 0 on must occur exactly once, -1 elsewhere")
    if layout.total < sum(block.size * block.cost for block in layout.blocks) or layout.total <= 0:
        raise ValueError(f"a total of {layout.total} parameters is less than the blocks hold")


def _check_uniform(layout: Layout) -> None:
    for kind in layout.kinds:
        sizes = {layout.blocks[number].size for number in layout.of_kind(kind.name)}
        if len(sizes) > 1:
            raise ValueError(f"layout is uniform, but layers have {min(sizes)} to {max(sizes)} {kind.plural}")
        plain = layout.plain_sizes.get(kind.name)
        if plain is not None and (list(plain) != sorted(set(plain)) or {*plain[-1:]} != sizes):
            raise ValueError(f"plain_sizes of {kind.name} must increase and end at {max(sizes)}, got {plain}")
