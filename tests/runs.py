"""One way to run a small pruning in a test, through the real Trainer."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from gisp_hf import GISPConfig, GISPPruner
from tests.tiny import tiny_blocks, tiny_tokenizer

LEVELS = (0.2, 0.3, 0.4, 0.5)


def tiny_config(**changes: Any) -> GISPConfig:
    return GISPConfig(**{"num_steps": 5, "protect_first": 1, "sparsity_levels": LEVELS, **changes})


def make_trainer(
    model: PreTrainedModel,
    folder: Path,
    *,
    config: GISPConfig | None = None,
    pruner: GISPPruner | None = None,
    **arguments: Any,
) -> Trainer:
    """A Trainer on 16 blocks of 16 tokens, all of them in each step; ``arguments`` are TrainingArguments."""
    pruner = pruner or GISPPruner(config or tiny_config(), folder / "levels")
    data = arguments.pop("train_dataset", tiny_blocks(16))
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "trainer"),
        "max_steps": pruner.config.num_steps,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    args = TrainingArguments(**{**defaults, **arguments})
    trainer = Trainer(model=model, args=args, train_dataset=data, processing_class=tiny_tokenizer(), callbacks=[pruner])
    trainer.remove_callback(PrinterCallback)
    return trainer


def prune(model: PreTrainedModel, folder: Path, **options: Any) -> GISPPruner:
    """Runs it to the end and returns the callback."""
    trainer = make_trainer(model, folder, **options)
    pruner = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, GISPPruner))
    trainer.train()
    return pruner
