"""Going on after a crash: what a Trainer checkpoint of a pruning run holds, and how it is read back.

Weights never change, so a checkpoint needs no copy of them: the base model and the removal order so far are enough. The
weights that the Trainer writes are replaced by an empty file of the same name, which is what it looks for on resuming.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from gisp_hf.pruning.trajectory import Trajectory

PROGRESS_FILE = "gisp.json"


@dataclass(frozen=True)
class Progress:
    """What must agree between the run that was killed and the one that goes on."""

    global_step: int
    world_size: int
    examples_per_step: int
    layer_groups: int
    order: str  # Trajectory.digest()


def checkpoint_folder(output_dir: str | Path, global_step: int) -> Path:
    """Where the Trainer puts the checkpoint of a step."""
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{global_step}"


def save_progress(folder: Path, trajectory: Trajectory, progress: Progress) -> None:
    """Writes the order so far into a Trainer checkpoint, before the Trainer completes that with its own files."""
    trajectory.save(folder)
    temporary = folder / f"{PROGRESS_FILE}.tmp"
    temporary.write_text(json.dumps(asdict(progress), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(folder / PROGRESS_FILE)


def drop_weights(folder: Path) -> None:
    """Replaces the weights in a Trainer checkpoint by an empty file of the same name."""
    empty = folder / f"{SAFE_WEIGHTS_NAME}.tmp"
    save_file({}, empty, metadata={"format": "pt", "note": "weights are those of the base model; see trajectory.json"})
    empty.replace(folder / SAFE_WEIGHTS_NAME)
    (folder / SAFE_WEIGHTS_INDEX_NAME).unlink(missing_ok=True)
    for shard in folder.glob("model-?????-of-?????.safetensors"):
        shard.unlink()


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
        found = Progress(**json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8")))
        trajectory = Trajectory.load(folder)
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise ValueError(f"the checkpoint {folder} is damaged: {error}. Resume from an earlier one") from error
    if found.order != trajectory.digest() or found.global_step != expected.global_step:
        raise ValueError(
            f"the checkpoint {folder} is damaged: its removal order is not the one it was saved with. Resume from an "
            "earlier one"
        )
    for name in ("world_size", "examples_per_step", "layer_groups"):
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
