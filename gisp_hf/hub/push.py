"""Pushing a run: at once, or level by level while it goes on.

A level's branch holds its files and nothing else (see ``plan.py``). In ``main`` only those files of an earlier model
are deleted that ``from_pretrained`` would read; all others stay. A repository that holds another run is refused unless
the user says ``replace``; branches of levels that the run does not have stay, and are named.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.utils import disable_progress_bars

from gisp_hf.config import level_name
from gisp_hf.hub.failures import PushError
from gisp_hf.hub.plan import Cards, Plan, Report, files_of_level, is_of_a_model, make_plan
from gisp_hf.hub.repository import Files, Repository, is_not_attributes
from gisp_hf.hub.runs import MAIN, check_branch, check_repository, stale_levels
from gisp_hf.pruning.trajectory import Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PushReport:
    """What the Hub has confirmed.

    ``commits``: branch -> commit, ``main`` last; ``tags``: tag -> commit. ``sent`` names the branches that had to be
    changed; ``bytes_sent`` is what that took, without what the repository was known to have stored (an estimate).
    ``stale`` names branches of levels that this run does not have; they were left alone.
    """

    url: str
    commits: Mapping[str, str]
    tags: Mapping[str, str]
    sent: tuple[str, ...]
    bytes_sent: int
    stale: tuple[str, ...] = ()


def push_levels(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    tag: str | None = None,
    card: Cards | None = None,
    metrics: Mapping[float, Mapping[str, float]] | None = None,
    report: Report | None = None,
    replace: bool = False,
    progress: bool = True,
    endpoint: str | None = None,
    timeout: float = 60.0,
    wait: Callable[[float], None] = time.sleep,
) -> PushReport:
    """Pushes every level of a run, then ``main``. Does what is missing, and returns once the Hub has confirmed it all.

    Args:
        folder: the output folder of a run: the levels' folders, and the trajectory.
        repo_id: ``name``, ``user/name`` or ``organisation/name``; created if it does not exist.
        token: one that may write; the one you are logged in with if None.
        private: True creates a private repository, and refuses one that exists and is public.
        tag: ``v1`` tags ``main`` as ``v1`` and each level as ``v1-sparsity-0.20``, after everything else. A tag that
            stands elsewhere is refused before anything is sent.
        card: texts for ``README.md``, by branch. Where there is none, that of the level's folder (of ``folder`` for
            ``main``) is taken; if there is none either, ``main`` keeps the one it has.
        metrics: level -> name -> number, for ``levels.json``, besides those in the folders:
            ``{0.2: {"perplexity": 12.3}}``.
        report: gives ``report.html`` and pictures for ``main`` (`gisp_hf.report.html.report_writer`). None: the
            repository keeps those it has, if any.
        replace: write over another run that the repository holds, instead of refusing it.
        progress: whether the client shows its bars.
        endpoint: of the Hub; the environment's ``HF_ENDPOINT`` if None.
        timeout: seconds that the Hub may be silent before a request counts as failed. An upload may take longer.
        wait: is given the seconds until the next try of something that failed.

    Raises:
        FileNotFoundError, ValueError: before anything is sent, if the folder, a name or a number will not do, or a
            level is not as it was saved.
        PushError: if the Hub refuses, or fails again and again: another push goes on from there. Also if the repository
            holds another run, or if another push moves the levels meanwhile.
    """
    plan = make_plan(Path(folder), tag=tag, card=card, metrics=metrics, report=report)
    with _bars(progress):
        repository = Repository(repo_id, token=token, private=private, endpoint=endpoint, timeout=timeout, wait=wait)
        return _push(repository, plan, replace_run=replace)


class LevelUploader:
    """Uploads levels while the run goes on. A push that fails costs no more than the push.

    The constructor creates the repository and makes sure that the token may write to it, so that what is impossible
    fails before anything is computed. Its arguments are those of ``push_levels``.

    Args:
        run: what is known of the run before it begins: a trajectory with its base, configuration and calibration data,
            and the order so far of a run that is resumed. With it, a repository that holds another run is refused at
            once; without it, by ``submit`` and ``finish``.

    Attributes:
        errors: branch -> why it could not be pushed in the background; ``finish`` tries again.

    Raises:
        ValueError: if the name or the token cannot be one.
        PushError: if the Hub refuses, or the repository holds another run.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        run: Trajectory | None = None,
        replace: bool = False,
        progress: bool = True,
        endpoint: str | None = None,
        timeout: float = 60.0,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.errors: dict[str, Exception] = {}
        self._progress, self._replace = progress, replace
        self._repository = Repository(
            repo_id, token=token, private=private, endpoint=endpoint, timeout=timeout, wait=wait
        )
        self._repository.check_writable()
        if run is not None and not replace:
            names = [level_name(level) for level in run.config.sparsity_levels]
            check_repository(self._repository, run, dict.fromkeys(names, {}))
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
        report: Report | None = None,
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
        plan = make_plan(Path(folder), tag=tag, card=card, metrics=metrics, report=report)
        with _bars(self._progress):
            return _push(self._repository, plan, replace_run=self._replace)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None and not self._finishing:
            branch, folder = item
            self._repository.folder = folder.parent
            try:
                files = files_of_level(folder)
                with _bars(self._progress):
                    if not self._replace:
                        check_branch(self._repository, branch, Trajectory.load(folder), files)
                    _push_level(self._repository, branch, files)
            except (PushError, OSError, ValueError) as error:
                logger.warning("%s. The run goes on; the push is tried again at its end", error)
                self.errors[branch] = error


def _bars(progress: bool) -> AbstractContextManager[Any]:
    return nullcontext() if progress else disable_progress_bars()


# ---- pushing it ------------------------------------------------------------------------------------------------------


def _push(repository: Repository, plan: Plan, *, replace_run: bool) -> PushReport:
    repository.folder, repository.options = plan.folder, " --replace" if replace_run else ""
    if not replace_run:
        check_repository(repository, plan.run, {**plan.files, MAIN: plan.trajectory})
    _check_tags(repository, plan)
    if stale := stale_levels(repository, plan.files):
        logger.warning(
            "%s has branches of levels that this run does not have: %s. They stay; delete them if nobody needs them",
            repository.repo_id,
            ascii(", ".join(stale)),
        )
    levels = [
        replace(level, commit=_push_level(repository, level.name, plan.files[level.name])) for level in plan.levels
    ]
    commits = {level.name: str(level.commit) for level in levels}
    commits[MAIN] = repository.settle(
        MAIN,
        plan.main_files(levels),
        is_leftover=is_of_a_model,
        message="All levels: table, trajectory, mildest level",
        expected=dict(commits),
    )
    tags = {tag: commits[branch] for tag, branch in plan.tags.items()}
    for tag, commit in tags.items():
        repository.tag(tag, commit)
    repository.check_heads(commits)  # read after the last change
    return PushReport(repository.url, commits, tags, tuple(repository.sent), sum(repository.sent.values()), stale)


def _push_level(repository: Repository, branch: str, files: Files) -> str:
    return repository.settle(branch, files, is_leftover=is_not_attributes, message=f"Level {branch}")


def _check_tags(repository: Repository, plan: Plan) -> None:
    """Refuses a tag that stands anywhere but where this push will put it, before anything is written."""
    wanted, there = plan.tags, repository.tags()
    taken = {tag: commit for tag, commit in there.items() if tag in wanted}
    if not taken:
        return
    heads = repository.heads()
    levels = [  # whose branches need no commit
        replace(level, commit=heads[level.name])
        for level in plan.levels
        if repository.holds(level.name, plan.files[level.name], is_leftover=is_not_attributes)
    ]
    settled = {level.name: heads[level.name] for level in levels}
    if len(levels) == len(plan.levels) and repository.holds(MAIN, plan.main_files(levels), is_leftover=is_of_a_model):
        settled[MAIN] = heads[MAIN]
    for tag, commit in taken.items():
        branch = wanted[tag]
        if settled.get(branch) != commit:
            raise PushError(
                f"{repository.repo_id}, tag {tag}: it stands at {commit}, and this push "
                f"{f'is at {settled[branch]}' if branch in settled else f'changes {branch}'}; choose another tag, or "
                "delete that one"
            )
