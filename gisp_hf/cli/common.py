"""Shared by the subcommands: finding a run, printing, and common help texts."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gisp_hf.levels.info import find_run
from gisp_hf.untrusted import printable, printable_lines

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

LOGIN = "Private and gated repositories, and pushing, need a login: `hf auth login`, or the variable HF_TOKEN."
SOURCE_HELP = "the output folder of a pruning run, or a repository on the Hub (user/name)"
FOLDER_HELP = "the output folder of a pruning run: sparsity-* folders and the trajectory"
REVISION_HELP = "branch, tag or commit of the repository (default: main; of no effect on a folder)"
NEW_CARDS_HELP = "write new cards, with what was measured since, in place of those in the folders (default: keep them)"
LICENSE_HELP = (
    "license of the pruned model, as the Hub writes it: apache-2.0, mit, llama3.1 ... (default: that of the base "
    "model, if its card is {where}; else the cards name none). A README.md in the folder of the run or of a level "
    "is the card of main or of that level, unless this option is given"
)


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """The options that name the unpruned model, and the revision of the run's repository."""
    parser.add_argument(
        "--base-model",
        metavar="ID_OR_FOLDER",
        help="the unpruned model, on the Hub or in a folder, with safetensors (default: the one the trajectory names)",
    )
    parser.add_argument(
        "--base-revision",
        metavar="NAME",
        help="branch, tag or commit of the base model (default: the one the trajectory names)",
    )
    parser.add_argument("--revision", metavar="NAME", help=REVISION_HELP)


def say(text: str, *, end: str = "\n") -> None:
    """Prints a result to stdout, without anything that could steer a terminal."""
    print(printable_lines(text), end=end)


def note(text: object) -> None:
    """Prints one line about the work to stderr."""
    print(printable(text), file=sys.stderr)


@contextmanager
def missing_package() -> Iterator[None]:
    """Turns the ImportError of an extra that is not installed into an error of one line."""
    try:
        yield
    except ImportError as error:
        raise ValueError(str(error)) from error


def run_folder(source: str) -> str:
    """The folder that holds the levels, if ``source`` only holds that folder; a repository stays as it is.

    Raises:
        ValueError: if several folders in it hold levels.
    """
    found = str(find_run(source))
    if found != source.rstrip("/"):
        note(f"using {found}")
        return found
    return source
