"""``gisp-hf elastic``: one checkpoint for all levels of a run."""

import argparse
import json

from gisp_hf.cli.common import SOURCE_HELP, add_base_options, run_folder, say
from gisp_hf.levels.elastic import FACTS_FILE
from gisp_hf.recovery.config import RestoreConfig
from gisp_hf.recovery.elastic import FULL, FULL_WEIGHT, FULL_WEIGHT_BESIDE_NORMS
from gisp_hf.recovery.elastic_file import write_elastic

DESCRIPTION = (
    "Write one checkpoint for all levels. A model that is loaded from it switches between levels at run time, without "
    "copies; with --data all levels share output projections that are fitted to serve each of them."
)
EXAMPLE = "gisp-hf elastic runs/quickstart/iterative --data wikitext2:0.5,code.jsonl:0.5 --output elastic"
DEFAULT = RestoreConfig()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FOLDER_OR_REPO", help=SOURCE_HELP)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not exist (required)")
    parser.add_argument(
        "--levels",
        type=float,
        nargs="+",
        metavar="FRACTION",
        help="sparsities to list and to fit for (default: those of the run); any other can be set at run time",
    )
    parser.add_argument(
        "--data",
        metavar="NAME",
        help="calibration text of the shared output projections: a data set, a file, or a mixture such as "
        "wikitext2:0.5,code.jsonl:0.5 (default: the base model's projections stay as they are)",
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", default=DEFAULT.tokens, help=f"of the text (default: {DEFAULT.tokens})"
    )
    parser.add_argument(
        "--full-weight",
        type=float,
        metavar="W",
        help=f"weight of the full width in the fit; each level has 1 (default: {FULL_WEIGHT:g}, and "
        f"{FULL_WEIGHT_BESIDE_NORMS:g} with --norms levels, which repairs the levels)",
    )
    parser.add_argument(
        "--streams",
        choices=("own", "unpruned"),
        default="unpruned",
        help="inputs of the fit: those of the unpruned model, one pass, or of each level by itself (default: unpruned)",
    )
    parser.add_argument(
        "--full-apart",
        action="store_true",
        help="also keep the base model's output projections, for full width; a larger file (default: do not)",
    )
    parser.add_argument(
        "--norms",
        choices=("base", "levels", "all"),
        default="base",
        help="levels: also train the norms of each level on the text, in one pass; all: those of the full width too "
        "(default: all levels have the base model's)",
    )
    parser.add_argument("--seed", type=int, metavar="N", default=DEFAULT.seed, help="of the drawing (default: 0)")
    add_base_options(parser)


def run(options: argparse.Namespace) -> None:
    config = None
    if options.data is not None:
        config = RestoreConfig(data=options.data, tokens=options.tokens, seed=options.seed)
    folder = write_elastic(
        run_folder(options.source),
        options.output,
        levels=options.levels,
        config=config,
        weights=None if options.full_weight is None else {FULL: options.full_weight},
        streams=options.streams,
        full_apart=options.full_apart,
        norms=options.norms,
        base_model=options.base_model,
        base_revision=options.base_revision,
        revision=options.revision,
    )
    say(f"{folder}: load it with AutoModelForCausalLM.from_pretrained, then model.set_sparsity(0.37) or any other")
    if (folder / FACTS_FILE).is_file():
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        for level, (before, after) in facts["errors"].items():
            say(f"{_name(level)}: mean relative error of the projections {before:.3f} -> {after:.3f}")
        for level, trained in facts.get("norms", {}).items():
            say(f"{_name(level)}: norms trained on {trained['tokens']:,} tokens, loss {trained['loss']:.3f}")


def _name(level: str) -> str:
    return "full width" if float(level) == FULL else f"{float(level):.0%}"
