"""The removal order, from which every nested model can be built."""

import hashlib
import json
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
from gisp_hf.pruning.selection import parameter_budget, removed_mask, removed_parameters
from gisp_hf.untrusted import check_object, check_trajectory, read_json

ORDER_FILE = "trajectory.safetensors"
FACTS_FILE = "trajectory.json"
FORMAT = 1


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
    """The model that a trajectory was made from."""

    id: str
    revision: str | None
    fingerprint: str


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

    def __len__(self) -> int:
        """The number of structures in the order."""
        return sum(int((positions >= 0).sum()) for positions in self.order)

    def digest(self) -> str:
        """64 hex digits of the order: equal only if every structure has the same position."""
        digest = hashlib.sha256()
        for positions in self.order:
            digest.update(positions.numpy().tobytes())
        return digest.hexdigest()

    def sparsity_at(self, length: int, *, channel_multiple: int | None = None) -> float:
        """The sparsity after the first ``length`` removals (a fraction of the decoder layers' parameters)."""
        multiples = self._multiples(channel_multiple)
        return removed_parameters(self.layout, self.order, length=length, multiples=multiples) / self.layout.total

    def _multiples(self, channel_multiple: int | None) -> dict[str, int]:
        return self.config.multiples if channel_multiple is None else multiples_of(channel_multiple)

    def highest_sparsity(self, *, channel_multiple: int | None = None) -> float:
        return self.sparsity_at(len(self), channel_multiple=channel_multiple)

    def prefix(self, sparsity: float, *, channel_multiple: int | None = None) -> int:
        """The fewest removals that reach ``sparsity``.

        Raises:
            ValueError: if the sparsity is outside (0, 1), or beyond the end of the order.
        """
        if not 0 < sparsity < 1:
            raise ValueError(f"sparsity must lie in (0, 1), got {sparsity:g}; 20 % is written 0.2")
        multiples = self._multiples(channel_multiple)
        budget = parameter_budget(self.layout, sparsity)

        def gone(length: int) -> int:
            return removed_parameters(self.layout, self.order, length=length, multiples=multiples)

        low, high = 0, len(self)
        if gone(high) < budget:
            raise ValueError(
                f"sparsity {sparsity:g} lies beyond this trajectory: it ends at {gone(high) / self.layout.total:.4f} "
                f"with channel_multiple={channel_multiple or self.config.channel_multiple}; ask for less, or "
                "prune to a higher level"
            )
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if gone(middle) >= budget else (middle + 1, high)
        return low

    def kept(self, sparsity: float, *, channel_multiple: int | None = None) -> list[torch.Tensor]:
        """Per block, the increasing indices of the structures that stay at ``sparsity``."""
        return self.kept_at(self.prefix(sparsity, channel_multiple=channel_multiple), channel_multiple=channel_multiple)

    def kept_at(self, length: int, *, channel_multiple: int | None = None) -> list[torch.Tensor]:
        """Per block, the increasing indices of the structures that stay after the first ``length`` removals."""
        multiples = self._multiples(channel_multiple)
        return [
            (~removed_mask(block, positions, length=length, multiples=multiples)).nonzero().squeeze(1)
            for block, positions in zip(self.layout.blocks, self.order)
        ]

    def apply(self, model: PreTrainedModel, *, sparsity: float, channel_multiple: int | None = None) -> PreTrainedModel:
        """Slices the base model, in place, down to any sparsity up to the highest.

        Args:
            model: the model that this trajectory was made from, unpruned.
            sparsity: a fraction of the decoder layers' parameters.
            channel_multiple: channels kept per layer are rounded up to a multiple of this; by default as in the run.

        Returns:
            The same object, now of the pruned class, ready for ``save_pretrained`` and ``generate``.

        Raises:
            ValueError: if the model is not the base, or the sparsity cannot be reached.
        """
        kept = self.kept(sparsity, channel_multiple=channel_multiple)
        self.check_base(model)
        slice_structures(model, discover(model), kept)
        return as_pruned_model(model, self.layout, [len(keep) for keep in kept])

    def check_base(self, model: PreTrainedModel) -> None:
        """Refuses a model other than the one this trajectory was made from.

        Raises:
            ValueError: if the structure or the weights differ; the message says which.
        """
        found = discover(model)
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
            "base": asdict(self.base),
            "config": self.config.to_dict(),
            "calibration": self.calibration,
            "architecture": self.layout.architecture,
            "num_layers": self.layout.num_layers,
            "total": self.layout.total,
            "blocks": [block.to_dict() for block in self.layout.blocks],
            "steps": [asdict(step) for step in self.steps],
        }
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
            )
            tensors = load_file(folder / ORDER_FILE)
            _check_order(layout, tensors)
            return cls(
                layout=layout,
                order=tuple(tensors[block.name] for block in layout.blocks),
                config=_config_from(facts["config"]),
                base=Base(**facts["base"]),
                steps=tuple(Step.from_dict(step) for step in facts["steps"]),
                calibration=facts["calibration"],
                restoration=None
                if facts.get("restoration") is None
                else check_object(facts["restoration"], "restoration"),
            )
        except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
            raise ValueError(f"the trajectory in {folder} cannot be used: {error}") from error


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
