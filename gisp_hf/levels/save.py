"""Saves a level as an ordinary Transformers checkpoint, atomically."""

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from gisp_hf.atomic import replace_folder, unique_beside
from gisp_hf.levels.manifest import write_manifest
from gisp_hf.models.layout import Rows
from gisp_hf.models.shards import whole
from gisp_hf.models.surgery import pruned_shell, slice_tensor
from gisp_hf.pruning.trajectory import Trajectory

# Files and folders of a run that was killed while it wrote them (`unique_beside`).
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


def save_level(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    trajectory: Trajectory,
    sliced: bool,
    tokenizer: PreTrainedTokenizerBase | None = None,
    use_cache: bool | None = None,
    main_process: bool = True,
    replace: bool = False,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Writes the pruned model with everything that ``from_pretrained`` needs, remote code and removal order included.

    The files are written to a new folder of a unique name beside ``folder``, which then takes its name, so that
    ``folder`` either loads or does not exist. Weights are sliced, gathered from their shards if they are sharded, and
    written one file at a time, so that besides the model itself no more than ``max_shard_size`` is held.

    Args:
        model: the model in the middle of a run; it is only read.
        trajectory: the removal order up to this level, and no further.
        sliced: whether the model has lost the removed structures already; if not, they are left out of the files.
        use_cache: for the saved config, since the Trainer changes that of the model it trains.
        main_process: whether this process writes. With sharded weights every process must call this, to give its part.
        replace: write anew what exists (a run that goes on after a crash); otherwise ``folder`` must not exist.

    Raises:
        FileExistsError: if ``folder`` exists.
        OSError: if it cannot be written, with the space that it needs; nothing of it is left.
    """
    folder = Path(folder)
    layout, kept = trajectory.layout, trajectory.kept_at(len(trajectory))
    shell = pruned_shell(model, layout, [len(keep) for keep in kept])
    if use_cache is not None:
        shell.config.use_cache = use_cache
    temporary = unique_beside(folder)
    if main_process:
        if folder.exists() and not replace:
            raise FileExistsError(f"{folder} exists already; remove it or choose another output folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        temporary.mkdir()
    try:
        _write_weights(
            model,
            temporary,
            shell=shell,
            cuts={} if sliced else layout.rows_kept(kept),
            renamed={} if sliced else layout.renamed(kept),
            main_process=main_process,
            max_shard_size=max_shard_size,
        )
        if main_process:
            _write_rest(model, temporary, shell=shell, tokenizer=tokenizer)
            trajectory.save(temporary)
            write_manifest(temporary)
            replace_folder(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)  # first: it takes the room that the message speaks of
        raise _no_room(folder, shell, dtype=model.dtype, error=error) from error
    except BaseException:  # Ctrl-C too: nothing half-written stays behind
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _remove_unfinished(folder: Path) -> None:
    """Removes what a killed run left of this level: folders of the names that only `unique_beside` gives."""
    for path in folder.parent.iterdir():
        ours = _UNFINISHED.fullmatch(path.name) and path.name.startswith(f".{folder.name}.")
        if ours and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def _no_room(folder: Path, shell: PreTrainedModel, *, dtype: torch.dtype, error: Exception) -> OSError:
    """The error of a level that could not be written. safetensors has one of its own for a full disk."""
    needed = sum(parameter.numel() for parameter in shell.parameters()) * dtype.itemsize
    free = shutil.disk_usage(folder.parent).free
    return OSError(
        f"the level {folder} could not be written: {error}. It needs about {needed / 1e6:,.1f} MB, and "
        f"{free / 1e6:,.1f} MB are free there. Make room; then train(resume_from_checkpoint=True) goes on, if the run "
        "saves checkpoints (save_strategy='steps'), and else begin anew in another folder. Levels saved before are "
        "whole"
    )


def _write_weights(
    model: PreTrainedModel,
    folder: Path,
    *,
    shell: PreTrainedModel,
    cuts: Rows,
    renamed: Mapping[str, str | None],
    main_process: bool,
    max_shard_size: str | int,
) -> None:
    """Safetensors files of the pruned size, in the layout of ``save_pretrained``, written one after the other."""
    state_dict = model.state_dict()
    sources = {new: old for old, new in renamed.items() if new is not None}  # name in the files -> in the model
    # The shell has no storage: it says how the files are to be split before a single weight is read. In a tied model
    # the LM head is the embedding, and is written once.
    tied = set(shell.all_tied_weights_keys)
    planned = {
        name: torch.empty(tensor.shape, dtype=state_dict[sources.get(name, name)].dtype, device="meta")
        for name, tensor in shell.state_dict().items()
        if name not in tied
    }
    split = split_torch_state_dict_into_shards(planned, max_shard_size=max_shard_size)
    for filename, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            source = sources.get(name, name)
            tensor = whole(state_dict[source])
            if main_process:
                tensor = slice_tensor(tensor, cuts.get(source, ()))
                assert tensor.shape == planned[name].shape, name
                tensors[name] = tensor.detach().cpu().contiguous()
        if main_process:
            save_file(tensors, folder / filename, metadata={"format": "pt"})
    if main_process:  # of a single file too: without an index, vLLM takes trajectory.safetensors for weights
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_rest(
    model: PreTrainedModel, folder: Path, *, shell: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    shell.config.dtype = model.dtype
    shell.config.architectures = [type(shell).__name__]
    if type(shell).is_remote_code():  # not of a family from outside that travels without its code
        custom_object_save(shell, folder, config=shell.config)  # type: ignore[arg-type]
    shell.config.save_pretrained(folder)
    if shell.generation_config is not None:
        shell.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def check_output_folder(folder: str | Path, *, may_hold_others: bool) -> None:
    """Makes sure, before any work is done, that levels can be written to ``folder``; a new one is removed again.

    Args:
        may_hold_others: whether files that pruning does not write may lie there (the Trainer's own output folder).

    Raises:
        FileExistsError: if it holds an earlier run, or anything at all where nothing else should.
        OSError: if it cannot be written to.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = unique_beside(folder / "write-test")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise type(error)(f"cannot write to the output folder {folder}: {error.strerror}; choose another") from error
    if made:  # a run that is refused after this leaves nothing behind
        with suppress(OSError):  # another program has put something into it
            for path in made:
                path.rmdir()
        return
    names = sorted(path.name for path in folder.iterdir())
    ours = [name for name in names if name.startswith(("sparsity-", "trajectory."))]
    in_the_way = ours if may_hold_others else names
    in_the_way = [name for name in in_the_way if not _UNFINISHED.fullmatch(name)]
    if in_the_way:
        raise FileExistsError(
            f"the output folder {folder} is not empty ({len(in_the_way)} entries: {', '.join(in_the_way[:3])}...); "
            "remove what is there or choose another folder"
        )
