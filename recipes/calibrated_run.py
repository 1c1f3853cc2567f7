"""Pruning on a calibration set of `gisp_hf.data`, shared by the recipes for tasks and the comparison."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments

import gisp_hf
from gisp_hf import GISPConfig, GISPPruner, RestoreConfig
from gisp_hf.data import Calibration
from gisp_hf.evaluation.stage import Evaluate


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration,
    *,
    config: GISPConfig,
    output_dir: Path,
    batch_size: int,
    fresh: bool = False,
    evaluate: Evaluate | None = None,
    restore: RestoreConfig | None = None,
) -> GISPPruner:
    """The part to copy: dataset, collator and loss of the calibration set go to an ordinary Trainer.

    Every step sees the whole set, in micro-batches of ``batch_size`` items; or, if ``fresh``, the next part of it, one
    of as many equal parts as there are steps. How a step's items are cut and ordered does not change the gradient, so
    items of like length stand together: questions padded to the longest of all cost far more.

    Raises:
        ValueError: if ``fresh``, and there are fewer items than steps.
    """
    lengths = [_tokens(item["input_ids"]) for item in calibration.dataset]
    items = len(lengths) // config.num_steps if fresh else len(lengths)  # in each step
    if not items:
        raise ValueError(f"{len(lengths)} items cannot be shared out to {config.num_steps} steps: raise tokens")
    parts = [range(start, start + items) for start in range(0, items * (config.num_steps if fresh else 1), items)]
    # The longest first: what does not fit into memory fails at once.
    sorted_items = [item for part in parts for item in sorted(part, key=lambda i: -lengths[i])]
    if fresh:  # a micro-batch must not reach into the next step's part
        batch_size = max(size for size in range(1, min(batch_size, items) + 1) if items % size == 0)
    arguments = TrainingArguments(
        output_dir=str(output_dir.with_name(output_dir.name + "-trainer")),
        max_steps=config.num_steps,
        per_device_train_batch_size=min(batch_size, items),
        gradient_accumulation_steps=-(-items // batch_size),  # rounded up: the last micro-batch may be smaller
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=calibration.dataset.select(sorted_items),
        data_collator=calibration.collator,
        compute_loss_func=calibration.loss,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # GISPPruner prints a line per step; one is enough
    return gisp_hf.prune(
        trainer, config, output_dir, calibration=calibration.provenance, evaluate=evaluate, restore=restore
    )


def _tokens(input_ids: list[int] | list[list[int]]) -> int:
    """Tokens of one item: a sequence, or the candidates of a question."""
    return sum(len(part) if isinstance(part, list) else 1 for part in input_ids)
