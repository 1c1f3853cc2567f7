"""The cards of a run's branches, written from its folder alone.

A push from inside the run and a later `gisp-hf push` both take their cards from here, so that they are equal.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from gisp_hf.hub.cards import level_card, main_card
from gisp_hf.hub.plan import CARD_FILE, GGUF_FILES
from gisp_hf.hub.runs import MAIN
from gisp_hf.levels.files import CONFIG_FILE
from gisp_hf.levels.info import LevelInfo
from gisp_hf.pruning.trajectory import Trajectory
from gisp_hf.report.curves import CURVES_FILE, has_curves
from gisp_hf.report.html import REPORT_FILE
from gisp_hf.untrusted import odd_contents, read_json

logger = logging.getLogger(__name__)


def card_writer(
    folder: str | Path,
    levels: Sequence[LevelInfo],
    *,
    repo_id: str,
    license: str | None = None,
    fetch: bool = False,
    new: bool = False,
    tell: Callable[[str], None] = logger.warning,
) -> Callable[[str, Sequence[LevelInfo]], str]:
    """A function of a branch and the levels that gives the branch its card, for the ``card`` of ``push_levels``.

    The card that lies in a branch's folder (``README.md``) is kept, unless a license is asked for, or a new one.

    Args:
        folder: the output folder of a run, with ``levels`` in it. Of a run that goes on, those that it has so far.
        levels: as ``read_levels`` gives them, the mildest first.
        repo_id: ``user/name``.
        license: an identifier of the Hub; that of the base model if None.
        fetch: whether the license of the base model may be looked for on the Hub.
        new: write new cards, whatever lies in the folders.
        tell: is given what the user should know.

    Raises:
        FileNotFoundError, ValueError: if there is no trajectory, or it is damaged.
    """
    folder = Path(folder)
    trajectory = _trajectory(folder, levels)
    cards = {MAIN: folder / CARD_FILE, **{level.name: folder / level.name / CARD_FILE for level in levels}}
    kept = {branch for branch, path in cards.items() if license is None and not new and path.is_file()}
    if fetch and license is None and len(kept) < len(cards):
        _fetch_base_card(trajectory, tell)

    def card(branch: str, pushed: Sequence[LevelInfo]) -> str:
        if branch in kept:
            return cards[branch].read_text(encoding="utf-8")
        # Of this level, not of the first: a level's card must not depend on which others there are.
        saved = levels[0].name if branch == MAIN else branch
        known: dict[str, Any] = {"repo_id": repo_id, "license": license, "versions": _versions(folder / saved)}
        if branch == MAIN:
            curves = CURVES_FILE if has_curves(pushed) else None  # a push with these cards has both files
            return main_card(trajectory, pushed, report=REPORT_FILE, curves=curves, **known)
        level = next(level for level in levels if level.name == branch)
        return level_card(trajectory, level, gguf=_gguf_file(folder / branch), **known)

    return card


def _trajectory(folder: Path, levels: Sequence[LevelInfo]) -> Trajectory:
    """That of the run; of a run that was cut off, that of its last level, which knows all that led to it."""
    try:
        return Trajectory.load(folder)
    except FileNotFoundError:
        return Trajectory.load(folder / levels[-1].name)


def _gguf_file(level_folder: Path) -> str | None:
    """The first GGUF file in a level's folder, by name."""
    return min((path.name for path in level_folder.glob(GGUF_FILES)), default=None)


def _versions(level_folder: Path) -> dict[str, str]:
    """What a level's own config says that it was saved with."""
    with odd_contents(f"{CONFIG_FILE} of {level_folder}"):
        version = read_json(level_folder / CONFIG_FILE).get("transformers_version")
    return {"transformers": version} if isinstance(version, str) else {}


def _fetch_base_card(trajectory: Trajectory, tell: Callable[[str], None]) -> None:
    """Brings the base model's card into the cache, where the license of the new cards is looked for."""
    base = trajectory.base
    try:
        if "/" in base.id and not Path(base.id).exists():  # not the name of a class or a folder
            hf_hub_download(base.id, CARD_FILE, revision=base.revision)
            return
    except (OSError, ValueError):  # offline, or a model that is gone: a push must not fail for its license
        pass
    tell(f"the license of {ascii(base.id)} was not found: the cards name none; --license gives one")
