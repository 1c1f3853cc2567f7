"""The removal order: the one small thing from which every nested model can be built."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from gisp_hf.config import GISPConfig
from gisp_hf.models import discover
from gisp_hf.models.fingerprint import fingerprint
from gisp_hf.models.layout import Block, Layout, Member
from gisp_hf.models.surgery import as_pruned_model, slice_structures
from gisp_hf.pruning.selection import parameter_budget, removed_mask, removed_parameters
from gisp_hf.untrusted import check_trajectory, read_json

RANKS_FILE = "trajectory.safetensors"
FACTS_FILE = "trajectory.json"
FORMAT = 1


@dataclass(frozen=True)
class Step:
    """One row of the step table. Sparsities are fractions of the decoder layers' parameters.

    ``loss`` is the calibration loss of the model *before* this step's removals; None until the Trainer has logged it.
    ``groups`` and ``channels`` count what this step removed; ``parameters`` is what the decoder layers have left.
    """

    step: int
    target: float
    sparsity: float
    parameters: int
    groups: int
    channels: int
    loss: float | None = None


@dataclass(frozen=True)
class Base:
    """The model that a trajectory was made from."""

    id: str
    revision: str | None
    fingerprint: str


@dataclass(frozen=True)
class Trajectory:
    """A total order over the structures of one model. Every sparsity is a prefix of it, so that all levels are nested.

    ``ranks``: per block of ``layout``, int32 of shape ``(block.size,)``: the position in the order, -1 = never removed.
    """

    layout: Layout
    ranks: tuple[torch.Tensor, ...]
    config: GISPConfig
    base: Base
    steps: tuple[Step, ...] = ()
    calibration: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of structures in the order."""
        return sum(int((rank >= 0).sum()) for rank in self.ranks)

    def digest(self) -> str:
        """64 hex digits of the order: equal only if every structure has the same position."""
        digest = hashlib.sha256()
        for rank in self.ranks:
            digest.update(rank.numpy().tobytes())
        return digest.hexdigest()

    def sparsity_at(self, length: int, *, channel_multiple: int | None = None) -> float:
        """The sparsity after the first ``length`` removals (a fraction of the decoder layers' parameters)."""
        gone = removed_parameters(
            self.layout, self.ranks, length=length, channel_multiple=channel_multiple or self.config.channel_multiple
        )
        return gone / self.layout.total

    def highest_sparsity(self, *, channel_multiple: int | None = None) -> float:
        return self.sparsity_at(len(self), channel_multiple=channel_multiple)

    def prefix(self, sparsity: float, *, channel_multiple: int | None = None) -> int:
        """The fewest removals that reach ``sparsity``.

        Raises:
            ValueError: if the sparsity is outside (0, 1), or beyond the end of the order.
        """
        if not 0 < sparsity < 1:
            raise ValueError(f"sparsity must lie in (0, 1), got {sparsity:g}; 20 % is written 0.2")
        multiple = channel_multiple or self.config.channel_multiple
        budget = parameter_budget(self.layout, sparsity)

        def gone(length: int) -> int:
            return removed_parameters(self.layout, self.ranks, length=length, channel_multiple=multiple)

        low, high = 0, len(self)
        if gone(high) < budget:
            raise ValueError(
                f"sparsity {sparsity:g} lies beyond this trajectory: it ends at {gone(high) / self.layout.total:.4f} "
                f"with channel_multiple={multiple}; ask for less, or prune to a higher level"
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
        multiple = channel_multiple or self.config.channel_multiple
        return [
            (~removed_mask(block, rank, length=length, channel_multiple=multiple)).nonzero().squeeze(1)
            for block, rank in zip(self.layout.blocks, self.ranks)
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
        for block, keep in zip(self.layout.blocks, kept):
            if len(keep) < block.size:
                slice_structures(model, block, keep)
        return as_pruned_model(model, self.layout, [len(keep) for keep in kept])

    def check_base(self, model: PreTrainedModel) -> None:
        """Refuses a model other than the one this trajectory was made from.

        Raises:
            ValueError: if the structure or the weights differ; the message says which.
        """
        found = discover(model)
        if found != self.layout:
            raise ValueError(
                f"this trajectory was made from {self.base.id} ({self.layout.architecture}, {self.layout.num_layers} "
                f"layers, {self.layout.total:,} parameters in them); the model given is {found.architecture} with "
                f"{found.num_layers} layers and {found.total:,} parameters. Load the original, unpruned model"
            )
        found_fingerprint = fingerprint(model.named_parameters())
        if found_fingerprint != self.base.fingerprint:
            raise ValueError(
                f"the weights are not those of {self.base.id}"
                f"{f' at revision {self.base.revision}' if self.base.revision else ''}: fingerprint "
                f"{found_fingerprint[:12]}, expected {self.base.fingerprint[:12]}. A fine-tuned or already pruned "
                "model needs a trajectory of its own"
            )

    def save(self, folder: str | Path) -> None:
        """Writes ``trajectory.safetensors`` (the ranks) and ``trajectory.json`` (everything else); no pickle."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "format": FORMAT,
            "base": asdict(self.base),
            "config": self.config.to_dict(),
            "calibration": self.calibration,
            "architecture": self.layout.architecture,
            "num_layers": self.layout.num_layers,
            "total": self.layout.total,
            "blocks": [asdict(block) for block in self.layout.blocks],
            "steps": [asdict(step) for step in self.steps],
        }
        ranks = {block.name: rank.contiguous() for block, rank in zip(self.layout.blocks, self.ranks)}
        # Each file is replaced in one go, so that a reader or a crash never meets half of one.
        save_file(ranks, folder / f"{RANKS_FILE}.tmp")
        (folder / f"{FACTS_FILE}.tmp").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        for name in (RANKS_FILE, FACTS_FILE):
            (folder / f"{name}.tmp").replace(folder / name)

    @classmethod
    def load(cls, folder: str | Path) -> "Trajectory":
        """Reads what ``save`` wrote, and trusts none of it before it is checked.

        Raises:
            FileNotFoundError: if there is no trajectory in the folder.
            ValueError: if the files are damaged or their contents contradict each other.
        """
        folder = Path(folder)
        for name in (RANKS_FILE, FACTS_FILE):
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
            tensors = load_file(folder / RANKS_FILE)
            _check_ranks(layout, tensors)
            return cls(
                layout=layout,
                ranks=tuple(tensors[block.name] for block in layout.blocks),
                config=GISPConfig.from_dict(facts["config"]),
                base=Base(**facts["base"]),
                steps=tuple(Step(**step) for step in facts["steps"]),
                calibration=facts["calibration"],
            )
        except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
            raise ValueError(f"the trajectory in {folder} cannot be used: {error}") from error


def _block_from(entry: dict[str, Any]) -> Block:
    return Block(**{**entry, "members": tuple(Member(**member) for member in entry["members"])})


def _check_ranks(layout: Layout, tensors: dict[str, torch.Tensor]) -> None:
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
    ranks = torch.cat(list(tensors.values()))
    removed = ranks[ranks >= 0].sort().values
    if bool((ranks < -1).any()) or not torch.equal(removed, torch.arange(len(removed), dtype=torch.int32)):
        raise ValueError("ranks are not a removal order: each position from 0 on must occur exactly once, -1 elsewhere")
    if layout.total < sum(block.size * block.cost for block in layout.blocks) or layout.total <= 0:
        raise ValueError(f"a total of {layout.total} parameters is less than the blocks hold")
