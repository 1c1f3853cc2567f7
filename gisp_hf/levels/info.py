"""The levels of a run's output folder, or of a repository (``levels.json``), and their metrics."""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from gisp_hf.atomic import write_text_atomic
from gisp_hf.config import level_name
from gisp_hf.levels.files import CONFIG_FILE, INDEX_FILE, checked_token, read_weight_map
from gisp_hf.pruning.trajectory import FACTS_FILE, Trajectory
from gisp_hf.recovery.lora_record import is_recovered
from gisp_hf.recovery.record import is_restored
from gisp_hf.untrusted import TOTAL, check_model_config, check_whole, odd_contents, printable, read_json
from gisp_hf.version import __version__

LEVELS_FILE = "levels.json"
FORMAT = 1

METRICS_FILE = "metrics.json"  # in a level's folder: what was measured of it

_LEVEL = re.compile(r"sparsity-(0\.\d{2,4})", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_METRIC = re.compile(r"[A-Za-z0-9_][\w.@%/ -]{0,63}", re.ASCII)
_CHANGES = ("restored", "recovered")
_LARGEST = 2**20  # bytes of a levels.json or metrics.json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LevelInfo:
    """One level of a run.

    ``name`` is its folder and its branch, ``sparsity`` what was asked for: a fraction (0-1) of the decoder layers'
    parameters. ``parameters`` counts the whole checkpoint, ``decoder_parameters`` what the decoder layers have left.
    ``commit`` is None until the level is pushed. A metric is None if it was measured and is not finite. ``restored``:
    the output projections were fitted anew; ``recovered``: adapters were trained and merged (`gisp_hf.recovery`). With
    neither, all weights are those of the base model.
    """

    name: str
    sparsity: float
    parameters: int
    decoder_parameters: int
    commit: str | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    restored: bool = False
    recovered: bool = False


def find_run(folder: str | Path) -> Path:
    """The folder that holds the levels: ``folder`` itself, or the only one in it that does.

    A folder that holds no run at all is returned as it is, so that the error names what is missing there.

    Raises:
        ValueError: if several of its folders hold levels.
    """
    folder = Path(folder)
    if not folder.is_dir() or _holds_levels(folder) or (folder / FACTS_FILE).is_file():
        return folder
    found = sorted(path for path in folder.iterdir() if path.is_dir() and _holds_levels(path))
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:8])
        raise ValueError(f"{folder} holds several runs: {names}; give one of them, such as {found[0]}")
    return found[0] if found else folder


def _holds_levels(folder: Path) -> bool:
    return any(_is_level_name(path.name) for path in folder.iterdir())


def read_levels(
    repo_or_folder: str | Path, *, revision: str | None = None, token: str | None = None, endpoint: str | None = None
) -> list[LevelInfo]:
    """The levels of a repository (as its ``levels.json`` says) or of a run's output folder, the mildest first.

    Args:
        revision: a tag or commit of the repository; ``main`` if None.

    Raises:
        FileNotFoundError: if there is neither such a folder nor such a repository, or no level in it.
        ValueError: if there is no such revision, or if ``levels.json`` or a folder is not what this package writes.
    """
    folder = Path(repo_or_folder)
    if folder.is_dir():
        levels = [_read_folder(path) for path in folder.iterdir() if _is_level_name(path.name)]
        if not levels:
            raise FileNotFoundError(f"{folder} holds no level (sparsity-0.20 ...); give the output folder of a run")
        return sorted(levels, key=lambda level: level.sparsity)
    try:
        path = hf_hub_download(
            str(repo_or_folder),
            LEVELS_FILE,
            revision=revision,
            token=None if token is None else checked_token(token),
            endpoint=endpoint,
            library_name="gisp_hf",
            library_version=__version__,
        )
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_or_folder} holds no {LEVELS_FILE}: a run was not pushed there, or not to the end; "
            "`gisp-hf push FOLDER --repo ID` does that"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{repo_or_folder} is neither a folder here nor a repository on the Hub that you can read; check the name, "
            "or log in with `hf auth login` if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo_or_folder} has no revision {revision!r}; give a tag or a commit of it") from error
    return _parse_levels(Path(path), f"{LEVELS_FILE} of {repo_or_folder}")


def levels_json(levels: Sequence[LevelInfo]) -> bytes:
    """Branch -> commit, sparsity, parameters and metrics; nothing in it that another push would change."""
    entries = {level.name: {key: value for key, value in asdict(level).items() if key != "name"} for level in levels}
    for entry in entries.values():
        for key in _CHANGES:  # so that files of plain levels stay as older versions wrote and read them
            if not entry[key]:
                del entry[key]
    text = json.dumps({"format": FORMAT, "levels": entries}, indent=1, sort_keys=True, allow_nan=False)
    return text.encode() + b"\n"


def clean_metrics(name: str, metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers as JSON can hold them; one that is not finite becomes None, with a warning.

    Args:
        name: of the level, for messages.
        metrics: name -> any real number: Python's, NumPy's, or a tensor without dimensions. None stays None.

    Raises:
        ValueError: if a name is not a short plain one, or a value is no real number.
    """
    _check_metric_names(name, metrics)
    cleaned = {key: _plain_number(value, f"{name}: {key}") for key, value in metrics.items()}
    for key, number in cleaned.items():
        if number is None and metrics[key] is not None:
            value = "beyond the largest float" if isinstance(metrics[key], int) else metrics[key]
            logger.warning("%s: %s is %s, which is not finite; it is recorded as null", name, key, value)
    return cleaned


def check_metrics(name: str, metrics: Mapping[str, float | None]) -> None:
    """Refuses what cannot be written to ``levels.json``, or should not be believed that stands there.

    Raises:
        ValueError: if a name is not a short plain one, or a number is not finite.
    """
    _check_metric_names(name, metrics)
    for key, value in metrics.items():
        if value is not None and (type(value) not in (int, float) or not _is_finite(value)):
            raise ValueError(f"{name}: {key} is {value!r:.60}; give a finite number, or leave it out")


def _check_metric_names(name: str, metrics: Mapping[str, Any]) -> None:
    for key in metrics:
        if not isinstance(key, str) or not _METRIC.fullmatch(key):
            raise ValueError(f"{name} has a metric named {key!r:.80}; use up to 64 letters, digits, spaces and _.@%/-")


def _plain_number(value: Any, what: str) -> float | None:
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{what} is {value!r:.60}, of type {type(value).__name__}; give one real number")
    if not _is_finite(value):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def _is_finite(number: Real | float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond the largest float
        return False


def _is_level_name(name: str) -> bool:
    match = _LEVEL.fullmatch(name)
    return match is not None and float(match[1]) > 0 and level_name(float(match[1])) == name


def _read_folder(folder: Path) -> LevelInfo:
    trajectory = Trajectory.load(folder)  # as far as this level: its end is this level
    if (folder / CONFIG_FILE).is_file():
        with odd_contents(f"{CONFIG_FILE} of {folder}"):
            check_model_config(read_json(folder / CONFIG_FILE))
    if (folder / INDEX_FILE).is_file():
        read_weight_map(folder / INDEX_FILE)
    parameters = 0
    for path in folder.glob("model*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                parameters += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}; save the level again") from error
    total = trajectory.layout.total
    return LevelInfo(
        name=folder.name,
        sparsity=float(folder.name.removeprefix("sparsity-")),
        parameters=parameters,
        decoder_parameters=total - round(trajectory.highest_sparsity() * total),
        metrics=_read_metrics(folder),
        restored=is_restored(folder),
        recovered=is_recovered(folder),
    )


def write_metrics(folder: str | Path, metrics: Mapping[str, Any]) -> None:
    """Adds numbers to those that a level's folder holds; its card and ``levels.json`` show them.

    Any real number will do (see ``clean_metrics``); one that is not finite is recorded as null, with a warning.

    Raises:
        ValueError: if a name will not do, or a value is no number.
    """
    folder = Path(folder)
    merged = {**_read_metrics(folder), **clean_metrics(folder.name, metrics)}
    text = json.dumps(merged, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_text_atomic(folder / METRICS_FILE, text)


def _read_metrics(folder: Path) -> dict[str, float | None]:
    path = folder / METRICS_FILE
    if not path.is_file():
        return {}
    try:
        metrics = read_json(path, largest=_LARGEST)
        check_metrics(folder.name, metrics)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}; remove it and measure again") from error
    return metrics


def _parse_levels(path: Path, label: str) -> list[LevelInfo]:
    """Trusts nothing: what is read here becomes a revision, a path, or a line on a screen."""
    try:
        facts = read_json(path, largest=_LARGEST)
        if facts["format"] != FORMAT:
            raise ValueError(f"it has format {facts['format']!r}, this version of gisp_hf reads format {FORMAT}")
        levels = [LevelInfo(name=name, **entry) for name, entry in facts["levels"].items()]
        for level in levels:
            _check_level(level)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = printable(error)[:300]
        raise ValueError(f"{label} is not what `gisp-hf push` writes, and nothing of it is used: {reason}") from error
    return sorted(levels, key=lambda level: level.sparsity)


def _check_level(level: LevelInfo) -> None:
    if not _is_level_name(level.name):
        raise ValueError(f"{level.name!r} is not the name of a level, such as sparsity-0.20")
    if type(level.sparsity) is not float or level_name(level.sparsity) != level.name:
        raise ValueError(f"{level.name} has the sparsity {level.sparsity!r}")
    for number in (level.parameters, level.decoder_parameters):
        check_whole(number, f"the number of parameters of {level.name}", most=TOTAL)
    if not isinstance(level.commit, str) or not _COMMIT.fullmatch(level.commit):
        raise ValueError(f"{level.name} has the commit {level.commit!r}, which is none")
    for key in _CHANGES:
        if type(value := getattr(level, key)) is not bool:
            raise ValueError(f"{key} of {level.name} is {value!r:.60}, neither true nor false")
    check_metrics(level.name, level.metrics)
