"""``GISPConfig``: the whole user surface of the method."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from gisp_hf.pruning.schedule import SCHEDULES, Schedule

Normalization = Literal["params", "reference", "none"]
NORMALIZATIONS: tuple[Normalization, ...] = ("params", "reference", "none")
Prune = Literal["both", "heads", "channels"]
PRUNE: tuple[Prune, ...] = ("both", "heads", "channels")


@dataclass(frozen=True)
class GISPConfig:
    """How to prune. Checked once, here; every sparsity is a fraction (0-1) of the decoder layers' parameters.

    Raises:
        ValueError: if a value is out of range; the message names it and says what would do.
        TypeError: in ``from_dict`` and ``from_yaml``, if a key is unknown.
    """

    sparsity_levels: tuple[float, ...] = field(
        default=(0.2, 0.3, 0.4, 0.5),
        metadata={"help": "Sparsities at which a model is saved, increasing, each in (0, 1)."},
    )
    num_steps: int = field(
        default=80,
        metadata={"help": "Pruning steps up to the highest level; each is one optimizer step of the Trainer."},
    )
    schedule: Schedule = field(
        default="linear", metadata={"help": "How sparsity grows over the steps: linear, cosine or exponential."}
    )
    normalization: Normalization = field(
        default="params",
        metadata={
            "help": "What a structure's score is divided by: its number of parameters (params, Eq. 9 of the paper), "
            "the constants of the published code (reference), or nothing (none)."
        },
    )
    prune: Prune = field(default="both", metadata={"help": "What to remove: heads, channels or both."})
    protect_first: float = field(
        default=0.1,
        metadata={
            "help": "First layers never pruned: a fraction of the layers if below 1 (rounded down), else a count."
        },
    )
    protect_last: float = field(
        default=1, metadata={"help": "Last layers never pruned: a fraction of the layers if below 1, else a count."}
    )
    min_groups: int = field(default=1, metadata={"help": "Key/value groups that every layer keeps, at least 1."})
    min_channels: int = field(default=1, metadata={"help": "MLP channels that every layer keeps, at least 1."})
    channel_multiple: int = field(
        default=1,
        metadata={
            "help": "Channels kept per layer are a multiple of this (8, 64, 128 suit GPUs): rounded up, by giving back "
            "the channels removed last."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.sparsity_levels, (int, float)):
            object.__setattr__(self, "sparsity_levels", (self.sparsity_levels,))
        object.__setattr__(self, "sparsity_levels", tuple(float(level) for level in self.sparsity_levels))
        levels = self.sparsity_levels
        if not levels:
            raise ValueError("sparsity_levels is empty; give at least one, such as (0.2, 0.5)")
        for level in levels:
            if not 0 < level < 1:
                raise ValueError(f"sparsity levels must lie in (0, 1), got {level:g}; 20 % is written 0.2")
        if any(low >= high for low, high in zip(levels, levels[1:])):
            raise ValueError(f"sparsity levels must increase, got {levels}; sort them and drop repeated ones")
        names = [level_name(level) for level in levels]
        if len(set(names)) < len(names):
            raise ValueError(
                f"sparsity levels {levels} share a folder name ({', '.join(names)}); keep them 0.0001 apart"
            )
        for name, choices in (("schedule", SCHEDULES), ("normalization", NORMALIZATIONS), ("prune", PRUNE)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("num_steps", "min_groups", "min_channels", "channel_multiple"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("protect_first", "protect_last"):
            value = getattr(self, name)
            if value < 0 or (value >= 1 and value != int(value)):
                raise ValueError(f"{name} must be a fraction in [0, 1) or a whole number of layers, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sparsity_levels": list(self.sparsity_levels)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GISPConfig":
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise TypeError(f"unknown keys {', '.join(unknown)}; GISPConfig has {', '.join(known)}")
        return cls(**values)

    def to_yaml(self, path: str | Path) -> None:
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    @classmethod
    def from_yaml(cls, path: str | Path) -> "GISPConfig":
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a mapping of GISPConfig's fields, got {type(values).__name__}")
        return cls.from_dict(values)


def level_name(sparsity: float) -> str:
    """The folder and branch of a level: 0.2 -> ``sparsity-0.20``, 0.375 -> ``sparsity-0.375``."""
    digits = f"{sparsity:.4f}".rstrip("0")
    return f"sparsity-{digits.ljust(4, '0')}"


def protected_layers(num_layers: int, *, first: float, last: float) -> set[int]:
    """Indices of the layers that are never pruned; fractions are rounded down, as ``int(0.1 * L)`` in the paper."""
    n_first = int(first * num_layers) if first < 1 else int(first)
    n_last = int(last * num_layers) if last < 1 else int(last)
    return {layer for layer in range(num_layers) if layer < n_first or layer >= num_layers - n_last}
