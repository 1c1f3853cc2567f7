"""Scores of a quantized model beside those of the unquantized one, and the levels that each leads to.

    python -m recipes.quantized_scores                  # SmolLM2-135M-Instruct in float32, int8 and NF4, on a CPU

Needs ``pip install gisp_hf[demo,quantized]``. Each model is pruned in one step by gisp-activation, on the same text
of Wikipedia. All levels are cut out of the float32 files, so they differ in their structures only. Prints the rank
correlation of scores with those of float32, the share of removed structures that both have, and the perplexity of the
levels on held-out articles.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PrinterCallback,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

import gisp_hf
from gisp_hf import GISPConfig, GISPPruner
from gisp_hf.evaluation import perplexity
from gisp_hf.models.layout import kind_of
from gisp_hf.report import format_table


def _int8_torchao() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTIZATIONS: dict[str, Callable[[], BitsAndBytesConfig | TorchAoConfig | None]] = {
    "float32": lambda: None,
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "int8-torchao": _int8_torchao,
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


def load(name: str, folder: Path, options: argparse.Namespace) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Saves the model in float32, and returns calibration blocks and held-out tokens."""
    if name == "tiny":
        from tests.tiny import tiny_blocks, tiny_model

        tiny_model(hidden_size=64, intermediate_size=64).save_pretrained(folder)
        held_out = torch.cat([block["input_ids"] for block in tiny_blocks(16, seed=1)])
        return tiny_blocks(options.blocks), held_out
    from recipes.demo_data import held_out_tokens, load_smollm2, load_wikipedia, pack_blocks, split_articles

    model, tokenizer = load_smollm2(torch.float32)
    model.save_pretrained(folder)
    texts, held_out = split_articles(load_wikipedia())
    blocks = pack_blocks(texts, tokenizer, length=options.block_length, count=options.blocks)
    return blocks, held_out_tokens(held_out, tokenizer, count=options.held_out_tokens)


def prune(model: PreTrainedModel, base: Path, blocks: list[dict[str, Any]], folder: Path, levels: list[float]) -> Any:
    """One step over all blocks; returns the pruner."""
    config = GISPConfig(method="gisp-activation", num_steps=1, sparsity_levels=tuple(levels))
    pruner = GISPPruner(config, folder / "levels", shrink=False, base_model=str(base))
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=-(-len(blocks) // 4),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    with gisp_hf.scoring_only(model):
        trainer = Trainer(model=model, args=arguments, train_dataset=blocks, callbacks=[pruner])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return pruner


def compare(options: argparse.Namespace) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    scores: dict[str, list[torch.Tensor | None]] = {}
    gone: dict[tuple[str, float], set[tuple[int, int]]] = {}
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        blocks, held_out = load(options.model, base, options)
        for kind in QUANTIZATIONS:
            quantization = QUANTIZATIONS[kind]()
            given = {} if quantization is None else {"quantization_config": quantization}
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **given)
            pruner = prune(model, base, blocks, Path(name) / kind, options.levels)
            scores[kind] = pruner.engine.scores
            correlations = correlate(pruner.engine, scores["float32"])
            for level, folder in pruner.level_folders.items():
                removed = pruner.trajectory.kept(level)
                gone[kind, level] = {
                    (number, index)
                    for number, (block, kept) in enumerate(zip(pruner.trajectory.layout.blocks, removed))
                    for index in set(range(block.size)) - set(kept.tolist())
                }
                shared = len(gone[kind, level] & gone["float32", level]) / len(gone["float32", level])
                pruned = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                row = {"scored in": kind, "level": level, **correlations, "shared": shared}
                rows.append({**row, "perplexity": perplexity(pruned, held_out, window=options.window)})
                print({key: value if isinstance(value, str) else round(value, 4) for key, value in rows[-1].items()})
    columns = {key: key for key in rows[0]}
    print("\n" + format_table(rows, columns, formats=dict.fromkeys(list(columns)[2:], ".3f")))
    return {
        "version": gisp_hf.__version__,
        "blocks": options.blocks,
        "block_length": options.block_length,
        "rows": rows,
    }


def correlate(engine: Any, reference: list[torch.Tensor | None]) -> dict[str, float]:
    """Kind -> mean over its blocks of the rank correlation with the reference."""
    found: dict[str, list[float]] = {}
    for block, score, other in zip(engine.layout.blocks, engine.scores, reference):
        if score is not None and other is not None:
            ranks = torch.stack([score.argsort().argsort().double(), other.argsort().argsort().double()])
            found.setdefault(kind_of(block.kind).plural, []).append(float(torch.corrcoef(ranks)[0, 1]))
    return {f"{kind}, correlation": sum(values) / len(values) for kind, values in found.items()}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Scores of quantized models beside those of float32.")
    parser.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--block-length", type=int, default=128)
    parser.add_argument("--held-out-tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    results = compare(options)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
