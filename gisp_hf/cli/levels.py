"""``gisp-hf levels``: a table of the levels of a run or repository."""

import argparse

from gisp_hf.cli.common import REVISION_HELP, SOURCE_HELP, run_folder, say
from gisp_hf.levels.info import read_levels
from gisp_hf.report import format_table

DESCRIPTION = "Show the levels of a run or repository, the mildest first."
EXAMPLE = "gisp-hf levels me/SmolLM2-135M-Instruct-gisp"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="REPO_OR_FOLDER", help=SOURCE_HELP)
    parser.add_argument("--revision", metavar="NAME", help=REVISION_HELP)


def run(options: argparse.Namespace) -> None:
    levels = read_levels(run_folder(options.source), revision=options.revision)
    metrics = list(dict.fromkeys(key for level in levels for key in level.metrics))
    rows = [
        {
            "name": level.name,
            "sparsity": level.sparsity,
            "parameters": level.parameters,
            "decoder": level.decoder_parameters,
            "restored": "yes" if level.restored else "no",
            "recovered": "yes" if level.recovered else "no",
            **{f"metric {key}": level.metrics.get(key) for key in metrics},
            "commit": level.commit,
        }
        for level in levels
    ]
    columns = {"name": "level", "sparsity": "sparsity", "parameters": "parameters", "decoder": "in decoder layers"}
    columns |= {key: key for key in ("restored", "recovered") if any(getattr(level, key) for level in levels)}
    columns |= {f"metric {key}": key for key in metrics}
    if any(level.commit for level in levels):
        columns["commit"] = "commit"
    say(format_table(rows, columns, formats={"sparsity": ".4g"}))
