"""Prune SmolLM2-135M to four nested levels with a plain Trainer and one callback, and show what came of it.

    make quickstart                       # or: python -m recipes.quickstart

Hardware: two CPU cores and 6 GB of memory are enough. Time: about 12 minutes there.
Writes to runs/quickstart: iterative/sparsity-0.20 ... 0.50 (checkpoints), iterative/trajectory.* (the removal order),
results.json, results.md and three plots. A second run needs another folder: python -m recipes.quickstart --output-dir X
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from gisp_hf import GISPConfig, GISPPruner, Trajectory
from gisp_hf.evaluation import measure_speed, perplexity
from gisp_hf.report import format_table, plot_loss, plot_perplexity, plot_removed
from recipes.demo_data import held_out_tokens, load_smollm2, load_wikipedia, pack_blocks, split_articles

BATCH_SIZE = 8  # blocks in one forward pass
COLUMNS = {
    "level": "level",
    "sparsity": "sparsity",
    "parameters": "parameters",
    "megabytes": "file, MB",
    "perplexity_128": "ppl, 128",
    "perplexity_256": "ppl, 256",
    "one_shot_256": "one shot, 256",
    "groups_removed": "groups removed",
    "channels_removed": "channels removed",
    "prefill": "prefill, tokens/s",
    "decode": "decode, tokens/s",
}


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: list[dict[str, torch.Tensor]],
    *,
    config: GISPConfig,
    output_dir: Path,
) -> GISPPruner:
    """The part to copy: an ordinary Trainer with one more callback. Every step sees all ``blocks``."""
    pruner = GISPPruner(config, output_dir=output_dir)
    arguments = TrainingArguments(
        output_dir=str(output_dir.with_name(output_dir.name + "-trainer")),
        max_steps=config.num_steps,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=max(1, len(blocks) // BATCH_SIZE),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=blocks, processing_class=tokenizer, callbacks=[pruner])
    trainer.remove_callback(PrinterCallback)  # GISPPruner prints a line per step; one is enough
    trainer.train()
    return pruner


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    blocks: list[dict[str, torch.Tensor]],
    held_out: torch.Tensor,
    output_dir: Path,
    config: GISPConfig,
    prompt: str = "The history of the city begins in",
) -> list[dict[str, Any]]:
    """Prunes ``model`` iteratively and, for comparison, a copy of it in one shot; evaluates; writes table and plots."""
    dense = copy.deepcopy(model)
    print(f"\n1. Pruning in {config.num_steps} steps, {len(blocks)} blocks each")
    pruner = prune(model, tokenizer, blocks, config=config, output_dir=output_dir / "iterative")
    print("\n2. The same score in one shot, for comparison")
    one_shot_config = GISPConfig.from_dict({**config.to_dict(), "num_steps": 1})
    one_shot = prune(
        copy.deepcopy(dense), tokenizer, blocks, config=one_shot_config, output_dir=output_dir / "one-shot"
    )

    print("\n3. Evaluating on articles that calibration never saw")
    levels = {
        level: AutoModelForCausalLM.from_pretrained(folder, dtype=dense.dtype)
        for level, folder in pruner.level_folders.items()
    }
    trajectory = Trajectory.load(output_dir / "iterative")
    speeds = measure_speed({"dense": dense, **{str(level): pruned for level, pruned in levels.items()}}, repeats=2)
    rows = [row_of("dense", dense, speeds["dense"], held_out) | {"one_shot_256": None, "megabytes": None}]
    for level, pruned in levels.items():
        row = row_of(pruner.level_folders[level].name, pruned, speeds[str(level)], held_out)
        row["megabytes"] = (pruner.level_folders[level] / "model.safetensors").stat().st_size / 1e6
        row["sparsity"] = trajectory.sparsity_at(trajectory.prefix(level))
        row |= removed_of(trajectory, level)
        baseline = AutoModelForCausalLM.from_pretrained(one_shot.level_folders[level], dtype=dense.dtype)
        row["one_shot_256"] = perplexity(baseline, held_out, window=256)
        rows.append(row)

    table = format_table(rows, COLUMNS, formats={"sparsity": ".3f", "megabytes": ",.0f", "prefill": ",.0f"})
    (output_dir / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (output_dir / "results.md").write_text(table + "\n", encoding="utf-8")
    plot(trajectory, rows, output_dir)

    print("\n4. One level from disk, writing")
    folder = next(iter(pruner.level_folders.values()))
    print(f"{folder.name}: {generate(folder, prompt)!r}")
    print(f"\n{table}\n\nCheckpoints, table and plots are in {output_dir}")
    return rows


def row_of(name: str, model: PreTrainedModel, speed: Any, held_out: torch.Tensor) -> dict[str, Any]:
    """What is measured the same way on every model, pruned or not."""
    return {
        "level": name,
        "sparsity": 0.0,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "perplexity_128": perplexity(model, held_out, window=128),
        "perplexity_256": perplexity(model, held_out, window=256),
        "groups_removed": 0,
        "channels_removed": 0,
        "prefill": speed.prefill,
        "decode": speed.decode,
    }


def removed_of(trajectory: Trajectory, level: float) -> dict[str, int]:
    """How many structures of each kind a level lacks."""
    counts = {"attention": 0, "mlp": 0}
    for block, keep in zip(trajectory.layout.blocks, trajectory.kept(level)):
        counts[block.kind] += block.size - len(keep)
    return {"groups_removed": counts["attention"], "channels_removed": counts["mlp"]}


def plot(trajectory: Trajectory, rows: list[dict[str, Any]], output_dir: Path) -> None:
    dense, *pruned = rows
    plot_perplexity(
        {
            "one shot": [(row["sparsity"], row["one_shot_256"]) for row in pruned],
            "iterative (GISP)": [(row["sparsity"], row["perplexity_256"]) for row in pruned],
        },
        output_dir / "perplexity.png",
        baselines={"dense": dense["perplexity_256"]},
    )
    removed: dict[float, dict[str, list[float]]] = {}
    for level in trajectory.config.sparsity_levels:
        kinds: dict[str, list[float]] = {"attention groups": [], "MLP channels": []}
        for block, keep in zip(trajectory.layout.blocks, trajectory.kept(level)):
            kind = "attention groups" if block.kind == "attention" else "MLP channels"
            kinds[kind].append(1 - len(keep) / block.size)
        removed[level] = kinds
    plot_removed(removed, output_dir / "removed.png")
    # A step's loss is that of the model before its removals: it belongs to the sparsity of the step before.
    before = [0.0, *(step.sparsity for step in trajectory.steps)]
    losses = [
        {"step": step.step, "sparsity": sparsity, "loss": step.loss}
        for step, sparsity in zip(trajectory.steps, before)
        if step.loss is not None
    ]
    plot_loss(losses, output_dir / "loss.png", levels=trajectory.config.sparsity_levels)


def generate(folder: Path, prompt: str) -> str:
    """Loads a level as anybody would, and lets it go on from ``prompt``."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=30, do_sample=False
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Prune SmolLM2-135M to four nested levels and measure them.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quickstart"), help="must be new or empty")
    parser.add_argument("--num-steps", type=int, default=20, help="pruning steps up to 50 %%")
    parser.add_argument("--num-blocks", type=int, default=32, help="calibration blocks of 128 tokens in each step")
    options = parser.parse_args()
    model, tokenizer = load_smollm2(torch.bfloat16)
    calibration, held_out = split_articles(load_wikipedia())
    run(
        model,
        tokenizer,
        blocks=pack_blocks(calibration, tokenizer, length=128, count=options.num_blocks),
        held_out=held_out_tokens(held_out, tokenizer),
        output_dir=options.output_dir,
        config=GISPConfig(num_steps=options.num_steps),
    )


if __name__ == "__main__":
    main()
