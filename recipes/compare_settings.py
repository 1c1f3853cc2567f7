"""What a comparison runs: models x methods x calibration sets x seeds, read from a YAML file, and its cells."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from gisp_hf import GISPConfig
from gisp_hf.data.shares import split_mixture
from gisp_hf.pruning.methods import METHODS, find_method
from recipes.compare_results import DENSE, slug
from recipes.demo_data import DOMAINS, describe_domains

CONFIG = Path("recipes/compare.yaml")
STRETCH = 256  # tokens of connected text that `held_out_tokens` gives


@dataclass(frozen=True)
class Cell:
    """One run of a comparison; calibration and seed are None for the unpruned model and for methods without data."""

    model: str
    method: str
    calibration: str | None = None
    seed: int | None = None

    @property
    def file(self) -> str:
        """Its result, relative to the folder of the comparison."""
        own = self.method if self.calibration is None else f"{self.method}-{self.calibration}-seed{self.seed}"
        return f"{slug(self.model)}/{slug(own)}.json"


# What a variant may change besides the fields of GISPConfig.
VARIANT_KEYS = ("tokens", "block_size", "batch_size", "fresh", "dtype", "restore")


@dataclass(frozen=True)
class Variant:
    """How one method runs: ``tokens`` in each step, the same ones (or ``fresh``), blocks, dtype of the weights.

    ``restore``: tokens of the calibration domains on which each level is restored (`gisp_hf.RestoreConfig`); 0: none.
    """

    config: GISPConfig
    tokens: int
    block_size: int
    batch_size: int
    fresh: bool
    dtype: str
    restore: int


@dataclass(frozen=True)
class Comparison:
    """Models x methods x calibration sets x seeds, and what all of them have in common: the keys of the YAML file.

    ``leading`` names the methods that run with all seeds, on the first calibration set; every other cell has the first
    seed. None: all cells have all seeds. ``once`` names those that run on the first calibration set alone. ``variants``
    gives names to methods with other settings (`Variant`), for use in ``methods``, ``leading`` and ``once``.

    Raises:
        ValueError: if a value cannot be used.
    """

    models: tuple[str, ...]
    methods: tuple[str, ...]
    calibrations: Mapping[str, str]
    seeds: tuple[int, ...]
    leading: tuple[str, ...] | None
    levels: tuple[float, ...]
    tokens: int
    block_size: int
    batch_size: int
    num_steps: int
    evaluation_tokens: int
    window: int
    questions: int
    fresh: bool
    dtype: str
    restore: int = 0
    once: tuple[str, ...] = ()
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("models", "methods", "calibrations", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give at least one")
        for name in ("tokens", "block_size", "batch_size", "num_steps", "evaluation_tokens", "window", "questions"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if type(self.restore) is not int or self.restore < 0:
            raise ValueError(f"restore must be a number of tokens, or 0 for none, got {self.restore!r}")
        if type(self.fresh) is not bool:
            raise ValueError(f"fresh must be true or false, got {self.fresh!r}")
        for name in (*self.methods, *(self.leading or ()), *self.once):
            self.variant(name)
        for seed in self.seeds:
            if type(seed) is not int or seed < 0:
                raise ValueError(f"seeds must be whole numbers of at least 0, got {seed!r}")
        for name, data in self.calibrations.items():
            for domain in split_mixture(data):
                if domain not in DOMAINS:
                    raise ValueError(f"calibrations.{name}: {domain!r} is no domain: use {', '.join(DOMAINS)}")
        if self.evaluation_tokens % STRETCH:
            raise ValueError(f"evaluation_tokens must be a multiple of {STRETCH}, got {self.evaluation_tokens}")
        if STRETCH % self.window:
            raise ValueError(f"window must divide {STRETCH}, the length of connected text, got {self.window}")
        files = [cell.file for cell in self.cells()]
        if twice := sorted({file for file in files if files.count(file) > 1}):
            raise ValueError(
                f"several cells have the file {twice[0]}: give models, methods and calibrations plain names"
            )

    def cells(self) -> list[Cell]:
        """The unpruned models first; then seed by seed, so that an early end leaves whole tables."""
        dense = [Cell(model, DENSE) for model in self.models]
        without_data = [Cell(model, m) for model in self.models for m in self.methods if not self.reads_data(m)]
        return [*dense, *without_data] + [
            Cell(model, method, calibration, seed)
            for model in self.models
            for seed in self.seeds
            for calibration in self.calibrations
            for method in self.methods
            if self.reads_data(method) and self._runs_on(method, calibration, seed)
        ]

    def _runs_on(self, method: str, calibration: str, seed: int) -> bool:
        first_set = calibration == next(iter(self.calibrations))
        if method in self.once and not first_set:
            return False
        return seed == self.seeds[0] or self.leading is None or (method in self.leading and first_set)

    def variant(self, name: str) -> "Variant":
        """The settings of a cell's method.

        Raises:
            ValueError: there is no such method, or a value cannot be used.
        """
        changes = dict(self.variants.get(name, {"method": name}))  # a name of its own, or a method of the package
        method = changes.pop("method", "gisp")
        values: dict[str, Any] = {key: changes.pop(key, getattr(self, key)) for key in VARIANT_KEYS}
        steps = changes.pop("num_steps", min(find_method(method).num_steps, self.num_steps))
        config = GISPConfig.from_dict({"method": method, "sparsity_levels": self.levels, "num_steps": steps, **changes})
        if values["tokens"] % values["block_size"]:
            raise ValueError(
                f"{name}: tokens ({values['tokens']}) must be a multiple of block_size ({values['block_size']})"
            )
        return Variant(config=config, **values)

    def reads_data(self, name: str) -> bool:
        """Whether a method's scores depend on calibration data; otherwise one cell serves every data set and seed."""
        return find_method(self.variant(name).config.method).criterion().needs != "weights"

    def settings(self, cell: Cell) -> dict[str, Any]:
        """All that a cell's result depends on."""
        return {
            "model": cell.model,
            "method": cell.method,
            "calibration": cell.calibration,
            "data": None if cell.calibration is None else self.calibrations[cell.calibration],
            "seed": cell.seed,
            "levels": list(self.levels),
            "tokens": self.tokens,
            "block_size": self.block_size,
            "batch_size": self.batch_size,
            "num_steps": self.num_steps,
            "evaluation_tokens": self.evaluation_tokens,
            "window": self.window,
            "questions": self.questions,
            "fresh": self.fresh,
            "restore": self.restore,
            "changes": dict(self.variants.get(cell.method, {})),
            "dtype": self.dtype,
            "text": describe_domains(),
        }


def read_config(path: Path, *, fast: bool = False, changes: Mapping[str, Any] | None = None) -> Comparison:
    """The comparison that a YAML file describes; imports the modules that it names.

    Args:
        fast: apply the section ``fast``.
        changes: values to use instead of the file's.

    Raises:
        ValueError: if a key is unknown or missing, or a value cannot be used.
        ImportError: if a module is not found.
    """
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of settings, got {type(values).__name__}")
    faster = values.pop("fast", None) or {}
    values |= (faster if fast else {}) | {key: value for key, value in (changes or {}).items() if value is not None}
    for module in values.pop("imports", None) or []:
        importlib.import_module(module)
    values = {"variants": {}, "restore": 0, "once": [], **values}
    names = {entry.name for entry in fields(Comparison)}
    if set(values) != names:
        missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
        raise ValueError(f"{path}: missing {missing}, unknown {unknown}; the keys are {sorted(names)}")
    values["methods"] = values["methods"] or [*METHODS, *values["variants"]]
    lists = ["models", "methods", "seeds", "levels", "once", *(["leading"] if values["leading"] is not None else [])]
    for key in lists:
        if not isinstance(values[key], list):
            raise ValueError(f"{path}: {key} must be a list, got {values[key]!r}; write [{values[key]}]")
    if not isinstance(values["variants"], dict) or not all(isinstance(v, dict) for v in values["variants"].values()):
        raise ValueError(f"{path}: variants must map names to settings, got {values['variants']!r}")
    if not isinstance(values["calibrations"], dict):
        raise ValueError(f"{path}: calibrations must map names to domains, got {values['calibrations']!r}")
    return Comparison(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
