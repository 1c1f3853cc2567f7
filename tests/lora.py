"""One way to train adapters on a level in a test."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from gisp_hf.data import Calibration, load_calibration
from gisp_hf.recovery.lora import recover_level
from tests.restoring import ids_of
from tests.tiny import tiny_blocks, tiny_tokenizer


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids_of(2)).logits


class Watch(TrainerCallback):
    """Keeps the adapted model's output at the end, and the loss of each step."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.logits = logits_of(model.eval())
        self.losses = [entry["loss"] for entry in state.log_history if "loss" in entry]


def words(folder: Path, *, count: int = 80, seed: int = 0) -> Path:
    """A file of sentences, for `load_calibration`."""
    path = folder / "words.txt"
    lines = [tiny_tokenizer().decode(block["input_ids"]) for block in tiny_blocks(count, 32, seed=seed)]
    path.write_text("\n\n".join(lines))
    return path


def data_of(folder: Path) -> Calibration:
    """32 blocks of 16 tokens."""
    return load_calibration(str(words(folder)), tiny_tokenizer(), tokens=512, block_size=16)


def recover(
    level: Path,
    output_dir: Path,
    *,
    teacher: PreTrainedModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    data: Calibration | None = None,
    lora: Any = None,
    train: Any = "lora",
    **changes: Any,
) -> Path:
    """Four steps of 8 blocks."""
    output_dir.parent.mkdir(exist_ok=True, parents=True)
    work = output_dir.parent.parent / f"work-{random.SystemRandom().getrandbits(32):x}"
    work.mkdir()
    defaults: dict[str, Any] = {
        "output_dir": str(work / "trainer"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    arguments = TrainingArguments(**{**defaults, **changes})
    return recover_level(
        level,
        output_dir,
        data=data or data_of(work),
        arguments=arguments,
        train=train,
        lora=lora,
        teacher=teacher,
        callbacks=callbacks,
    )
