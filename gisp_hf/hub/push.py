"""Pushing a run: at once, or level by level while it goes on.

A level's branch holds what the level's folder holds, without names that begin with a dot, and nothing else. In ``main``
only those files of an earlier model are deleted that ``from_pretrained`` would read (``MODEL_FILES``); all others stay.
Branches of levels that the run does not have stay too.
"""

import json
import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub.utils import disable_progress_bars

from gisp_hf.config import level_name
from gisp_hf.hub.failures import PushError
from gisp_hf.hub.repository import START_BRANCH, Content, Files, Repository, is_not_attributes
from gisp_hf.levels.info import LEVELS_FILE, METRICS_FILE, LevelInfo, check_metrics, levels_json, read_levels
from gisp_hf.pruning.trajectory import FACTS_FILE, ORDER_FILE

MAIN = "main"
CARD_FILE = "README.md"
# What from_pretrained reads at the root of a repository, as patterns of fnmatch.
MODEL_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index.json"),
    *("pytorch_model*.bin", "pytorch_model*.bin.index.json", "tf_model*.h5", "flax_model*.msgpack"),
    *("adapter_config.json", "adapter_model*", "tokenizer*.json", "tokenizer.model", "vocab.*", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.*", "spiece.model", "sentencepiece.bpe.model"),
)

_TAG = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.|lock$|$)){0,63}")

# branch -> text of its card; or a function of the branch and the levels, whose commits are known for ``main`` alone
Cards = Mapping[str, str] | Callable[[str, Sequence[LevelInfo]], str | None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PushReport:
    """What the Hub has confirmed.

    ``commits``: branch -> commit, ``main`` last; ``tags``: tag -> commit. ``sent`` names the branches that had to be
    changed; ``bytes_sent`` is what that took, without what the repository was known to have stored (an estimate).
    """

    url: str
    commits: Mapping[str, str]
    tags: Mapping[str, str]
    sent: tuple[str, ...]
    bytes_sent: int


def push_levels(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    tag: str | None = None,
    card: Cards | None = None,
    metrics: Mapping[float, Mapping[str, float]] | None = None,
    progress: bool = True,
    endpoint: str | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> PushReport:
    """Pushes every level of a run, then ``main``. Does what is missing, and returns once the Hub has confirmed it all.

    Args:
        folder: the output folder of a run: the levels' folders, and the trajectory.
        repo_id: ``name``, ``user/name`` or ``organisation/name``; created if it does not exist.
        token: one that may write; the one you are logged in with if None.
        private: True creates a private repository, and refuses one that exists and is public.
        tag: ``v1`` tags ``main`` as ``v1`` and each level as ``v1-sparsity-0.20``, after everything else.
        card: texts for ``README.md``, by branch. Where there is none, that of the level's folder (of ``folder`` for
            ``main``) is taken; if there is none either, ``main`` keeps the one it has.
        metrics: level -> name -> number, for ``levels.json``, besides those in the folders:
            ``{0.2: {"perplexity": 12.3}}``.
        progress: whether the client shows its bars.
        endpoint: of the Hub; the environment's ``HF_ENDPOINT`` if None.
        wait: is given the seconds until the next try of something that failed.

    Raises:
        FileNotFoundError, ValueError: before anything is sent, if the folder, a name or a number will not do.
        PushError: if the Hub refuses, or fails again and again; another push goes on from there.
    """
    plan = _make_plan(Path(folder), tag=tag, card=card, metrics=metrics)
    with _bars(progress):
        return _push(Repository(repo_id, token=token, private=private, endpoint=endpoint, wait=wait), plan)


class LevelUploader:
    """Uploads levels while the run goes on. A push that fails costs no more than the push.

    The constructor creates the repository and makes sure that the token may write to it, so that what is impossible
    fails before anything is computed. Its arguments are those of ``push_levels``.

    Attributes:
        errors: branch -> why it could not be pushed in the background; ``finish`` tries again.

    Raises:
        ValueError: if the name or the token cannot be one.
        PushError: if the Hub refuses.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        progress: bool = True,
        endpoint: str | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.errors: dict[str, Exception] = {}
        self._progress = progress
        self._repository = Repository(repo_id, token=token, private=private, endpoint=endpoint, wait=wait)
        self._repository.check_writable()
        self._queue: queue.SimpleQueue[tuple[str, Path] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._finishing = False

    @property
    def repo_id(self) -> str:
        return self._repository.repo_id

    def submit(self, level: float, folder: str | Path) -> None:
        """Pushes the files of a level's ``folder`` in the background, one level after the other; returns at once."""
        if self._thread is None:
            # A daemon: a program that ends early does not wait for uploads, which another push can finish.
            self._thread = threading.Thread(target=self._work, name="gisp-hf-push", daemon=True)
            self._thread.start()
        self._queue.put((level_name(level), Path(folder)))

    def finish(
        self,
        folder: str | Path,
        *,
        tag: str | None = None,
        card: Cards | None = None,
        metrics: Mapping[float, Mapping[str, float]] | None = None,
    ) -> PushReport:
        """Waits for the level that is under way, then does and checks all the rest, as ``push_levels`` would.

        A level gets a second commit if ``card`` has another text for it than its folder had when it was submitted.

        Raises:
            FileNotFoundError, ValueError, PushError: as ``push_levels``. The levels are safe in ``folder``.
        """
        if self._thread is not None:
            self._finishing = True  # what waits in the queue is done below
            self._queue.put(None)
            self._thread.join()
            self._thread, self._queue, self._finishing = None, queue.SimpleQueue(), False
        plan = _make_plan(Path(folder), tag=tag, card=card, metrics=metrics)
        with _bars(self._progress):
            return _push(self._repository, plan)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None and not self._finishing:
            branch, folder = item
            self._repository.folder = folder.parent
            try:
                with _bars(self._progress):
                    _push_level(self._repository, branch, _level_files(folder))
            except (PushError, OSError, ValueError) as error:
                logger.warning("%s. The run goes on; the push is tried again at its end", error)
                self.errors[branch] = error


def _bars(progress: bool) -> AbstractContextManager[Any]:
    return nullcontext() if progress else disable_progress_bars()


# ---- what is to be pushed: all that can be refused without the Hub is refused here -----------------------------------


@dataclass(frozen=True)
class _Plan:
    folder: Path
    levels: Sequence[LevelInfo]
    files: Mapping[str, Files]  # by branch
    tag: str | None
    card: Cards | None


def _make_plan(
    folder: Path, *, tag: str | None, card: Cards | None, metrics: Mapping[float, Mapping[str, float]] | None
) -> _Plan:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; give the output folder of a pruning run")
    if tag is not None and (not _TAG.fullmatch(tag) or tag in (MAIN, START_BRANCH) or tag.startswith("sparsity-")):
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
    files = {name: {**_level_files(folder / name), **_card_files(card, name, levels)} for name in names}
    return _Plan(folder, levels, files, tag, card)


def _card_files(card: Cards | None, branch: str, levels: Sequence[LevelInfo]) -> Files:
    text = card(branch, levels) if callable(card) else (card or {}).get(branch)
    return {} if text is None else {CARD_FILE: Content(text.encode())}


def _level_files(folder: Path) -> Files:
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: Content(path) for name, path in paths.items() if not re.search(r"(^|/)\.", name)}
    try:
        index = paths.get("model.safetensors.index.json")
        weights = set(json.loads(index.read_bytes())["weight_map"].values()) if index else {"model.safetensors"}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is damaged: {error}; save the level again") from error
    if missing := sorted({"config.json", *weights} - files.keys()):
        raise ValueError(f"{folder} is no whole checkpoint: it lacks {', '.join(missing[:3])}; save the level again")
    return files


def _main_files(plan: _Plan, levels: Sequence[LevelInfo]) -> Files:
    """The mildest level, but with the card, the table and the trajectory of all of them."""
    own = all((plan.folder / name).is_file() for name in (ORDER_FILE, FACTS_FILE))
    # A run that was cut off has saved none, but its last level knows everything that led to it.
    trajectory = plan.folder if own else plan.folder / levels[-1].name
    card = plan.folder / CARD_FILE
    return {
        **{
            name: content
            for name, content in plan.files[levels[0].name].items()
            if name not in (CARD_FILE, METRICS_FILE)
        },
        **{name: Content(trajectory / name) for name in (ORDER_FILE, FACTS_FILE)},
        **({CARD_FILE: Content(card)} if card.is_file() else {}),
        **_card_files(plan.card, MAIN, levels),
        LEVELS_FILE: Content(levels_json(levels)),
    }


# ---- pushing it ------------------------------------------------------------------------------------------------------


def _push(repository: Repository, plan: _Plan) -> PushReport:
    repository.folder = plan.folder
    levels = [
        replace(level, commit=_push_level(repository, level.name, plan.files[level.name])) for level in plan.levels
    ]
    commits = {level.name: str(level.commit) for level in levels}
    commits[MAIN] = repository.settle(
        MAIN,
        _main_files(plan, levels),
        is_leftover=_is_of_a_model,
        message="All levels: table, trajectory, mildest level",
    )
    tags = {} if plan.tag is None else {f"{plan.tag}-{name}": commits[name] for name in plan.files}
    if plan.tag is not None:
        tags[plan.tag] = commits[MAIN]
    for name, commit in tags.items():
        repository.tag(name, commit)
    return PushReport(repository.url, commits, tags, tuple(repository.sent), sum(repository.sent.values()))


def _push_level(repository: Repository, branch: str, files: Files) -> str:
    return repository.settle(branch, files, is_leftover=is_not_attributes, message=f"Level {branch}")


def _is_of_a_model(path: str) -> bool:
    return "/" not in path and any(fnmatchcase(path, pattern) for pattern in MODEL_FILES)
