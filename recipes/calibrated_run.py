"""Pruning on a calibration set of `gisp_hf.calibration`: what the recipes for tasks share."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments

from gisp_hf import GISPConfig, GISPPruner
from gisp_hf.calibration import Calibration


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration,
    *,
    config: GISPConfig,
    output_dir: Path,
    batch_size: int,
) -> GISPPruner:
    """The part to copy: dataset, collator and loss of the calibration set go to an ordinary Trainer.

    Every step sees the whole set, in micro-batches of ``batch_size`` items. Few and large ones are best for the margin,
    whose gradient is a small difference: micro-batches are added up in the parameters' own precision.
    """
    pruner = GISPPruner(config, output_dir=output_dir, calibration=calibration.provenance)
    items = len(calibration.dataset)
    arguments = TrainingArguments(
        output_dir=str(output_dir.with_name(output_dir.name + "-trainer")),
        max_steps=config.num_steps,
        per_device_train_batch_size=min(batch_size, items),
        gradient_accumulation_steps=-(-items // batch_size),  # rounded up: the last micro-batch may be smaller
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=calibration.dataset,
        data_collator=calibration.collator,
        compute_loss_func=calibration.loss,
        processing_class=tokenizer,
        callbacks=[pruner],
    )
    trainer.remove_callback(PrinterCallback)  # GISPPruner prints a line per step; one is enough
    trainer.train()
    return pruner
