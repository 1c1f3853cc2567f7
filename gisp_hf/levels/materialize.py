"""Any level of a trajectory, cut directly out of the files of the unpruned model.

The dense model is never in memory: its checkpoint is read one tensor at a time, and what a level lacks is dropped
before the next is read. The same single pass makes sure that these are the weights the trajectory was made from.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as progress_bars

from gisp_hf.levels.files import (
    GENERATION_FILE,
    TOKENIZER_FILES,
    Files,
    empty_model,
    load_tokenizer,
    pin,
    read_model_config,
)
from gisp_hf.levels.save import save_level
from gisp_hf.levels.weights import names_by_file
from gisp_hf.models.fingerprint import combine_checksums, tensor_checksum
from gisp_hf.models.surgery import pruned_shell, slice_tensor
from gisp_hf.pruning.trajectory import FACTS_FILE, ORDER_FILE, Trajectory, warn_if_compensated
from gisp_hf.recovery.config import RestoreConfig
from gisp_hf.recovery.record import RESTORATION_FILE
from gisp_hf.recovery.restore import draw
from gisp_hf.recovery.restore import restore as restore_model
from gisp_hf.untrusted import odd_contents

logger = logging.getLogger(__name__)

Cut = Sequence[tuple[int, torch.Tensor]]  # of one parameter: dimensions, and the indices along them that stay


def load_trajectory(
    repo_or_folder: str | Path, *, revision: str | None = None, token: str | None = None, endpoint: str | None = None
) -> Trajectory:
    """The removal order of a run: from its output folder, or from the repository its levels were pushed to.

    Args:
        revision: a branch, tag or commit of the repository; ``main`` if None, which holds the whole order.

    Raises:
        FileNotFoundError: if there is no such folder or repository, or no trajectory in it.
        ValueError: if the repository has no such revision, or the trajectory is damaged.
    """
    files, first = pin(Files(repo_or_folder, revision, token, endpoint), FACTS_FILE)
    if first is None or files.fetch(ORDER_FILE) is None:
        raise FileNotFoundError(
            f"{repo_or_folder} holds no {FACTS_FILE} and {ORDER_FILE}; give the output folder of a pruning run, or a "
            "repository that such a folder was pushed to"
        )
    return Trajectory.load(first.parent)


def load_level(
    repo_or_folder: str | Path,
    *,
    sparsity: float,
    base_model: str | Path | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    channel_multiple: int | None = None,
    group_multiple: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    restore: RestoreConfig | None = None,
) -> PreTrainedModel:
    """Any level of a trajectory, saved or not, from the trajectory and the unpruned model's own checkpoint.

    Peak memory is that of the pruned model and one tensor of the unpruned one. No level has to be downloaded, nor the
    dense model to be loaded; no remote code is run.

    Args:
        repo_or_folder: where the trajectory is: the output folder of a run, or a repository on the Hub.
        sparsity: a fraction of the decoder layers' parameters, in (0, the end of the trajectory].
        base_model: the unpruned model, a Hub id or a folder with safetensors; the one the trajectory names if None.
        base_revision: the revision of that model; the one the trajectory names if ``base_model`` is its model.
        revision: a branch, tag or commit of the trajectory's repository; ``main`` if None.
        channel_multiple: channels kept per layer are rounded up to a multiple of this; by default as in the run.
        group_multiple: the same of key/value groups; it must divide those of the unpruned model.
        dtype: of the weights; as ``from_pretrained`` would choose for the unpruned model if None.
        device: where the model goes once it is complete; the CPU if None.
        token: for private or gated repositories; the one you are logged in with if None.
        endpoint: of the Hub; the environment's ``HF_ENDPOINT`` if None.
        restore: fit the output projections anew on the text that ``restore.data`` names. None: all weights are those of
            the unpruned model, whether or not the run's saved levels are restored; a warning says so if they are.

    Returns:
        The pruned model in evaluation mode, with the generation config of the unpruned one.

    Raises:
        FileNotFoundError: if there is no trajectory, no base model, or no safetensors in it.
        ValueError: if the sparsity cannot be reached, or the model is not the one the trajectory was made from. A run
            that loaded its model in float16 fits only a checkpoint that is stored in float16.
    """
    trajectory = load_trajectory(repo_or_folder, revision=revision, token=token, endpoint=endpoint)
    level = _up_to(trajectory, sparsity, channel_multiple, group_multiple)
    base = open_base_of(level, base_model, base_revision, token=token, endpoint=endpoint)
    calibration = None
    if restore is not None:
        calibration = draw(restore, load_tokenizer_of(base))  # before the weights, which take time
    elif _has_restored_levels(trajectory, repo_or_folder):
        logger.warning(
            "the saved levels of %s are restored, and this one is not: load_level(..., restore=RestoreConfig(data=...))"
            " restores it, and from_pretrained loads a saved one",
            repo_or_folder,
        )
    model = cut_level(level, base, dtype)
    model.name_or_path = model.config.name_or_path = str(repo_or_folder)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    if restore is not None and calibration is not None:
        restore_model(model, base, calibration, restore)
    return model


def materialize(
    repo_or_folder: str | Path,
    output_dir: str | Path,
    *,
    sparsity: float,
    base_model: str | Path | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    channel_multiple: int | None = None,
    group_multiple: int | None = None,
    dtype: torch.dtype | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Path:
    """Writes any level of a trajectory as an ordinary checkpoint, as a run would have saved it.

    That is with the tokenizer of the unpruned model, and the removal order up to this level. The arguments are those of
    ``load_level``. ``output_dir`` must not exist; it appears once everything is written.

    Returns:
        ``output_dir``.

    Raises:
        FileExistsError: if ``output_dir`` exists.
        FileNotFoundError, ValueError: as ``load_level``.
    """
    output_dir = Path(output_dir)
    if output_dir.exists():
        raise FileExistsError(f"{output_dir} exists already; remove it or choose another output folder")
    trajectory = load_trajectory(repo_or_folder, revision=revision, token=token, endpoint=endpoint)
    level = _up_to(trajectory, sparsity, channel_multiple, group_multiple)
    base = open_base_of(level, base_model, base_revision, token=token, endpoint=endpoint)
    tokenizer = load_tokenizer_of(base)  # before the weights, which take time
    model = cut_level(level, base, dtype)
    return save_level(model, output_dir, trajectory=level, sliced=True, tokenizer=tokenizer)


def _has_restored_levels(trajectory: Trajectory, source: str | Path) -> bool:
    """Whether a run, or the levels in its folder, say that they were restored."""
    folder = Path(source)
    found = folder.is_dir() and ((folder / RESTORATION_FILE).is_file() or any(folder.glob(f"*/{RESTORATION_FILE}")))
    return trajectory.restoration is not None or found


# ---- files -----------------------------------------------------------------------------------------------------------


def open_base_of(
    level: Trajectory,
    base_model: str | Path | None,
    base_revision: str | None,
    *,
    token: str | None = None,
    endpoint: str | None = None,
) -> Files:
    """The files of the unpruned model: those that were asked for, or those that the trajectory names.

    Raises:
        FileNotFoundError: if there is no such model.
    """
    files = Files(base_model or level.base.id, base_revision, token, endpoint)
    if files.revision is None and str(files.source) == level.base.id:
        files = replace(files, revision=level.base.revision)
    hint = "; base_model= names the unpruned model, by its Hub id or a folder"
    try:
        files, config_file = pin(files, "config.json")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the base model was not found: {error}{hint}") from error
    if config_file is None:
        raise FileNotFoundError(f"the base model was not found: {files.source} holds no config.json{hint}")
    return files


def load_tokenizer_of(base: Files) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the unpruned model; None if it has none."""
    found = [base.fetch(name) for name in TOKENIZER_FILES]
    folder = next((path.parent for path in found[:3] if path is not None), None)
    return None if folder is None else load_tokenizer(folder, label=base.label)


# ---- weights ---------------------------------------------------------------------------------------------------------


def _up_to(
    trajectory: Trajectory, sparsity: float, channel_multiple: int | None, group_multiple: int | None
) -> Trajectory:
    """The part of a trajectory that leads to a level, and no more: its end is the level."""
    if channel_multiple is not None and channel_multiple < 1:
        raise ValueError(f"channel_multiple must be at least 1, got {channel_multiple}; 64 or 128 suits GPUs")
    if group_multiple is not None and group_multiple < 1:
        raise ValueError(f"group_multiple must be at least 1, got {group_multiple}; give the number of devices")
    warn_if_compensated(trajectory.config)
    config = replace(
        trajectory.config,
        channel_multiple=channel_multiple or trajectory.config.channel_multiple,
        group_multiple=group_multiple or trajectory.config.group_multiple,
    )
    length = replace(trajectory, config=config).prefix(sparsity)
    return replace(
        trajectory,
        order=tuple(torch.where(positions < length, positions, -1) for positions in trajectory.order),
        config=config,
        steps=tuple(step for step in trajectory.steps if step.target < sparsity - 1e-9),  # those before the level's own
        restoration=None,  # what is cut out of the base has the weights of the base
    )


def cut_level(level: Trajectory, base: Files, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model at the end of ``level``, with the weights of ``base``."""
    config_file = base.fetch("config.json")
    assert config_file is not None
    config = read_model_config(config_file.parent, label=base.label)
    dense = _dense_on_meta(level, config, base)
    shell = pruned_shell(dense, level.layout, [len(keep) for keep in level.kept_at(len(level))])
    weights = _read_weights(level, base, dense=dense, shell=shell, dtype=dtype or config.dtype)  # type: ignore[arg-type]
    dtype = next(iter(weights.values())).dtype
    # Given a state dict, from_pretrained takes these very tensors, ties what is tied, and computes what no checkpoint
    # holds (the rotary frequencies, the scale of Gemma's embeddings). It neither reads nor downloads anything.
    model = type(shell).from_pretrained(None, config=shell.config, state_dict=weights, dtype=dtype)
    if (path := base.fetch(GENERATION_FILE)) is not None:
        with odd_contents(f"{GENERATION_FILE} of {base.label}"):
            model.generation_config = GenerationConfig.from_pretrained(path.parent)
    return model


def _dense_on_meta(level: Trajectory, config: PreTrainedConfig, base: Files) -> PreTrainedModel:
    """The unpruned model without weights, once it is clear that the trajectory is about a model of this shape."""
    made_from = f"this trajectory was made from {level.base.id}"
    wanted = level.layout.architecture
    # A level can itself be pruned further: then it is the base.
    pruned = " (already pruned)" if config.model_type.startswith("gisp_") else ""
    if config.model_type.removeprefix("gisp_") != wanted:
        raise ValueError(
            f"{made_from} (type {wanted}); {base.label} is of type {config.model_type}{pruned}. Give the "
            "unpruned model, as it was before that run"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{base.label} is quantized, and {made_from}, which is not; give the unpruned model")
    if config.num_hidden_layers != level.layout.num_layers:
        raise ValueError(
            f"{made_from} ({level.layout.num_layers} layers); {base.label} has {config.num_hidden_layers} layers. Give "
            "the unpruned model, as it was before that run"
        )
    dense = empty_model(config, label=base.label)
    found = level.discover(dense)
    if found.identity != level.layout.identity:
        raise ValueError(
            f"{made_from} ({level.layout.num_layers} layers, {level.layout.total:,} parameters in them); "
            f"{base.label}{pruned} has {found.num_layers} layers and {found.total:,} parameters. Give the "
            "unpruned model, as it was before that run"
        )
    return dense


def _read_weights(
    level: Trajectory, base: Files, *, dense: PreTrainedModel, shell: PreTrainedModel, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Every parameter of the pruned model, from one pass over the files, which also proves where they come from.

    Args:
        dense, shell: the model before and after, without weights: the shapes to be read and those to be kept.
        dtype: of the result; that of the first tensor in the files if None.
    """
    layout, kept = level.discover(dense), level.kept_at(len(level))
    cuts, renamed = layout.rows_kept(kept), layout.renamed(kept)
    shapes = {name: tuple(parameter.shape) for name, parameter in dense.named_parameters()}
    weights: dict[str, torch.Tensor] = {}
    checksums: list[tuple[str, tuple[int, ...], tuple[int, int]]] = []
    with progress_bars.tqdm(total=len(shapes), desc="Cutting weights") as progress:
        for filename, names in names_by_file(base, dense, shapes).items():
            with base.opened(filename) as file:
                if not weights:
                    dtype = dtype or file.get_slice(names[0][0])[:1].dtype
                    # All at once: among tensors that come and go, each one that stays would leave a hole behind it.
                    weights = {name: torch.empty(p.shape, dtype=dtype) for name, p in shell.named_parameters()}
                for stored, name in names:
                    target = renamed.get(name, name)
                    into = None if target is None else weights[target]
                    checksum = _read_one(file, stored, into=into, shape=shapes[name], cut=cuts.get(name))
                    checksums.append((name, shapes[name], checksum))
                    progress.update()
    found = combine_checksums(checksums)
    if found != level.base.fingerprint:
        wanted = level.base.id + (f" at revision {level.base.revision}" if level.base.revision else "")
        raise ValueError(
            f"the weights of {base.label} are not those of {wanted}, which this trajectory was made from: fingerprint "
            f"{found[:12]}, expected {level.base.fingerprint[:12]}. Give the very model that was pruned, in the same "
            "revision; a fine-tuned one needs a trajectory of its own"
        )
    return weights


def read_tensor(file: Any, stored: str, *, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of an open file, which must be in floating point and of this shape.

    Raises:
        ValueError: if it is not.
    """
    found = tuple(file.get_slice(stored).get_shape())
    if found != shape:
        raise ValueError(f"{stored} has shape {found} in the checkpoint, its config says {shape}")
    tensor = file.get_tensor(stored)
    if not tensor.is_floating_point():
        raise ValueError(f"{stored} is of type {tensor.dtype}: a quantized checkpoint; give the original model")
    return tensor


@torch.no_grad()
def _read_one(
    file: Any, stored: str, *, into: torch.Tensor | None, shape: tuple[int, ...], cut: Cut | None
) -> tuple[int, int]:
    """Reads one tensor, leaves in ``into`` what is kept of it (None: nothing), and returns its checksum."""
    tensor = read_tensor(file, stored, shape=shape)
    checksum = tensor_checksum(tensor)
    if into is not None:
        into.copy_(tensor if cut is None else slice_tensor(tensor, cut))
    return checksum
