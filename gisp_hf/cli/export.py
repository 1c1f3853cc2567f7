"""``gisp-hf export``: a level in the format of another program."""

import argparse

from gisp_hf.cli.common import missing_package, note, say
from gisp_hf.export.gguf import FILE_TYPES, export_gguf

DESCRIPTION = (
    "Write a level as a GGUF file for llama.cpp, Ollama and LM Studio. The file has the sizes of each layer, the "
    "tokenizer and the chat template; llama-quantize makes smaller ones from it. Needs the package gguf: pip install "
    "'gisp_hf[export]'."
)
EXAMPLE = "gisp-hf export runs/quickstart/iterative/sparsity-0.20 --gguf SmolLM2-135M-0.20.gguf"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="LEVEL", help="the folder of a level, or a repository on the Hub (user/name)")
    parser.add_argument("--gguf", required=True, metavar="OUT.gguf", help="file to write; must not exist (required)")
    parser.add_argument("--type", choices=FILE_TYPES, default="f16", help="of the matrices (default: f16)")
    parser.add_argument(
        "--pad",
        action="store_true",
        help="write zeros for removed structures, for models that llama.cpp holds only with one size for all layers; "
        "such a file opens everywhere, and is neither smaller nor faster (default: the size of each layer as it is)",
    )
    parser.add_argument(
        "--revision",
        metavar="NAME",
        help="branch of the level, such as sparsity-0.20 (default: main; of no effect on a folder)",
    )


def run(options: argparse.Namespace) -> None:
    with missing_package():
        report = export_gguf(
            options.source, options.gguf, file_type=options.type, pad=options.pad, revision=options.revision
        )
    for text in report.notes:
        note(f"note: {text}")
    say(f"{report.path}: {report.size / 1e6:,.1f} MB, llama.cpp's {report.architecture}, {options.type}")
