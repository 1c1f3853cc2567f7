"""``gisp-hf materialize``: any level, cut out of the base model and written as a checkpoint."""

import argparse

from gisp_hf.cli.common import DTYPES, SOURCE_HELP, add_base_options, run_folder, say
from gisp_hf.levels.materialize import materialize
from gisp_hf.pruning.trajectory import Trajectory

DESCRIPTION = (
    "Cut any level out of the base model, also one that was never saved, and write it as an ordinary checkpoint. "
    "Needs the small trajectory and the weights of the base model, and the memory of the pruned model only."
)
EXAMPLE = "gisp-hf materialize me/SmolLM2-135M-Instruct-gisp --sparsity 0.37 --output SmolLM2-135M-Instruct-0.37"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument(
        "--sparsity",
        type=float,
        required=True,
        metavar="FRACTION",
        help="share of the decoder layers' parameters to leave out, between 0 and 1 (required)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not exist (required)")
    add_base_options(parser)
    parser.add_argument(
        "--channel-multiple",
        type=int,
        metavar="N",
        help="round the MLP channels kept per layer up to a multiple of this; 64 or 128 suits GPUs (default: as in the "
        "run)",
    )
    parser.add_argument(
        "--group-multiple",
        type=int,
        metavar="N",
        help="round the key/value groups kept per layer up to a multiple of this, such as the number of devices of "
        "tensor parallelism (default: as in the run)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: that of the base model's checkpoint)")


def run(options: argparse.Namespace) -> None:
    folder = materialize(
        run_folder(options.source),
        options.output,
        sparsity=options.sparsity,
        base_model=options.base_model,
        base_revision=options.base_revision,
        revision=options.revision,
        channel_multiple=options.channel_multiple,
        group_multiple=options.group_multiple,
        dtype=DTYPES.get(options.dtype),
    )
    reached = Trajectory.load(folder).highest_sparsity()
    say(f"{folder}: {reached:.2%} of the decoder layers' parameters removed")
