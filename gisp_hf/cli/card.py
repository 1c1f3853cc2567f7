"""``gisp-hf card``: the card that a push would give to a branch."""

import argparse
from pathlib import Path

from gisp_hf.cli.common import FOLDER_HELP, LICENSE_HELP, NEW_CARDS_HELP, run_folder, say
from gisp_hf.config import level_name
from gisp_hf.hub import read_levels
from gisp_hf.hub.run_cards import card_writer
from gisp_hf.hub.runs import MAIN

DESCRIPTION = "Print the card that a push would give to main or, with --level, to a level. Needs no network."
EXAMPLE = "gisp-hf card runs/quickstart --level 0.2 --repo me/SmolLM2-135M-Instruct-gisp"


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
