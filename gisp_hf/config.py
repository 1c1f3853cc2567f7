"""``GISPConfig``: all settings of a pruning run, validated."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from gisp_hf.deprecated import accept_old_arguments, warn_renamed
from gisp_hf.models.layout import KINDS, kind_of
from gisp_hf.pruning.methods import METHODS
from gisp_hf.pruning.schedule import SCHEDULES, Schedule

Normalization = Literal["params", "root", "reference", "standardized", "none"]
NORMALIZATIONS: tuple[Normalization, ...] = ("params", "root", "reference", "standardized", "none")
LayoutName = Literal["free", "uniform"]
LAYOUTS: tuple[LayoutName, ...] = ("free", "uniform")
# What `prune` may say besides the name of a kind -> the kinds that are pruned; None: all.
PRUNE: dict[str, tuple[str, ...] | None] = {"both": None, "heads": ("attention", "query"), "channels": ("mlp",)}


def _with_old_minimum(old: str, count: Any, minimum_kept: Any) -> dict[str, Any]:
    return {**(minimum_kept or {}), OLD_MINIMA[old]: count}


# Fields of version 0.1 -> the kind in `minimum_kept`.
OLD_MINIMA = {"min_groups": "attention", "min_channels": "mlp"}


@accept_old_arguments(dict.fromkeys(OLD_MINIMA, "minimum_kept"), _with_old_minimum)
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
        default=None,  # type: ignore[assignment]  # filled in below
        metadata={
            "help": "Pruning steps up to the highest level; each is one optimizer step of the Trainer. Default: the "
            "method's own, 80 for gisp."
        },
    )
    schedule: Schedule = field(
        default="linear", metadata={"help": "How sparsity grows over the steps: linear, cosine or exponential."}
    )
    normalization: Normalization = field(
        default=None,  # type: ignore[arg-type]  # filled in below
        metadata={
            "help": "What a structure's score is divided by: its number of parameters (params, Eq. 9 of the paper), "
            "the square root of that (root), the constants of the published code (reference), or nothing (none); "
            "standardized: mean 0 and deviation 1 in each kind. Default: the method's own, params for gisp."
        },
    )
    score_momentum: float = field(
        default=None,  # type: ignore[assignment]  # filled in below
        metadata={
            "help": "Share of the earlier steps in a moving average of scores: momentum x average + (1 - momentum) x "
            "this step's score; in [0, 1), 0 = each step by itself. Default: the method's own."
        },
    )
    prune: str = field(
        default="both",
        metadata={"help": "What to remove: heads, channels or both; or the name of one kind of structure."},
    )
    protect_first: float = field(
        default=None,  # type: ignore[assignment]  # filled in below
        metadata={
            "help": "First layers never pruned: a fraction of the layers if below 1 (rounded down), else a count. "
            "Default: 0.1; 0 with layout=uniform."
        },
    )
    protect_last: float = field(
        default=None,  # type: ignore[assignment]  # filled in below
        metadata={
            "help": "Last layers never pruned: a fraction of the layers if below 1, else a count. Default: 1; 0 with "
            "layout=uniform."
        },
    )
    minimum_kept: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "Structures that every layer keeps, by kind, as in attention=2 mlp=64: at least 1, the default."
        },
    )
    channel_multiple: int = field(
        default=1,
        metadata={
            "help": "Channels kept per layer are a multiple of this (8, 64, 128 suit GPUs): rounded up, by giving back "
            "the channels removed last."
        },
    )
    group_multiple: int = field(
        default=1,
        metadata={
            "help": "Key/value groups kept per layer are a multiple of this, such as the number of devices of tensor "
            "parallelism: rounded up, by giving back the groups removed last. Must divide the groups of the model."
        },
    )
    method: str = field(
        default="gisp",
        metadata={"help": f"How structures are scored and chosen: {', '.join(METHODS)}."},
    )
    layout: LayoutName = field(
        default=None,  # type: ignore[arg-type]  # filled in below
        metadata={
            "help": "Sizes of layers: free (each its own), or uniform: all layers keep the same numbers of groups and "
            "channels, so that levels are plain checkpoints of the family. Default: the method's own, free for gisp."
        },
    )
    attention_unit: str = field(
        default="group",
        metadata={
            "help": "What goes from attention: group, a key/value group with its query heads; or query, the same "
            "number of query heads from each group of a layer, the lowest scored of each, while keys and values stay."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.sparsity_levels, (int, float)):
            object.__setattr__(self, "sparsity_levels", (self.sparsity_levels,))
        object.__setattr__(self, "sparsity_levels", tuple(float(level) for level in self.sparsity_levels))
        self._check_levels()
        self._fill_in_method()
        choices: dict[str, tuple[str, ...]] = {"schedule": SCHEDULES, "normalization": NORMALIZATIONS}
        choices |= {"prune": (*PRUNE, *KINDS), "layout": LAYOUTS}
        choices |= {"attention_unit": ("group", "query")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not isinstance(self.minimum_kept, Mapping):
            raise ValueError(
                f"minimum_kept must map kinds to counts, such as {{'attention': 2}}, got {self.minimum_kept!r}"
            )
        counts = {"num_steps": self.num_steps, "channel_multiple": self.channel_multiple}
        counts |= {"group_multiple": self.group_multiple}
        counts |= {f"minimum_kept[{kind!r}]": count for kind, count in self.minimum_kept.items()}
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        given = {kind: n for kind, n in self.minimum_kept.items() if n != _least(kind)}
        object.__setattr__(self, "minimum_kept", given)
        momentum = self.score_momentum
        if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
            raise ValueError(f"score_momentum must be a number in [0, 1), got {momentum!r}; 0 is no average")
        for name in ("protect_first", "protect_last"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a fraction in [0, 1) or a whole number of layers, got {value!r}")
            if value >= 1 and value != int(value):
                raise ValueError(f"{name} must be a fraction in [0, 1) or a whole number of layers, got {value!r}")
            if value and self.uniform:
                raise ValueError(
                    f"{name}={value:g} keeps layers at full size, and layout='uniform' gives all layers one size; "
                    f"leave {name} out, or use layout='free'"
                )

        if self.uniform and self.attention_unit != "group":
            raise ValueError(
                f"layout='uniform' counts key/value groups, and attention_unit={self.attention_unit!r} removes query "
                "heads from them; use attention_unit='group', or layout='free'"
            )

    def _check_levels(self) -> None:
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

    def _fill_in_method(self) -> None:
        """A method that is not known here (a file of a run with a method from outside) has gisp's defaults.

        Before a run, `gisp_hf.pruning.methods.find_method` refuses it.
        """
        method = METHODS.get(self.method, METHODS["gisp"])
        for name in ("num_steps", "normalization", "score_momentum", "layout"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(method, name))
        for name, usual in (("protect_first", 0.1), ("protect_last", 1)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, 0 if self.uniform else usual)

    def prunes(self, kind: str) -> bool:
        """Whether structures of this kind may go."""
        kinds = PRUNE.get(self.prune, (self.prune,))
        return kinds is None or kind in kinds

    def minimum_of(self, kind: str) -> int:
        """Structures of this kind that every layer keeps."""
        return self.minimum_kept.get(kind, _least(kind))

    @property
    def min_groups(self) -> int:
        warn_renamed("GISPConfig.min_groups", "GISPConfig.minimum_kept['attention']")
        return self.minimum_of("attention")

    @property
    def min_channels(self) -> int:
        warn_renamed("GISPConfig.min_channels", "GISPConfig.minimum_kept['mlp']")
        return self.minimum_of("mlp")

    @property
    def uniform(self) -> bool:
        """Whether all layers keep the same number of structures of a kind."""
        return self.layout == "uniform"

    @property
    def multiples(self) -> dict[str, int]:
        """Kind -> what the number of its structures that a layer keeps is a multiple of."""
        return multiples_of(self.channel_multiple, self.group_multiple)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sparsity_levels": list(self.sparsity_levels)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GISPConfig":
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - {*known, *OLD_MINIMA})
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


def _least(kind: str) -> int:
    return 0 if kind_of(kind).whole else 1


def multiples_of(channel_multiple: int, group_multiple: int = 1) -> dict[str, int]:
    """The multiples by kind (see `GISPConfig.multiples`) that the two settings stand for."""
    return {"mlp": channel_multiple, "attention": group_multiple}


def level_name(sparsity: float) -> str:
    """The folder and branch of a level: 0.2 -> ``sparsity-0.20``, 0.375 -> ``sparsity-0.375``."""
    digits = f"{sparsity:.4f}".rstrip("0")
    return f"sparsity-{digits.ljust(4, '0')}"


def protected_layers(num_layers: int, *, first: float, last: float) -> set[int]:
    """Indices of the layers that are never pruned; fractions are rounded down, as ``int(0.1 * L)`` in the paper."""
    n_first = int(first * num_layers) if first < 1 else int(first)
    n_last = int(last * num_layers) if last < 1 else int(last)
    return {layer for layer in range(num_layers) if layer < n_first or layer >= num_layers - n_last}
