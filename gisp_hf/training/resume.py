"""Checkpoints of a run: writing, reading, and setting broken ones aside.

Weights never change, so a checkpoint needs no copy of them: the base model and the removal order so far are enough. A
checkpoint is written under another name and renamed once it is whole. It holds an empty file in the place of the
weights, which the Trainer looks for on resuming, and a config.json that ``from_pretrained`` refuses: without one, the
class of a model would build its default size with random weights.

Sharded models (FSDP2) are the exception: there the Trainer writes its own checkpoints, weights included.
"""

import itertools
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from gisp_hf.atomic import replace_folder, replacement, unique_beside, write_text_atomic
from gisp_hf.pruning.trajectory import FACTS_FILE, ORDER_FILE, Trajectory
from gisp_hf.untrusted import check_progress, read_json

PROGRESS_FILE = "gisp.json"
AVERAGES_FILE = "scores.safetensors"  # block -> moving average of its scores, where there is one
STATE_FILE = "trainer_state.json"  # the Trainer's name for it

# Sizes that are no numbers: the strict configs of all families refuse them, and quote them.
_NO_WEIGHTS = "this checkpoint of a pruning run holds no weights: load the base model or a level, or resume the run"
_NO_MODEL = {"model_type": "gisp_checkpoint", "hidden_size": _NO_WEIGHTS, "num_hidden_layers": _NO_WEIGHTS}

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", re.ASCII)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """What must agree between the run that was killed and the one that goes on."""

    global_step: int
    world_size: int
    examples_per_step: int
    layer_passes: int
    order: str  # Trajectory.digest()


def checkpoint_folder(output_dir: str | Path, global_step: int) -> Path:
    """Where the Trainer puts the checkpoint of a step."""
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{global_step}"


def save_checkpoint(
    output_dir: str | Path,
    *,
    trajectory: Trajectory,
    progress: Progress,
    averages: Mapping[str, torch.Tensor],
    state: TrainerState,
    limit: int | None,
) -> None:
    """Writes a whole checkpoint or none, and removes the oldest ones beyond ``limit``.

    Raises:
        OSError: if it cannot be written; older checkpoints are as before.
    """
    folder = checkpoint_folder(output_dir, progress.global_step)
    temporary = unique_beside(folder)
    temporary.mkdir(parents=True)
    try:
        save_progress(temporary, trajectory, progress, averages)
        note = {"format": "pt", "note": "weights are those of the base model; see trajectory.json"}
        save_file({}, temporary / SAFE_WEIGHTS_NAME, metadata=note)
        (temporary / CONFIG_NAME).write_text(json.dumps(_NO_MODEL, indent=1) + "\n", encoding="utf-8")
        state.save_to_json(str(temporary / STATE_FILE))
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    rotate_checkpoints(output_dir=str(output_dir), save_total_limit=limit, use_mtime=True)


def save_progress(
    folder: Path, trajectory: Trajectory, progress: Progress, averages: Mapping[str, torch.Tensor]
) -> None:
    """Writes the order so far, and the averages that go on from there, into a checkpoint."""
    trajectory.save(folder)
    if averages:
        with replacement(folder / AVERAGES_FILE) as file:
            save_file({name: average.contiguous() for name, average in averages.items()}, file)
    write_text_atomic(folder / PROGRESS_FILE, json.dumps(asdict(progress), indent=1, sort_keys=True) + "\n")


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint of a pruning run that is whole; None if there is none."""
    folders = sorted(_checkpoints(output_dir), key=_step_of, reverse=True)
    return next((folder for folder in folders if _fault_of(folder) is None), None)


def set_aside_broken(output_dir: str | Path) -> list[Path]:
    """Renames checkpoints of pruning runs that are not whole, so that the Trainer resumes from the newest whole one.

    Only folders that hold a file of ours are touched, and only those newer than the newest whole one: the Trainer takes
    the one with the highest number. They get a name that the Trainer passes over; nothing is deleted.

    Returns:
        their new names.
    """
    moved = []
    for folder in sorted(_checkpoints(output_dir), key=_step_of, reverse=True):
        fault = _fault_of(folder)
        if fault is None:
            break
        if not any((folder / name).exists() for name in (PROGRESS_FILE, ORDER_FILE, FACTS_FILE)):
            continue
        aside = next(
            path
            for number in itertools.count(1)
            if not (path := folder.with_name(f"incomplete-{folder.name}-{number}")).exists()
        )
        folder.rename(aside)
        logger.warning("the checkpoint %s is not whole (%s): it is now %s", folder, fault, aside.name)
        moved.append(aside)
    return moved


def _checkpoints(output_dir: str | Path) -> list[Path]:
    output_dir = Path(output_dir)
    found = output_dir.iterdir() if output_dir.is_dir() else ()
    return [path for path in found if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]


def _step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _fault_of(folder: Path) -> str | None:
    """What makes a checkpoint useless, or None."""
    for name in (PROGRESS_FILE, ORDER_FILE, FACTS_FILE, STATE_FILE):
        if not (folder / name).is_file():
            return f"it lacks {name}"
    try:
        progress, trajectory = _read(folder)
        load_averages(folder, trajectory)
        read_json(folder / STATE_FILE)
    except (TypeError, ValueError, OSError) as error:
        return str(error)
    if progress.order != trajectory.digest() or progress.global_step != _step_of(folder):
        return "its removal order is not the one it was saved with"
    return None


def _read(folder: Path) -> tuple[Progress, Trajectory]:
    facts = read_json(folder / PROGRESS_FILE)
    if isinstance(facts, dict) and "layer_groups" in facts:  # the name in version 0.1
        facts["layer_passes"] = facts.pop("layer_groups")
    check_progress(facts)
    return Progress(**facts), Trajectory.load(folder)


def load_progress(folder: Path, expected: Progress) -> Trajectory:
    """The order so far, once it is sure that the run can go on from it.

    Args:
        expected: what the run that goes on would have written at this step; its ``order`` is not looked at.

    Raises:
        ValueError: if the checkpoint is damaged, is not one of a pruning run, or was made with other settings.
    """
    if not (folder / PROGRESS_FILE).is_file():
        raise ValueError(
            f"{folder} holds no {PROGRESS_FILE}, so it is no checkpoint of a pruning run; resume from one that is, "
            "inside the Trainer's output_dir, or start anew in an empty folder"
        )
    try:
        found, trajectory = _read(folder)
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise ValueError(f"the checkpoint {folder} is damaged: {error}. Resume from an earlier one") from error
    if found.order != trajectory.digest() or found.global_step != expected.global_step:
        raise ValueError(
            f"the checkpoint {folder} is damaged: its removal order is not the one it was saved with. Resume from an "
            "earlier one"
        )
    for name in ("world_size", "examples_per_step", "layer_passes"):
        before, now = getattr(found, name), getattr(expected, name)
        # Another number of processes is fine as long as every step sees as many examples as before.
        if before != now and name != "world_size":
            raise ValueError(
                f"the checkpoint {folder} was made with {name}={before} (on {found.world_size} processes), this run "
                f"has {now} (on {expected.world_size}): its steps would not be comparable. Set "
                "per_device_train_batch_size and gradient_accumulation_steps so that their product with the number of "
                "processes is as before"
            )
    return trajectory


def load_averages(folder: Path, trajectory: Trajectory) -> dict[str, torch.Tensor]:
    """Block -> moving average of its scores, float32 of shape ``(block.size,)``; empty for a run without one.

    Raises:
        ValueError: if they are missing or damaged.
    """
    if not trajectory.config.score_momentum:
        return {}
    path = folder / AVERAGES_FILE
    if not path.is_file():
        raise ValueError(f"{folder} lacks {path.name}, and the run has a score_momentum. Resume from an earlier one")
    try:
        averages = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}. Resume from an earlier checkpoint") from error
    sizes = {block.name: block.size for block in trajectory.layout.blocks}
    for name, average in averages.items():
        if tuple(average.shape) != (sizes.get(name),) or not average.isfinite().all():
            raise ValueError(f"{path} is damaged: {name} is no average of scores. Resume from an earlier checkpoint")
    return averages
