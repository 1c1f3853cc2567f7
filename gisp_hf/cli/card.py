"""``gisp-hf card``: the card that a push would give to a branch."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from gisp_hf.cli.common import FOLDER_HELP, LICENSE_HELP, NEW_CARDS_HELP, note, run_folder, say
from gisp_hf.config import level_name
from gisp_hf.hub import LevelInfo, read_levels
from gisp_hf.hub.cards import level_card, main_card
from gisp_hf.levels.files import CONFIG_FILE
from gisp_hf.pruning.trajectory import Trajectory
from gisp_hf.untrusted import odd_contents, read_json

MAIN = "main"
CARD_FILE = "README.md"
DESCRIPTION = "Print the card that a push would give to main or, with --level, to a level. Needs no network."
EXAMPLE = "gisp-hf card runs/quickstart --level 0.2 --repo me/SmolLM2-135M-gisp"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help=FOLDER_HELP)
    parser.add_argument("--level", type=float, metavar="FRACTION", help="sparsity of the level (default: main's card)")
    parser.add_argument("--repo", metavar="USER/NAME", help="repository that the card speaks of (default: user/FOLDER)")
    parser.add_argument("--license", metavar="ID", help=LICENSE_HELP.format(where="in the cache"))
    parser.add_argument("--new-cards", action="store_true", help=NEW_CARDS_HELP)


def run(options: argparse.Namespace) -> None:
    folder = Path(run_folder(options.folder))
    levels = read_levels(folder)
    branch = MAIN if options.level is None else level_name(options.level)
    if branch not in {MAIN, *(level.name for level in levels)}:
        names = ", ".join(f"{level.sparsity:g}" for level in levels)
        raise ValueError(f"{folder} holds no level {options.level:g}; it has {names}")
    repo_id = options.repo or f"user/{folder.resolve().name}"
    card = card_writer(folder, levels, repo_id=repo_id, license=options.license, fetch=False, new=options.new_cards)
    say(card(branch, levels), end="")


def card_writer(
    folder: Path, levels: Sequence[LevelInfo], *, repo_id: str, license: str | None, fetch: bool, new: bool
) -> Callable[[str, Sequence[LevelInfo]], str]:
    """A function of branch and levels that gives the card: the one in the folder, unless a license is asked for.

    Args:
        fetch: whether the license of the base model may be looked for on the Hub.
        new: write new cards, whatever lies in the folders.
    """
    trajectory = _trajectory(folder, levels)
    cards = {MAIN: folder / CARD_FILE, **{level.name: folder / level.name / CARD_FILE for level in levels}}
    kept = {branch for branch, path in cards.items() if license is None and not new and path.is_file()}
    if fetch and license is None and len(kept) < len(cards):
        _fetch_base_card(trajectory)
    known: dict[str, Any] = {"repo_id": repo_id, "license": license, "versions": _versions(folder / levels[0].name)}

    def card(branch: str, pushed: Sequence[LevelInfo]) -> str:
        if branch in kept:
            return cards[branch].read_text(encoding="utf-8")
        if branch == MAIN:
            return main_card(trajectory, pushed, **known)
        return level_card(trajectory, next(level for level in levels if level.name == branch), **known)

    return card


def _trajectory(folder: Path, levels: Sequence[LevelInfo]) -> Trajectory:
    """That of the run; of a run that was cut off, that of its last level, which knows all that led to it."""
    try:
        return Trajectory.load(folder)
    except FileNotFoundError:
        return Trajectory.load(folder / levels[-1].name)


def _versions(level_folder: Path) -> dict[str, str]:
    """The versions that the config of a level names."""
    with odd_contents(f"{CONFIG_FILE} of {level_folder}"):
        version = read_json(level_folder / CONFIG_FILE).get("transformers_version")
    return {"transformers": version} if isinstance(version, str) else {}


def _fetch_base_card(trajectory: Trajectory) -> None:
    """Brings the base model's card into the cache, where the license of the new cards is looked for."""
    base = trajectory.base
    try:
        hf_hub_download(base.id, "README.md", revision=base.revision)
    except (OSError, ValueError):  # a folder, or a model that is gone: a push must not fail for its license
        note(f"the license of {base.id} was not found: the cards name none; --license gives one")
