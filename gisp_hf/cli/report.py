"""``gisp-hf report``: one HTML page about the levels of a run."""

import argparse
from pathlib import Path

from gisp_hf.atomic import write_text_atomic
from gisp_hf.cli.common import REVISION_HELP, SOURCE_HELP, note, run_folder, say
from gisp_hf.levels.info import read_levels
from gisp_hf.levels.materialize import load_trajectory
from gisp_hf.pruning.trajectory import Trajectory
from gisp_hf.report.html import REPORT_FILE, report_page
from gisp_hf.report.samples import SAMPLES_FILE, generate_samples, write_samples

DESCRIPTION = (
    "Write one HTML page about a run: curves, what each layer lost, sizes, the same prompt at every level, and the "
    "commands that load a level. The page loads nothing from elsewhere. A push writes the same page beside the card."
)
EXAMPLE = "gisp-hf report runs/quickstart --output report.html --prompt 'The history of the city begins in'"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FOLDER_OR_REPO", help=SOURCE_HELP)
    parser.add_argument(
        "--output", metavar="FILE", default=REPORT_FILE, help=f"page to write; replaced (default: {REPORT_FILE})"
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        nargs="+",
        default=[],
        help="load every level and show its answers to these prompts; of a folder they are kept in its "
        f"{SAMPLES_FILE}, for later reports and pushes (default: only answers that are there already)",
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=48, help="of an answer to --prompt (default: 48)"
    )
    parser.add_argument(
        "--base-model",
        metavar="NAME",
        help="unpruned model, a folder or a Hub id, that answers --prompt too (default: it does not)",
    )
    parser.add_argument("--revision", metavar="NAME", help=REVISION_HELP)


def run(options: argparse.Namespace) -> None:
    source = run_folder(options.source)
    folder = Path(source) if Path(source).is_dir() else None
    output = Path(options.output)
    if not output.parent.is_dir():  # before levels are loaded
        raise ValueError(f"there is no folder {output.parent} for {output}; make it, or give another --output")
    if options.base_model and not options.prompt:
        raise ValueError("--base-model answers prompts: give --prompt as well, or leave it out")
    levels = read_levels(source, revision=options.revision)
    trajectory = (
        load_trajectory(source, revision=options.revision) if folder is None else _trajectory(folder, levels[-1].name)
    )
    samples = None
    if options.prompt:
        note(f"{len(levels)} levels answer {len(options.prompt)} prompt{'s' if len(options.prompt) > 1 else ''}")
        samples = generate_samples(
            source, levels, options.prompt, base_model=options.base_model, max_new_tokens=options.max_new_tokens
        )
        if folder is not None:
            write_samples(folder, samples)
    page = report_page(trajectory, levels, source=source if folder is None else folder, folder=folder, samples=samples)
    write_text_atomic(output, page)
    say(f"{output}: {len(levels)} levels, {len(page.encode()) / 1e3:,.0f} kB")


def _trajectory(folder: Path, last: str) -> Trajectory:
    """That of the run; of a run that was cut off, that of its last level."""
    try:
        return Trajectory.load(folder)
    except FileNotFoundError:
        return Trajectory.load(folder / last)
