"""Pruning on a calibration set of `gisp_hf.data`, shared by the recipes for tasks and the comparison."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments

import gisp_hf
from gisp_hf import GISPConfig, GISPPruner
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
    evaluate: Evaluate | None = None,
) -> GISPPruner:
    """The part to copy: dataset, collator and loss of the calibration set go to an ordinary Trainer.

    Every step sees the whole set, in micro-batches of ``batch_size`` items. How it is cut and ordered does not change
    the gradient, so items of like length stand together: questions padded to the longest of all cost far more.
    """
    items = len(calibration.dataset)
    lengths = [_tokens(item["input_ids"]) for item in calibration.dataset]
    longest_first = sorted(range(items), key=lambda i: -lengths[i])  # what does not fit into memory fails at once
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
        train_dataset=calibration.dataset.select(longest_first),
        data_collator=calibration.collator,
        compute_loss_func=calibration.loss,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # GISPPruner prints a line per step; one is enough
    return gisp_hf.prune(trainer, config, output_dir, calibration=calibration.provenance, evaluate=evaluate)


def _tokens(input_ids: list[int] | list[list[int]]) -> int:
    """Tokens of one item: a sequence, or the candidates of a question."""
    return sum(len(part) if isinstance(part, list) else 1 for part in input_ids)
