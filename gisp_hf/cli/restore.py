"""``gisp-hf restore``: a level whose output projections are fitted anew in closed form."""

import argparse

from gisp_hf.cli.common import SOURCE_HELP, add_base_options, run_folder, say
from gisp_hf.recovery.config import RestoreConfig
from gisp_hf.recovery.folder import restore_level
from gisp_hf.recovery.record import Restoration
from gisp_hf.report.plots import plot_errors

DESCRIPTION = (
    "Restore a level, saved or not: fit its output projections anew in closed form. Reads the base model layer by "
    "layer; the errors before and after are written to restoration.json."
)
EXAMPLE = (
    "gisp-hf restore runs/quickstart/iterative --sparsity 0.5 --data wikitext2:0.5,code.jsonl:0.5 --output restored-0.5"
)
DEFAULT = RestoreConfig()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FOLDER_OR_REPO", help=SOURCE_HELP)
    parser.add_argument(
        "--sparsity",
        type=float,
        required=True,
        metavar="FRACTION",
        help="share of the decoder layers' parameters that the level leaves out, between 0 and 1 (required)",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="NAME",
        help="calibration text: a data set, a file, or a mixture such as wikitext2:0.5,code.jsonl:0.5 (required)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not exist (required)")
    parser.add_argument(
        "--tokens", type=int, metavar="N", default=DEFAULT.tokens, help=f"of the text (default: {DEFAULT.tokens})"
    )
    parser.add_argument(
        "--positions",
        choices=("all", "answers"),
        default=DEFAULT.positions,
        help="tokens that count: all, or those of answers, of data with answers (default: all)",
    )
    parser.add_argument(
        "--blend",
        type=float,
        metavar="FRACTION",
        help="target: 0 the unpruned projection's output, 1 the unpruned model's stream (default: 0.5)",
    )
    parser.add_argument(
        "--ridge",
        type=float,
        nargs="+",
        metavar="LAMBDA",
        default=list(DEFAULT.ridge),
        help="strength of the ridge; of several, each projection takes the best on held-out tokens (default: "
        f"{' '.join(f'{value:g}' for value in DEFAULT.ridge)})",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        default=DEFAULT.batch_size,
        help=f"sequences at once (default: {DEFAULT.batch_size})",
    )
    parser.add_argument("--seed", type=int, metavar="N", default=DEFAULT.seed, help="of the drawing (default: 0)")
    parser.add_argument(
        "--spill", action="store_true", help="keep hidden states in temporary files (default: in host memory)"
    )
    parser.add_argument("--device", metavar="NAME", help="where layers run: cuda, cpu ... (default: a GPU if there is)")
    add_base_options(parser)
    parser.add_argument("--plot", metavar="FILE", help="picture of the error per layer, png or svg (default: none)")


def run(options: argparse.Namespace) -> None:
    config = RestoreConfig(
        data=options.data,
        tokens=options.tokens,
        positions=options.positions,
        blend=options.blend,
        ridge=tuple(options.ridge),
        batch_size=options.batch_size,
        seed=options.seed,
        spill=options.spill,
    )
    folder = restore_level(
        run_folder(options.source),
        options.output,
        sparsity=options.sparsity,
        config=config,
        base_model=options.base_model,
        base_revision=options.base_revision,
        revision=options.revision,
        device=options.device,
    )
    record = Restoration.load(folder)
    before, after = (sum(getattr(e, key) for e in record.errors) / len(record.errors) for key in ("before", "after"))
    if options.plot:
        plot_errors([vars(error) for error in record.errors], options.plot)
    say(
        f"{folder}: {record.sparsity:.2%} of the decoder layers' parameters removed, restored on {record.tokens:,} "
        f"tokens; mean relative error of the projections {before:.3f} -> {after:.3f}"
    )
