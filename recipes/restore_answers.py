"""Restoration on a model's own answers beside restoration on Wikipedia, for a model that follows instructions.

    python -m recipes.restore_answers --cache-dir runs/answers       # SmolLM2-135M-Instruct, two CPU cores, 20 minutes
    python -m recipes.restore_answers --prompts 16 --max-new-tokens 48 --steps 4    # a smaller version

The dense model answers the instructions of ``self_calibration.jsonl``; a quarter of them is held out. It is pruned once
with the other answers. The level is then restored in several ways, on as many tokens each: on Wikipedia, on questions
with the model's own answers (all tokens, or those of answers alone), and on half of each. Prints the loss on the dense
model's answers to the held-out instructions, and the perplexity on held-out text of three domains.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from gisp_hf import GISPConfig, RestoreConfig, restore
from gisp_hf.atomic import write_text_atomic
from gisp_hf.data import AnswerSettings
from gisp_hf.data.self_answers import answered_prompts
from gisp_hf.models.dtype import fast_dtype
from gisp_hf.report import format_table
from recipes import restore_study, self_calibration
from recipes.compare_results import geometric_mean
from recipes.demo_data import DOMAINS

RESULTS = Path("recipes/results/restore_answers")


def held_out_text(name: str, tokenizer: Any, *, count: int) -> dict[str, torch.Tensor]:
    """Token ids of each domain: (count,)."""
    if name == "tiny":
        return {domain: torch.arange(count) % 50 + 4 for domain in DOMAINS}
    return restore_study.held_out_text(tokenizer, count=count)


def study(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the dense model, the level, and each way of restoring it."""
    model, tokenizer = self_calibration.load(options.model)
    calibration, held_out = self_calibration.load_prompts(options.model, options.prompts, seed=options.seed)
    settings = AnswerSettings(options.max_new_tokens, options.batch_size, cache_dir=options.cache_dir)
    size = 128 + options.max_new_tokens
    print(f"the dense model answers {len(calibration)} + {len(held_out)} instructions", flush=True)
    own, target = (
        answered_prompts(model, prompts, tokenizer, block_size=size, settings=settings, seed=options.seed)
        for prompts in (calibration, held_out)
    )
    tokens = sum(len(row.input_ids) for row in own.rows)
    text = self_calibration.wikipedia(options.model, tokenizer, tokens=tokens, count=len(own), seed=options.seed)
    domains = held_out_text(options.model, tokenizer, count=options.evaluation_tokens)

    def measure(level: PreTrainedModel) -> dict[str, Any]:
        found = restore_study.perplexities(level, domains)
        return {"loss": self_calibration.loss_on(level, target, tokenizer), **found, "mean": geometric_mean(found)}

    answers, half = list(own), len(own) // 2
    ways: dict[str, tuple[Any, Literal["all", "answers"]]] = {
        "Wikipedia": (text, "all"),
        "own answers and their questions": (answers, "all"),
        "own answers alone": (answers, "answers"),
        "half Wikipedia, half own": (answers[:half] + text[half:], "all"),
    }
    rows = [{"level": "dense", "tokens": 0, **measure(model)}]
    pruned, _ = self_calibration.load(options.model)
    config = GISPConfig(
        method=options.method, sparsity_levels=(options.sparsity,), num_steps=options.steps, channel_multiple=1
    )
    self_calibration.prune(pruned, tokenizer, own, config=config, batch_size=options.batch_size)
    rows.append({"level": "pruned on own answers", "tokens": 0, **measure(pruned)})
    with tempfile.TemporaryDirectory() as folder:
        pruned.save_pretrained(folder)
        for name, (data, positions) in ways.items():
            level = type(pruned).from_pretrained(folder, dtype=pruned.dtype)
            start = time.perf_counter()
            fit = RestoreConfig(tokens=None, positions=positions, batch_size=options.batch_size)
            record = restore(level, model, data, fit, progress=sys.stderr.isatty())
            seconds = round(time.perf_counter() - start, 1)
            rows.append({"level": f"restored on {name}", "tokens": record.tokens, **measure(level), "seconds": seconds})
            print(f"{name}: {rows[-1]['loss']:.4f} nats a token", flush=True)
    return rows


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Restoration on own answers beside Wikipedia.")
    parser.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2")
    parser.add_argument("--method", default="gisp-activation")
    parser.add_argument("--prompts", type=int, default=0, help="of the file, the first of them; 0: all")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--sparsity", type=float, default=0.4)
    parser.add_argument("--steps", type=int, default=6, help="pruning steps")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--evaluation-tokens", type=int, default=4096, metavar="N", help="of each domain")
    parser.add_argument("--seed", type=int, default=0, help="of the split of instructions, and of the text")
    parser.add_argument("--cache-dir", type=Path, help="keeps the dense model's answers")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, metavar="DIR")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    rows = study(options)
    keys = ("model", "method", "prompts", "max_new_tokens", "sparsity", "steps", "evaluation_tokens", "seed")
    facts = {
        **{key: getattr(options, key) for key in keys},
        "window": restore_study.WINDOW,
        "dtype": str(fast_dtype()),
        "rows": rows,
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_text_atomic(options.output_dir / f"seed{options.seed}.json", json.dumps(facts, indent=1) + "\n")
    columns = {"level": "level", "tokens": "tokens", "loss": "loss on answers, nats"}
    columns |= {**{name: name for name in DOMAINS}, "mean": "geometric mean"}
    formats = {"loss": ".4f", "tokens": ",", **dict.fromkeys((*DOMAINS, "mean"), ",.2f")}
    print(format_table(rows, columns, formats=formats))


if __name__ == "__main__":
    main(sys.argv[1:])
