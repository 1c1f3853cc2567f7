"""Prune a model for worked answers: loss on the answers alone, and exact match of their final numbers at every level.

    python -m recipes.prune_reasoning --model HuggingFaceTB/SmolLM2-360M-Instruct            # GSM8K, from the Hub
    python -m recipes.prune_reasoning --model MODEL --calibration train.jsonl --test test.jsonl

Hardware: a GPU with room for the model's weights twice (weights and gradients) and one micro-batch. Of GSM8K the train
split calibrates and the test split is measured. Local files hold {"prompt", "completion"} in each line, the completion
ending in "#### number". Writes to --output-dir: sparsity-0.20 ... (checkpoints), trajectory.* and results.json/.md.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gisp_hf import GISPConfig
from gisp_hf.data import Calibration, load_calibration
from gisp_hf.data.files import read_json_lines
from gisp_hf.data.sources import SOURCES, open_source
from gisp_hf.evaluation import exact_match
from gisp_hf.report import format_table
from recipes.calibrated_run import prune

COLUMNS = {
    "level": "level",
    "exact_match_strict": "exact match, ####",
    "exact_match_strict_stderr": "stderr",
    "exact_match_flexible": "exact match, last number",
    "exact_match_flexible_stderr": "stderr",
}


def load_records(name: str, *, count: int | None = None) -> list[dict[str, str]]:
    """Questions to measure on: the test split of GSM8K for ``"gsm8k"``, else a .jsonl of {"prompt", "completion"}.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds no such records.
    """
    if name == "gsm8k":
        source = SOURCES["gsm8k"]
        rows, _ = open_source(replace(source, split="test"))
        candidates = [source.read(row)[0] for row in islice(rows, count)]
        return [{"prompt": candidate.prompt, "completion": candidate.completion} for candidate in candidates]
    records = read_json_lines(name, count)
    for i, record in enumerate(records):
        if {"prompt", "completion"} - record.keys():
            raise ValueError(f"{name}, record {i}: prompt and completion are needed, got {record!r:.80}")
    return records


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    calibration: Calibration,
    records: Sequence[Mapping[str, str]],
    output_dir: Path,
    config: GISPConfig,
    batch_size: int = 8,
    max_new_tokens: int = 256,
) -> list[dict[str, Any]]:
    """Measures the model, prunes it, and measures every level that was saved."""
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    rows: list[dict[str, Any]] = [{"level": "dense", **exact_match(model, tokenizer, records, **options)}]
    pruner = prune(model, tokenizer, calibration, config=config, output_dir=output_dir, batch_size=batch_size)
    for folder in pruner.level_folders.values():
        pruned = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).to(model.device)
        rows.append({"level": folder.name, **exact_match(pruned, tokenizer, records, **options)})
    table = format_table(rows, COLUMNS, formats={key: ".3f" for key in COLUMNS if key != "level"})
    (output_dir / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (output_dir / "results.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nCheckpoints and table are in {output_dir}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Prune for worked answers (GSM8K) and measure exact match.")
    parser.add_argument("--model", required=True, help="a model on the Hub, or a folder")
    parser.add_argument("--calibration", default="gsm8k", help="gsm8k, or a .jsonl of prompt and completion")
    parser.add_argument("--test", default="gsm8k", help="gsm8k (its test split), or a .jsonl of prompt and completion")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/reasoning"), help="must be new or empty")
    parser.add_argument("--tokens", type=int, default=65_536, help="calibration tokens in every step")
    parser.add_argument("--num-steps", type=int, default=80, help="pruning steps up to the highest level")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.2, 0.3, 0.4])
    parser.add_argument("--questions", type=int, default=None, help="test questions; default: all")
    parser.add_argument("--batch-size", type=int, default=8, help="answers in one forward pass")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0, help="which calibration answers are drawn")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked: which one does not matter
    run(
        model,
        tokenizer,
        calibration=load_calibration(
            options.calibration, tokenizer, objective="completion", tokens=options.tokens, seed=options.seed
        ),
        records=load_records(options.test, count=options.questions),
        output_dir=options.output_dir,
        config=GISPConfig(num_steps=options.num_steps, sparsity_levels=tuple(options.levels)),
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )


if __name__ == "__main__":
    main()
