"""The ``gisp-hf`` command: looks at the levels of a run, cuts out others, writes cards, and pushes them to the Hub."""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import hf_hub_download

from gisp_hf.config import level_name
from gisp_hf.evaluation.levels import evaluate_levels
from gisp_hf.hub import LevelInfo, PushError, push_levels, read_levels
from gisp_hf.hub.cards import level_card, main_card
from gisp_hf.levels.materialize import materialize
from gisp_hf.pruning.trajectory import Trajectory
from gisp_hf.report.tables import format_table
from gisp_hf.version import __version__

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAIN = "main"
CARD_FILE = "README.md"
LOGIN = "Private and gated repositories, and pushing, need a login: `hf auth login`, or the variable HF_TOKEN."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (that of the process if None).

    Returns:
        The exit code: 0, or 2 after a mistake of the user's, which is told in one line on stderr. Anything unexpected
        is raised, with its traceback.
    """
    try:
        options = _parser().parse_args(argv)
        options.run(options)
    except (_UsageError, ValueError, OSError, PushError) as error:  # an HTTP error of the Hub is an OSError
        print(f"gisp-hf: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


# ---- commands --------------------------------------------------------------------------------------------------------


def _levels(options: argparse.Namespace) -> None:
    levels = read_levels(options.source, revision=options.revision)
    metrics = list(dict.fromkeys(key for level in levels for key in level.metrics))
    rows = [
        {
            "name": level.name,
            "sparsity": level.sparsity,
            "parameters": level.parameters,
            "decoder": level.decoder_parameters,
            **{f"metric {key}": level.metrics.get(key) for key in metrics},
            "commit": level.commit,
        }
        for level in levels
    ]
    columns = {"name": "level", "sparsity": "sparsity", "parameters": "parameters", "decoder": "in decoder layers"}
    columns |= {f"metric {key}": key for key in metrics}
    if any(level.commit for level in levels):
        columns["commit"] = "commit"
    print(format_table(rows, columns, formats={"sparsity": ".4g"}))


def _materialize(options: argparse.Namespace) -> None:
    folder = materialize(
        options.source,
        options.output,
        sparsity=options.sparsity,
        base_model=options.base_model,
        base_revision=options.base_revision,
        revision=options.revision,
        channel_multiple=options.channel_multiple,
        dtype=DTYPES.get(options.dtype),
    )
    reached = Trajectory.load(folder).highest_sparsity()
    print(f"{folder}: {reached:.2%} of the decoder layers' parameters removed")


def _push(options: argparse.Namespace) -> None:
    folder = Path(options.folder)
    card = _writer(
        folder, read_levels(folder), repo_id=options.repo, license=options.license, fetch=True, new=options.new_cards
    )
    report = push_levels(folder, options.repo, private=options.private or None, tag=options.tag, card=card)
    done = f"{len(report.sent)} of {len(report.commits)} branches changed" if report.sent else "nothing had changed"
    print(f"{report.url}: {', '.join(report.commits)} ({done})")
    if report.tags:
        print(f"tags: {', '.join(report.tags)}")


def _eval(options: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for level, metrics in evaluate_levels(
        options.source,
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
        print(f"{level.name}: {', '.join(f'{name} {value:.4f}' for name, value in metrics.items())}", file=sys.stderr)
    names = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name) for name in names} for row in rows]
    print(
        format_table(
            rows, {"name": "level", **{name: name for name in names[1:]}}, formats=dict.fromkeys(names[1:], ",.4f")
        )
    )


def _card(options: argparse.Namespace) -> None:
    folder = Path(options.folder)
    levels = read_levels(folder)
    branch = MAIN if options.level is None else level_name(options.level)
    if branch not in {MAIN, *(level.name for level in levels)}:
        names = ", ".join(f"{level.sparsity:g}" for level in levels)
        raise ValueError(f"{folder} holds no level {options.level:g}; it has {names}")
    repo_id = options.repo or f"user/{folder.resolve().name}"
    print(
        _writer(folder, levels, repo_id=repo_id, license=options.license, fetch=False, new=options.new_cards)(
            branch, levels
        ),
        end="",
    )


def _writer(
    folder: Path, levels: Sequence[LevelInfo], *, repo_id: str, license: str | None, fetch: bool, new: bool
) -> Callable[[str, Sequence[LevelInfo]], str]:
    """What gives each branch its card: the one that lies in its folder, unless a license is asked for, or a new one.

    Args:
        fetch: whether the license of the base model may be looked for on the Hub.
        new: write new cards, whatever lies in the folders.
    """
    trajectory = _trajectory(folder, levels)
    cards = {MAIN: folder / CARD_FILE, **{level.name: folder / level.name / CARD_FILE for level in levels}}
    kept = {branch for branch, path in cards.items() if license is None and not new and path.is_file()}
    if fetch and license is None and len(kept) < len(cards):
        _fetch_base_card(trajectory)
    known: dict[str, Any] = {"repo_id": repo_id, "license": license, "versions": _versions(folder / levels[0].name)}

    def card(branch: str, pushed: Sequence[LevelInfo]) -> str:
        if branch in kept:
            return cards[branch].read_text(encoding="utf-8")
        if branch == MAIN:
            return main_card(trajectory, pushed, **known)
        return level_card(trajectory, next(level for level in levels if level.name == branch), **known)

    return card


def _trajectory(folder: Path, levels: Sequence[LevelInfo]) -> Trajectory:
    """That of the run; of a run that was cut off, that of its last level, which knows all that led to it."""
    try:
        return Trajectory.load(folder)
    except FileNotFoundError:
        return Trajectory.load(folder / levels[-1].name)


def _versions(level_folder: Path) -> dict[str, str]:
    """What a level's own config says that it was saved with."""
    config = json.loads((level_folder / "config.json").read_text(encoding="utf-8"))
    version = config.get("transformers_version")
    return {"transformers": version} if isinstance(version, str) else {}


def _fetch_base_card(trajectory: Trajectory) -> None:
    """Brings the base model's card into the cache, where the license of the new cards is looked for."""
    base = trajectory.base
    try:
        hf_hub_download(base.id, "README.md", revision=base.revision)
    except (OSError, ValueError):  # a folder, or a model that is gone: a push must not fail for its license
        print(f"the license of {base.id} was not found: the cards name none; --license gives one", file=sys.stderr)


# ---- options ---------------------------------------------------------------------------------------------------------


class _UsageError(Exception):
    pass


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} (`{self.prog} --help` explains)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gisp-hf",
        description="Levels of models that were pruned with GISP: show them, cut out others, push them to the Hub.",
        epilog=f"`gisp-hf COMMAND --help` explains a command. {LOGIN}",
    )
    parser.add_argument("--version", action="version", version=f"gisp-hf {__version__}", help="show the version")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    source_help = "the output folder of a pruning run, or a repository on the Hub (user/name)"
    revision_help = "branch, tag or commit of the repository (default: main; of no effect on a folder)"
    folder_help = "the output folder of a pruning run: sparsity-* folders and the trajectory"
    license_help = (
        "license of the pruned model, as the Hub writes it: apache-2.0, mit, llama3.1 ... (default: that of the base "
        "model, if its card is {where}; else the cards name none). A README.md in the folder of the run or of a level "
        "is the card of main or of that level, unless this option is given"
    )
    new_cards_help = (
        "write new cards, with what was measured since, in place of those in the folders (default: keep them)"
    )

    levels = _command(
        commands,
        "levels",
        _levels,
        "Show the levels of a run or repository, the mildest first.",
        example="gisp-hf levels me/SmolLM2-135M-gisp",
    )
    levels.add_argument("source", metavar="REPO_OR_FOLDER", help=source_help)
    levels.add_argument("--revision", metavar="NAME", help=revision_help)

    cut = _command(
        commands,
        "materialize",
        _materialize,
        "Cut any level out of the base model, also one that was never saved, and write it as an ordinary checkpoint. "
        "Needs the small trajectory and the weights of the base model, and the memory of the pruned model only.",
        example="gisp-hf materialize me/SmolLM2-135M-gisp --sparsity 0.37 --output SmolLM2-135M-0.37",
    )
    cut.add_argument("source", metavar="SOURCE", help=source_help)
    cut.add_argument(
        "--sparsity",
        type=float,
        required=True,
        metavar="FRACTION",
        help="share of the decoder layers' parameters to leave out, between 0 and 1 (required)",
    )
    cut.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not exist (required)")
    cut.add_argument(
        "--base-model",
        metavar="ID_OR_FOLDER",
        help="the unpruned model, on the Hub or in a folder, with safetensors (default: the one the trajectory names)",
    )
    cut.add_argument(
        "--base-revision",
        metavar="NAME",
        help="branch, tag or commit of the base model (default: the one the trajectory names)",
    )
    cut.add_argument("--revision", metavar="NAME", help=revision_help)
    cut.add_argument(
        "--channel-multiple",
        type=int,
        metavar="N",
        help="round the MLP channels kept per layer up to a multiple of this; 64 or 128 suits GPUs (default: as in the "
        "run)",
    )
    cut.add_argument("--dtype", choices=DTYPES, help="of the weights (default: that of the base model's checkpoint)")

    push = _command(
        commands,
        "push",
        _push,
        "Push every level of a run as a branch of one repository, with a card each, and what they have in common as "
        "main. What is there already is not sent again, so a push that was cut off is finished by another. " + LOGIN,
        example="gisp-hf push runs/quickstart --repo me/SmolLM2-135M-gisp --tag v1 --license apache-2.0",
    )
    push.add_argument("folder", metavar="FOLDER", help=folder_help)
    push.add_argument("--repo", required=True, metavar="USER/NAME", help="repository; made if need be (required)")
    push.add_argument(
        "--private",
        action="store_true",
        help="make a new repository private, and refuse one that is public (default: as your account has it)",
    )
    push.add_argument(
        "--tag", metavar="NAME", help="tag the result: v1 for main, v1-sparsity-0.20 ... for levels (default: no tag)"
    )
    push.add_argument("--license", metavar="ID", help=license_help.format(where="on the Hub"))
    push.add_argument("--new-cards", action="store_true", help=new_cards_help)

    evaluation = _command(
        commands,
        "eval",
        _eval,
        "Measure every level: perplexity, multiple choice, exact match, lm-eval tasks. The numbers of a local run are "
        "kept in the levels' folders (metrics.json), for levels.json and new cards.",
        example="gisp-hf eval runs/quickstart/iterative --text wikitext2 --window 128 256 --tasks piqa arc_easy",
    )
    evaluation.add_argument("source", metavar="REPO_OR_FOLDER", help=source_help)
    evaluation.add_argument(
        "--text", metavar="FILE", help="text for perplexity: a file, or wikitext2 for its test split (default: none)"
    )
    evaluation.add_argument(
        "--window", metavar="TOKENS", type=int, nargs="+", default=[128], help="windows of perplexity (default: 128)"
    )
    evaluation.add_argument(
        "--questions", metavar="FILE", help="JSONL of {prompt, choices, label}: multiple choice (default: none)"
    )
    evaluation.add_argument(
        "--answers", metavar="FILE", help="JSONL of {prompt, completion}: exact match of final numbers (default: none)"
    )
    evaluation.add_argument(
        "--tasks", metavar="TASK", nargs="+", default=[], help="lm-eval tasks (extra: eval) (default: none)"
    )
    evaluation.add_argument(
        "--include-path", metavar="DIR", help="folder with lm-eval tasks of your own (default: none)"
    )
    evaluation.add_argument("--limit", metavar="N", type=int, help="only so many examples of each (default: all)")
    evaluation.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=256, help="of a generated answer (default: 256)"
    )
    evaluation.add_argument("--batch-size", metavar="N", type=int, default=8, help="sequences at once (default: 8)")
    evaluation.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as saved)")

    card = _command(
        commands,
        "card",
        _card,
        "Print the card that a push would give to main or, with --level, to a level. Needs no network.",
        example="gisp-hf card runs/quickstart --level 0.2 --repo me/SmolLM2-135M-gisp",
    )
    card.add_argument("folder", metavar="FOLDER", help=folder_help)
    card.add_argument("--level", type=float, metavar="FRACTION", help="sparsity of the level (default: main's card)")
    card.add_argument("--repo", metavar="USER/NAME", help="repository that the card speaks of (default: user/FOLDER)")
    card.add_argument("--license", metavar="ID", help=license_help.format(where="in the cache"))
    card.add_argument("--new-cards", action="store_true", help=new_cards_help)
    return parser


def _command(commands: Any, name: str, run: Any, description: str, *, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=description.split(". ")[0].rstrip("."),
        description=textwrap.fill(description, 79),
        epilog=f"example:\n  {example}",  # as it is, so that it can be copied
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
