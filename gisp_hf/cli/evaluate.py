"""``gisp-hf eval``: the same measurements on every level."""

import argparse
from pathlib import Path
from typing import Any

from gisp_hf.cli.common import DTYPES, SOURCE_HELP, note, run_folder, say
from gisp_hf.evaluation.levels import evaluate_levels
from gisp_hf.levels.files import check_loads
from gisp_hf.levels.info import read_levels
from gisp_hf.report import format_table

DESCRIPTION = (
    "Measure every level: perplexity, multiple choice, exact match, lm-eval tasks. The numbers of a local run are "
    "kept in the levels' folders (metrics.json), for levels.json and new cards."
)
EXAMPLE = "gisp-hf eval runs/quickstart/iterative --text wikitext2 --window 128 256 --tasks piqa arc_easy"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="REPO_OR_FOLDER", help=SOURCE_HELP)
    parser.add_argument(
        "--text", metavar="FILE", help="text for perplexity: a file, or wikitext2 for its test split (default: none)"
    )
    parser.add_argument(
        "--window", metavar="TOKENS", type=int, nargs="+", default=[128], help="windows of perplexity (default: 128)"
    )
    parser.add_argument(
        "--questions", metavar="FILE", help="JSONL of {prompt, choices, label}: multiple choice (default: none)"
    )
    parser.add_argument(
        "--answers", metavar="FILE", help="JSONL of {prompt, completion}: exact match of final numbers (default: none)"
    )
    parser.add_argument(
        "--tasks", metavar="TASK", nargs="+", default=[], help="lm-eval tasks (extra: eval) (default: none)"
    )
    parser.add_argument("--include-path", metavar="DIR", help="folder with lm-eval tasks of your own (default: none)")
    parser.add_argument("--limit", metavar="N", type=int, help="only so many examples of each (default: all)")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=256, help="of a generated answer (default: 256)"
    )
    parser.add_argument("--batch-size", metavar="N", type=int, default=8, help="sequences at once (default: 8)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as saved)")


def run(options: argparse.Namespace) -> None:
    source = run_folder(options.source)
    for info in read_levels(source):  # before an hour goes into the others
        if Path(source).is_dir():
            check_loads(Path(source) / info.name)
        else:
            check_loads(source, revision=info.name)
    rows: list[dict[str, Any]] = []
    for level, metrics in evaluate_levels(
        source,
        text=options.text,
        windows=options.window,
        questions=options.questions,
        answers=options.answers,
        tasks=options.tasks,
        include_path=options.include_path,
        limit=options.limit,
        max_new_tokens=options.max_new_tokens,
        dtype=DTYPES.get(options.dtype),
        batch_size=options.batch_size,
    ):
        rows.append({"name": level.name, **metrics})
        note(f"{level.name}: {', '.join(f'{name} {_number(value)}' for name, value in metrics.items())}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name) for name in names} for row in rows]
    columns = {"name": "level", **{name: name for name in names[1:]}}
    say(format_table(rows, columns, formats=dict.fromkeys(names[1:], ",.4f")))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
