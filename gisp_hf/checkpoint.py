"""A level <-> a folder: an ordinary Transformers checkpoint, written whole or not at all."""

import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gisp_hf.surgery import pruned_shell, slice_state_dict
from gisp_hf.trajectory import Trajectory

TEMPORARY = ".tmp"  # ends the name of a folder that is still being written


def save_level(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    trajectory: Trajectory,
    sliced: bool,
    tokenizer: PreTrainedTokenizerBase | None = None,
    use_cache: bool | None = None,
) -> Path:
    """Writes the pruned model with everything that ``from_pretrained`` needs, remote code and removal order included.

    The files are written to ``<folder>.tmp``, which is then renamed, so that ``folder`` either loads or does not exist.

    Args:
        model: the model in the middle of a run; it is only read.
        folder: must not exist.
        trajectory: the removal order up to this level, and no further.
        sliced: whether the model has lost what is removed already; if not, it is left out of what is written.
        use_cache: for the saved config, since the Trainer changes that of the model it trains.

    Raises:
        FileExistsError: if ``folder`` exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it or choose another output folder")
    temporary = folder.with_name(folder.name + TEMPORARY)
    if temporary.exists():  # from a run that was killed while it wrote
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        layout, kept = trajectory.layout, trajectory.kept_at(len(trajectory))
        state_dict = model.state_dict()
        if not sliced:
            state_dict = slice_state_dict(state_dict, layout, kept)
        shell = pruned_shell(model, layout, [len(keep) for keep in kept])
        shell.load_state_dict(state_dict, assign=True)
        if use_cache is not None:
            shell.config.use_cache = use_cache
        shell.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        trajectory.save(temporary)
        temporary.rename(folder)
    except BaseException:  # Ctrl-C too: nothing half-written stays behind
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def check_output_folder(folder: str | Path, *, may_hold_others: bool) -> None:
    """Makes sure, before any work is done, that levels can be written to ``folder``.

    Args:
        may_hold_others: whether files that pruning does not write may lie there (the Trainer's own output folder).

    Raises:
        FileExistsError: if it holds an earlier run, or anything at all where nothing else should.
        OSError: if it cannot be written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"write-test{TEMPORARY}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise type(error)(f"cannot write to the output folder {folder}: {error.strerror}; choose another") from error
    names = sorted(path.name for path in folder.iterdir())
    ours = [name for name in names if name.startswith(("sparsity-", "trajectory."))]
    in_the_way = ours if may_hold_others else names
    in_the_way = [name for name in in_the_way if not name.endswith(TEMPORARY)]
    if in_the_way:
        raise FileExistsError(
            f"the output folder {folder} is not empty ({len(in_the_way)} entries: {', '.join(in_the_way[:3])}...); "
            "remove what is there or choose another folder"
        )
