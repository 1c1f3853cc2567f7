"""Training for a given time instead of a given number of steps."""

import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gisp_hf.models.shards import all_ranks


class TimeLimit(TrainerCallback):
    """Ends a training after some seconds; meanwhile the learning rate falls in a straight line to zero.

    For ``TrainingArguments(lr_scheduler_type="constant")``, whose learning rate this callback sets in every step, and
    more ``max_steps`` than the time allows. With several processes the clock of the first one counts, so that all take
    the same steps. At least one step is made.

    Args:
        seconds: from the beginning of training; positive.

    Raises:
        ValueError: if it is not.
    """

    def __init__(self, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f"seconds must be above 0, got {seconds:g}; 600 trains for ten minutes")
        self.seconds = seconds
        self._start = 0.0
        self._spent = 0.0  # share of the time, at the end of the last step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._start, self._spent = time.monotonic(), 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = group.get("initial_lr", args.learning_rate) * (1 - self._spent)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._spent = _of_first_rank((time.monotonic() - self._start) / self.seconds, args.device)
        if self._spent >= 1:
            control.should_training_stop = True


def _of_first_rank(number: float, device: torch.device) -> float:
    if all_ranks() is None:
        return number
    shared = torch.tensor([number], dtype=torch.float32, device=device)
    dist.broadcast(shared, src=0)
    return float(shared)
