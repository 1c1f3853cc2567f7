"""``RestoreConfig``: settings of a restoration, validated."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gisp_hf.data.shares import split_mixture


@dataclass(frozen=True)
class RestoreConfig:
    """How to restore a level. Checked once, here.

    Raises:
        ValueError: if a value is out of range; the message names it and says what would do.
    """

    data: str | None = field(
        default=None,
        metadata={
            "help": "Calibration text, as `load_calibration` names it: a mixture serves every domain that it holds. "
            "None: the examples that pruning was calibrated on, where they are at hand."
        },
    )
    tokens: int | None = field(
        default=65_536,
        metadata={
            "help": "Most calibration tokens. At least ten times the inputs of the widest projection; more are better."
        },
    )
    positions: Literal["all", "answers"] = field(
        default="all",
        metadata={
            "help": "Tokens that count in the fit: all, or answers: those with a loss and those that predict them, of "
            "data with answers (objective completion, margin or self)."
        },
    )
    blend: float | None = field(
        default=None,
        metadata={
            "help": "The target: 0 is what the unpruned projection makes of the pruned model's stream, 1 is what takes "
            "the stream back to that of the unpruned model. None: `default_blend`."
        },
    )
    ridge: tuple[float, ...] = field(
        default=(1e-2, 3e-2, 1e-1, 3e-1, 1.0),
        metadata={
            "help": "Strength of the ridge, as a fraction of the mean squared input. Of several, each projection takes "
            "the one with the smallest error on a tenth of the sequences, held out for that; the middle one if there "
            "are fewer than ten sequences."
        },
    )
    batch_size: int = field(default=8, metadata={"help": "Sequences in one forward pass."})
    seed: int = field(default=0, metadata={"help": "Of the drawing of calibration text."})
    spill: bool = field(
        default=False,
        metadata={"help": "Keep hidden states in files of the temporary folder instead of the host's memory."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.ridge, (int, float)):
            object.__setattr__(self, "ridge", (self.ridge,))
        object.__setattr__(self, "ridge", tuple(float(value) for value in self.ridge))
        if not self.ridge or not all(0 <= value < float("inf") for value in self.ridge):
            raise ValueError(f"ridge must be one or more numbers of at least 0, got {self.ridge}; 0.01 is usual")
        if self.blend is not None and not 0 <= self.blend <= 1:
            raise ValueError(f"blend must lie in [0, 1], got {self.blend:g}; None chooses it by the sparsity")
        if self.positions not in ("all", "answers"):
            raise ValueError(f"positions must be all or answers, got {self.positions!r}")
        for name in ("tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0, got {self.seed!r}")

    @property
    def answers(self) -> bool:
        """Whether only tokens of answers count."""
        return self.positions == "answers"

    @property
    def middle_ridge(self) -> float:
        """Where none can be chosen by held-out tokens."""
        return sorted(self.ridge)[len(self.ridge) // 2]

    def blend_at(self, sparsity: float) -> float:
        """The blend for a level of this sparsity (a fraction, 0-1)."""
        return default_blend(sparsity) if self.blend is None else self.blend

    def to_dict(self) -> dict[str, Any]:
        """For JSON files that may be published: of the files in ``data`` the names alone."""
        return {**asdict(self), "ridge": list(self.ridge), "data": None if self.data is None else _names(self.data)}


def _names(data: str) -> str:
    """A mixture, or a single set, without folders of this machine."""
    shares = split_mixture(data)
    parts = {Path(part).name if Path(part).exists() else part: share for part, share in shares.items()}
    return ",".join(f"{part}:{share}" for part, share in parts.items()) if len(parts) > 1 else next(iter(parts))


def default_blend(sparsity: float) -> float:
    """One half: ``python -m recipes.restore_study`` found nothing better at 20, 30 and 50 % (docs/restore.md)."""
    return 0.5
