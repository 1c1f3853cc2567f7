"""A level <-> a folder: an ordinary Transformers checkpoint, written whole or not at all."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from gisp_hf.models.layout import Layout, Member
from gisp_hf.models.shards import whole
from gisp_hf.models.surgery import pruned_shell, slice_tensor
from gisp_hf.pruning.trajectory import Trajectory

TEMPORARY = ".tmp"  # ends the name of a folder that is still being written


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

    The files are written to ``<folder>.tmp``, which is then renamed, so that ``folder`` either loads or does not exist.
    Weights are sliced, gathered from their shards if they are sharded, and written one file at a time, so that besides
    the model itself no more than ``max_shard_size`` is held.

    Args:
        model: the model in the middle of a run; it is only read.
        trajectory: the removal order up to this level, and no further.
        sliced: whether the model has lost what is removed already; if not, it is left out of what is written.
        use_cache: for the saved config, since the Trainer changes that of the model it trains.
        main_process: whether this process writes. With sharded weights every process must call this, to give its part.
        replace: write anew what exists (a run that goes on after a crash); otherwise ``folder`` must not exist.

    Raises:
        FileExistsError: if ``folder`` exists.
    """
    folder = Path(folder)
    temporary = folder.with_name(folder.name + TEMPORARY)
    layout, kept = trajectory.layout, trajectory.kept_at(len(trajectory))
    shell = pruned_shell(model, layout, [len(keep) for keep in kept])
    if use_cache is not None:
        shell.config.use_cache = use_cache
    if main_process:
        if folder.exists() and not replace:
            raise FileExistsError(f"{folder} exists already; remove it or choose another output folder")
        if temporary.exists():  # from a run that was killed while it wrote
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
    try:
        cuts = {} if sliced else _cuts(layout, kept)
        _write_weights(
            model, temporary, shell=shell, cuts=cuts, main_process=main_process, max_shard_size=max_shard_size
        )
        if main_process:
            shell.config.dtype = model.dtype
            shell.config.architectures = [type(shell).__name__]
            custom_object_save(shell, temporary, config=shell.config)  # type: ignore[arg-type]
            shell.config.save_pretrained(temporary)
            if shell.generation_config is not None:
                shell.generation_config.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            trajectory.save(temporary)
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
    except BaseException:  # Ctrl-C too: nothing half-written stays behind
        if main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _cuts(layout: Layout, kept: Sequence[torch.Tensor]) -> dict[str, tuple[Member, torch.Tensor]]:
    """For every parameter that loses something: how it is shared out, and the structures that it keeps."""
    return {
        member.parameter: (member, keep)
        for block, keep in zip(layout.blocks, kept)
        if len(keep) < block.size
        for member in block.members
    }


def _write_weights(
    model: PreTrainedModel,
    folder: Path,
    *,
    shell: PreTrainedModel,
    cuts: Mapping[str, tuple[Member, torch.Tensor]],
    main_process: bool,
    max_shard_size: str | int,
) -> None:
    """Safetensors files of the pruned size, in the layout of ``save_pretrained``, written one after the other."""
    state_dict = model.state_dict()
    # The shell has no storage: it says how the files are to be split before a single weight is read. In a tied model
    # the LM head is the embedding, and is written once.
    tied = set(shell.all_tied_weights_keys)
    planned = {
        name: torch.empty(tensor.shape, dtype=state_dict[name].dtype, device="meta")
        for name, tensor in shell.state_dict().items()
        if name not in tied
    }
    split = split_torch_state_dict_into_shards(planned, max_shard_size=max_shard_size)
    for filename, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensor = whole(state_dict[name])
            if main_process:
                if name in cuts:
                    member, keep = cuts[name]
                    tensor = slice_tensor(tensor, member.dim, keep, member.width)
                assert tensor.shape == planned[name].shape, name
                tensors[name] = tensor.detach().cpu().contiguous()
        if main_process:
            save_file(tensors, folder / filename, metadata={"format": "pt"})
    if main_process and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


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
