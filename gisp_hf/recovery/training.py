"""Trains what was put on a model, adapters or vectors, with the Trainer."""

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from gisp_hf.data import Calibration
from gisp_hf.losses.distillation import Distillation
from gisp_hf.losses.objectives import language_modeling_loss
from gisp_hf.recovery.vectors import attach_vectors, fold_vectors
from gisp_hf.training.distributed import check_connected

TRAINING_KEYS = (
    *("learning_rate", "weight_decay", "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("world_size", "seed"),
)
NORM_LEARNING_RATE = 5e-3  # ten times that of adapters: few numbers, all of them near their place
NORM_BATCH_TOKENS = 2048


def check_data(data: Calibration) -> None:
    """Refuses data whose targets are not tokens.

    Raises:
        ValueError: then.
    """
    if data.loss is not language_modeling_loss:
        raise ValueError(
            f"recovery trains on targets that are tokens, and these data are for {data.provenance.get('objective')}; "
            "use load_calibration(..., objective='completion') or a text"
        )


def norm_arguments(output_dir: str, data: Calibration, *, seed: int = 0) -> TrainingArguments:
    """Settings for norms: one pass over the text, about 2,048 tokens a step, a learning rate that falls to zero.

    Args:
        output_dir: where the Trainer would keep checkpoints; none are written.
    """
    longest = max(len(data.dataset[number]["input_ids"]) for number in range(len(data.dataset)))
    return TrainingArguments(
        output_dir=output_dir,
        num_train_epochs=1,
        per_device_train_batch_size=max(1, NORM_BATCH_TOKENS // longest),
        learning_rate=NORM_LEARNING_RATE,
        lr_scheduler_type="linear",
        seed=seed,
        save_strategy="no",
        report_to="none",
        logging_steps=10,
    )


def train_on(
    model: PreTrainedModel | PeftModel,
    data: Calibration,
    arguments: TrainingArguments,
    *,
    teacher: PreTrainedModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Trainer, dict[str, Any]]:
    """Trains the parameters of a model that require a gradient.

    Args:
        teacher: the loss is the forward KL divergence from its logits; it is moved to the device of the training. None:
            the loss of ``data``.

    Returns:
        the Trainer, and facts of the training for a record.

    Raises:
        ValueError: if FSDP or DeepSpeed shard the model, or processes are not connected.
        FloatingPointError: if the loss is not finite.
    """
    check_connected(arguments)
    arguments = copy.copy(arguments)
    arguments.include_num_input_tokens_seen = "all"  # for the record
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=cast(Any, data.dataset),
        data_collator=data.collator,
        callbacks=list(callbacks),
    )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError("adapters are merged from whole parameters; launch with DDP, without FSDP and DeepSpeed")
    if teacher is None:
        trainer.compute_loss_func = data.loss
        found = trainer.train()
    else:
        with Distillation(model, cast(Any, teacher).to(arguments.device)) as loss:
            trainer.compute_loss_func = loss
            found = trainer.train()
    if not math.isfinite(found.training_loss):
        raise FloatingPointError(f"the training loss is {found.training_loss}; lower the learning rate or the rank")
    return trainer, {
        "objective": "language_modeling" if teacher is None else "distillation",
        "training": {key: getattr(arguments, key) for key in TRAINING_KEYS},
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "seconds": found.metrics["train_runtime"],
        "loss": found.training_loss,
    }


def train_norms_of(
    model: PreTrainedModel,
    data: Calibration,
    arguments: TrainingArguments,
    *,
    teacher: PreTrainedModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Trains the norms of a model in memory, in place, and returns the facts; arguments and errors of `train_on`."""
    attach_vectors(model, "norms")
    _, facts = train_on(model, data, arguments, teacher=teacher, callbacks=callbacks)
    fold_vectors(model)
    return facts
