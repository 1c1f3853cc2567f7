"""The plan of a push: the files of every branch. All refusals that need no Hub are made here.

A level's branch holds the files of the level's folder that a run writes: those in its manifest, and those with the
usual names (``LEVEL_FILES``). Other files stay here, with a warning; a symbolic link is an error.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from gisp_hf.config import level_name
from gisp_hf.hub.repository import START_BRANCH, Content, Files
from gisp_hf.hub.runs import LEVEL_PREFIX, MAIN, difference
from gisp_hf.levels.info import LEVELS_FILE, METRICS_FILE, LevelInfo, check_metrics, levels_json, read_levels
from gisp_hf.levels.manifest import CHANGING_FILES, MANIFEST_FILE, check_manifest, level_files, refuse_link
from gisp_hf.pruning.trajectory import FACTS_FILE, ORDER_FILE, Trajectory

CARD_FILE = "README.md"
GGUF_FILES = "*.gguf"  # of `gisp-hf push --gguf`
# What from_pretrained reads at the root of a repository, as patterns of fnmatch.
MODEL_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index.json"),
    *("pytorch_model*.bin", "pytorch_model*.bin.index.json", "tf_model*.h5", "flax_model*.msgpack"),
    *("adapter_config.json", "adapter_model*", "tokenizer*.json", "tokenizer.model", "vocab.*", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.*", "spiece.model", "sentencepiece.bpe.model"),
)
# What a run writes into a level's folder, besides what its manifest names.
LEVEL_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("configuration_*.py", "modeling_*.py", "tokenization_*.py", "tokenizer*.json", "tokenizer.model*", "vocab.*"),
    *("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.*", "*.tiktoken"),
    *("additional_chat_templates/*.jinja", "spiece.model", "sentencepiece.bpe.model"),
    GGUF_FILES,
    *(ORDER_FILE, FACTS_FILE, MANIFEST_FILE, *CHANGING_FILES),
)

_TAG = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.|lock$|$)){0,63}")
_ROUNDING = 5e-5  # of a sparsity in the name of a level, which has four digits at most

# branch -> text of its card; or a function of the branch and the levels, whose commits are known for ``main`` alone
Cards = Mapping[str, str] | Callable[[str, Sequence[LevelInfo]], str | None]
# the run's trajectory and the levels with their commits -> files of ``main``, such as an HTML page and a picture
Report = Callable[[Trajectory, Sequence[LevelInfo]], Mapping[str, bytes]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """``files``: level's branch -> files; ``run``: the removal order of the run; ``trajectory``: its two files."""

    folder: Path
    levels: Sequence[LevelInfo]
    files: Mapping[str, Files]
    run: Trajectory
    trajectory: Files
    tag: str | None
    card: Cards | None
    report: Report | None = None

    @property
    def tags(self) -> dict[str, str]:
        """Tag -> branch."""
        if self.tag is None:
            return {}
        return {**{f"{self.tag}-{name}": name for name in self.files}, self.tag: MAIN}

    def main_files(self, levels: Sequence[LevelInfo]) -> Files:
        """The mildest level, but with the card, the table and the trajectory of all of them.

        Args:
            levels: those of the plan, with the commits of their branches.
        """
        card = self.folder / CARD_FILE
        # The manifest is about the level's own trajectory.
        own = (CARD_FILE, METRICS_FILE, MANIFEST_FILE, GGUF_FILES)
        return {
            **{name: content for name, content in self.files[levels[0].name].items() if not _is_any(name, own)},
            **self.trajectory,
            **({CARD_FILE: Content(card)} if card.is_file() else {}),
            **_card_files(self.card, MAIN, levels),
            **({name: Content(data) for name, data in self.report(self.run, levels).items()} if self.report else {}),
            LEVELS_FILE: Content(levels_json(levels)),
        }


def make_plan(
    folder: Path,
    *,
    tag: str | None,
    card: Cards | None,
    metrics: Mapping[float, Mapping[str, float]] | None,
    report: Report | None = None,
) -> Plan:
    """What ``push_levels`` has to send.

    Raises:
        FileNotFoundError, ValueError: if the folder, a name or a number will not do, or a level is not as it was saved.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; give the output folder of a pruning run")
    if tag is not None and (not _TAG.fullmatch(tag) or tag in (MAIN, START_BRANCH) or tag.startswith(LEVEL_PREFIX)):
        raise ValueError(f"{tag!r} cannot be a tag here; use letters, digits and ._-, such as v1.0")
    measured = {level_name(level): dict(values) for level, values in (metrics or {}).items()}
    levels = [
        replace(level, metrics={**level.metrics, **measured.pop(level.name, {})}) for level in read_levels(folder)
    ]
    names = [level.name for level in levels]
    if measured:
        raise ValueError(f"metrics has {', '.join(measured)}, but the levels of {folder} are {', '.join(names)}")
    for level in levels:
        check_metrics(level.name, level.metrics)
    if isinstance(card, Mapping) and (unknown := set(card) - {MAIN, *names}):
        raise ValueError(f"card has {', '.join(sorted(unknown))}, but the branches are {MAIN}, {', '.join(names)}")
    source = folder
    if not all((folder / name).is_file() for name in (ORDER_FILE, FACTS_FILE)):
        source = folder / names[-1]  # a run that was cut off has saved none, but its last level knows what led to it
    for path in (folder / CARD_FILE, source / ORDER_FILE, source / FACTS_FILE):
        refuse_link(path, path.parent)
    run = Trajectory.load(source)
    for level in levels:
        _check_order(folder / level.name, level.sparsity, run)
    return Plan(
        folder=folder,
        levels=levels,
        files={name: {**files_of_level(folder / name), **_card_files(card, name, levels)} for name in names},
        run=run,
        trajectory={name: Content(source / name) for name in (ORDER_FILE, FACTS_FILE)},
        tag=tag,
        card=card,
        report=report,
    )


def files_of_level(folder: Path) -> Files:
    """The files of a level's folder that are pushed.

    Raises:
        ValueError: if it is no whole checkpoint, is not as it was saved, or holds a symbolic link.
    """
    paths = level_files(folder)
    try:
        index = paths.get("model.safetensors.index.json")
        weights = set(json.loads(index.read_bytes())["weight_map"].values()) if index else {"model.safetensors"}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is damaged: {error}; save the level again") from error
    if missing := sorted({"config.json", *weights} - paths.keys()):
        raise ValueError(f"{folder} is no whole checkpoint: it lacks {', '.join(missing[:3])}; save the level again")
    saved = check_manifest(folder) or frozenset()
    files = {name: Content(path) for name, path in paths.items() if name in saved or _is_of_a_level(name)}
    if others := [name for name in paths if name not in files]:
        logger.warning(
            "%s: %d files are not of a kind that a run writes, and are not pushed: %s",
            folder,
            len(others),
            ascii(", ".join(others[:5])),
        )
    return files


def _check_order(folder: Path, sparsity: float, run: Trajectory) -> None:
    """Makes sure that a level belongs to the run, and is the one that its name says."""
    own = Trajectory.load(folder)
    if reason := difference(own, run):
        raise ValueError(f"{folder} is a level of another run than {folder.parent}: {reason}")
    reached, before = own.sparsity_at(len(own)), own.sparsity_at(max(len(own) - 1, 0))
    # A level is the shortest beginning of the order that reaches its sparsity.
    if reached < sparsity - _ROUNDING or before > sparsity + _ROUNDING:
        raise ValueError(
            f"{folder} holds a level of sparsity {reached:.4f}, which does not fit its name; give every level its own "
            "folder back, or save the level again"
        )


def _card_files(card: Cards | None, branch: str, levels: Sequence[LevelInfo]) -> Files:
    text = card(branch, levels) if callable(card) else (card or {}).get(branch)
    return {} if text is None else {CARD_FILE: Content(text.encode())}


def _is_of_a_level(name: str) -> bool:
    return _is_any(name, LEVEL_FILES)


def _is_any(name: str, patterns: Sequence[str]) -> bool:
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)


def is_of_a_model(path: str) -> bool:
    """Whether ``from_pretrained`` would read it."""
    return "/" not in path and any(fnmatchcase(path, pattern) for pattern in MODEL_FILES)
