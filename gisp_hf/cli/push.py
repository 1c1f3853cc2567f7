"""``gisp-hf push``: every level of a run to one repository on the Hub."""

import argparse
from pathlib import Path

from gisp_hf.cli.common import (
    FOLDER_HELP,
    LICENSE_HELP,
    LOGIN,
    NEW_CARDS_HELP,
    missing_package,
    note,
    run_folder,
    say,
)
from gisp_hf.export.gguf import FILE_TYPES
from gisp_hf.export.run import export_levels
from gisp_hf.hub import push_levels, read_levels
from gisp_hf.hub.run_cards import card_writer
from gisp_hf.report.html import report_writer

DESCRIPTION = (
    "Push every level of a run as a branch of one repository, with a card each, and what they have in common as "
    "main. What is there already is not sent again, so a push that was cut off is finished by another. " + LOGIN
)
EXAMPLE = "gisp-hf push runs/quickstart --repo me/SmolLM2-135M-Instruct-gisp --tag v1 --license apache-2.0"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help=FOLDER_HELP)
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="repository; made if need be (required)")
    parser.add_argument(
        "--private",
        action="store_true",
        help="make a new repository private, and refuse one that is public (default: as your account has it)",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="push over the levels of another run that the repository holds (default: refuse)",
    )
    parser.add_argument(
        "--tag", metavar="NAME", help="tag the result: v1 for main, v1-sparsity-0.20 ... for levels (default: no tag)"
    )
    parser.add_argument(
        "--gguf",
        nargs="?",
        const="f16",
        choices=FILE_TYPES,
        help="also write each level as a GGUF file for llama.cpp into its folder, and push it with its branch; "
        "f16 unless a type is given (default: only files that are there already)",
    )
    parser.add_argument("--license", metavar="ID", help=LICENSE_HELP.format(where="on the Hub"))
    parser.add_argument("--new-cards", action="store_true", help=NEW_CARDS_HELP)


def run(options: argparse.Namespace) -> None:
    folder = Path(run_folder(options.folder))
    levels = read_levels(folder)
    if options.gguf:
        names = [level.name for level in levels]
        with missing_package():
            export_levels(folder, names, repo_id=options.repo, file_type=options.gguf, tell=note)
    card = card_writer(
        folder,
        levels,
        repo_id=options.repo,
        license=options.license,
        fetch=True,
        new=options.new_cards,
        tell=note,
    )
    report = push_levels(
        folder,
        options.repo,
        private=options.private or None,
        replace=options.replace,
        tag=options.tag,
        card=card,
        report=report_writer(folder, options.repo),
    )
    done = f"{len(report.sent)} of {len(report.commits)} branches changed" if report.sent else "nothing had changed"
    say(f"{report.url}: {', '.join(report.commits)} ({done})")
    if report.tags:
        say(f"tags: {', '.join(report.tags)}")
