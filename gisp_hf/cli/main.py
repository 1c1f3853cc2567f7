"""The ``gisp-hf`` command. A subcommand is one file beside this one, and one row in ``COMMANDS``.

Its module has ``DESCRIPTION`` (the first sentence is also the line in the list of commands), ``EXAMPLE``,
``add_options(parser)`` and ``run(options)``.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from huggingface_hub.errors import StrictDataclassError

from gisp_hf.cli import card, elastic, evaluate, export, levels, materialize, push, report, restore
from gisp_hf.cli.common import LOGIN, note
from gisp_hf.hub import PushError
from gisp_hf.version import __version__

COMMANDS: dict[str, ModuleType] = {
    "levels": levels,
    "materialize": materialize,
    "restore": restore,
    "elastic": elastic,
    "push": push,
    "eval": evaluate,
    "card": card,
    "export": export,
    "report": report,
}
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (that of the process if None).

    Returns:
        The exit code: 0; 2 after a mistake of the user's or a file that cannot be used, which one line on stderr
        explains; 130 after Ctrl-C. Anything unexpected is raised, with its traceback.
    """
    try:
        options = build_parser().parse_args(argv)
        options.run(options)
    except KeyboardInterrupt:
        note("gisp-hf: interrupted")
        return INTERRUPTED
    # An HTTP error of the Hub is an OSError; Transformers checks a config by strict data classes. Weights of a file may
    # hold NaN.
    except (_UsageError, ValueError, OSError, PushError, StrictDataclassError, FloatingPointError) as error:
        note(f"gisp-hf: error: {error}")
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gisp-hf",
        description="Levels of models that were pruned with GISP: show them, cut out others, push them to the Hub.",
        epilog=f"`gisp-hf COMMAND --help` explains a command. {LOGIN}",
    )
    parser.add_argument("--version", action="version", version=f"gisp-hf {__version__}", help="show the version")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for name, module in COMMANDS.items():
        description: str = module.DESCRIPTION
        command = commands.add_parser(
            name,
            help=description.split(". ")[0].rstrip("."),
            description=textwrap.fill(description, 79),
            epilog=f"example:\n  {module.EXAMPLE}",  # as it is, so that it can be copied
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_options(command)
        command.set_defaults(run=module.run)
    return parser


class _UsageError(Exception):
    pass


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} (`{self.prog} --help` explains)")


if __name__ == "__main__":
    sys.exit(main())
