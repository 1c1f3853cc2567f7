"""Calibration by a model's own answers beside calibration by Wikipedia, on a model that follows instructions.

    python -m recipes.self_calibration --seeds 0 1 2 --regenerate-every 0.1 --cache-dir runs/answers \\
        --output recipes/results/self_calibration/smollm2.json           # SmolLM2-135M-Instruct
    python -m recipes.self_calibration --prompts 16 --max-new-tokens 48 --steps 4    # a smaller version

The dense model answers the 160 instructions of ``self_calibration.jsonl``, written for this purpose. A quarter of them,
drawn by the seed, is held out. Each method prunes once with the other answers and once with as many tokens of
Wikipedia (articles in an order drawn by the seed), in as many steps. Prints the loss on the dense model's answers to
the held-out instructions: of the dense model, and of each pruned one. The last rows let the pruned model answer anew
(``--regenerate-every``).

With ``--output`` each row is written as soon as it is there, and the same command goes on after the last one.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments

import gisp_hf
from gisp_hf import GISPConfig
from gisp_hf.atomic import write_text_atomic
from gisp_hf.data import AnswerSettings, CandidateCollator
from gisp_hf.data.files import read_json_lines
from gisp_hf.data.self_answers import AnsweredPrompts, answered_prompts
from gisp_hf.evaluation.mode import evaluation_mode
from gisp_hf.losses.objectives import language_modeling_loss
from gisp_hf.models.dtype import fast_dtype
from gisp_hf.pruner import GISPPruner
from gisp_hf.report import format_table
from gisp_hf.training.regenerate import RegenerateAnswers

PROMPTS = Path(__file__).with_name("self_calibration.jsonl")
HELD_OUT_EVERY = 4


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if name == "tiny":
        from tests.tiny import tiny_model, tiny_tokenizer

        return tiny_model(max_position_embeddings=256), tiny_tokenizer()
    from recipes.demo_data import load_smollm2

    return load_smollm2()


def load_prompts(name: str, count: int, *, seed: int) -> tuple[list[Any], list[Any]]:
    """Instructions for calibration, and those that are held out: a quarter of them, by the seed."""
    prompts = [row["prompt"] for row in read_json_lines(PROMPTS, count or None)]
    if name == "tiny":  # its tokenizer has no chat template
        prompts = [f"w{4 + number % 50} w{4 + 3 * number % 50}" for number in range(len(prompts))]
    random.Random(seed).shuffle(prompts)
    held_out = prompts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [prompt for number, prompt in enumerate(prompts, 1) if number % HELD_OUT_EVERY], held_out


def wikipedia(
    name: str, tokenizer: PreTrainedTokenizerBase, *, tokens: int, count: int, seed: int
) -> list[dict[str, Any]]:
    """``count`` blocks with that many tokens in all, of articles in seeded order."""
    if name == "tiny":
        from tests.tiny import tiny_blocks

        return tiny_blocks(count, 16, seed=seed)
    from recipes.demo_data import load_wikipedia, pack_blocks, split_articles

    texts, _ = split_articles(load_wikipedia())
    random.Random(seed).shuffle(texts)
    return pack_blocks(texts, tokenizer, length=-(-tokens // count), count=count)


def loss_on(model: PreTrainedModel, answers: AnsweredPrompts, tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean cross-entropy of the answers' tokens, in nats."""
    collator, total, count = CandidateCollator(tokenizer), 0.0, 0
    with evaluation_mode(model):
        for start in range(0, len(answers), 4):
            batch = collator([answers[i] for i in range(start, min(start + 4, len(answers)))])
            labels = batch.pop("labels")
            targets = int((labels[:, 1:] != -100).sum())
            output = model(**{key: value.to(model.device) for key, value in batch.items()})
            total += float(language_modeling_loss(output, labels)) * targets
            count += targets
    return total / count


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset | list[dict[str, Any]],
    *,
    config: GISPConfig,
    batch_size: int,
    regenerate_every: float = 0.0,
) -> None:
    """Prunes ``model`` in place: each step sees all of ``data``."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=f"{folder}/trainer",
            max_steps=config.num_steps,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=-(-len(data) // batch_size),  # type: ignore[arg-type]
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        pruner = GISPPruner(config, f"{folder}/levels")
        again = [RegenerateAnswers(pruner, data, every=regenerate_every)] if regenerate_every else []  # type: ignore[arg-type]
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=data,  # type: ignore[arg-type]
            data_collator=CandidateCollator(tokenizer),
            compute_loss_func=language_modeling_loss,
            processing_class=tokenizer,
            callbacks=[pruner, *again],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All rows; those that ``--output`` holds already are not measured again."""
    facts = {
        "model": options.model,
        **{
            key: getattr(options, key) for key in ("prompts", "sparsity", "steps", "max_new_tokens", "regenerate_every")
        },
        "dtype": str(fast_dtype()),
        "version": gisp_hf.__version__,
    }
    results = read_results(options.output, facts) or {**facts, "rows": []}
    for seed in options.seeds:
        measure(options, results, seed=seed)
    columns = {"seed": "seed", "method": "method", "calibration": "calibration"}
    columns |= {"loss": "loss, nats", "above": "above dense"}
    print("\n" + format_table(results["rows"], columns, formats={"loss": ".4f", "above": ".4f"}))
    if len(options.seeds) > 1:
        print(
            "\nmean over the seeds\n"
            + format_table(means(results["rows"]), columns, formats={"loss": ".4f", "above": ".4f"})
        )
    return results


def measure(options: argparse.Namespace, results: dict[str, Any], *, seed: int) -> None:
    """Adds the rows of one seed to ``results``, and writes them as they come."""
    kinds = ["wikipedia", "own answers", *(["own answers, anew"] if options.regenerate_every else [])]
    wanted = [("", "dense model"), *((method, kind) for method in options.methods for kind in kinds)]
    done = {(row["method"], row["calibration"]) for row in results["rows"] if row["seed"] == seed}
    left = [pair for pair in wanted if pair not in done]
    if not left:
        return
    model, tokenizer = load(options.model)
    calibration, held_out = load_prompts(options.model, options.prompts, seed=seed)
    settings = AnswerSettings(options.max_new_tokens, options.batch_size, cache_dir=options.cache_dir)

    def answers(prompts: list[Any]) -> AnsweredPrompts:
        size = 128 + options.max_new_tokens
        return answered_prompts(model, prompts, tokenizer, block_size=size, settings=settings, seed=seed)

    print(f"seed {seed}: the dense model answers {len(calibration)} + {len(held_out)} instructions", flush=True)
    own, target = answers(calibration), answers(held_out)
    tokens = sum(len(row.input_ids) for row in own.rows)
    sizes = {"calibration_prompts": len(calibration), "held_out_prompts": len(held_out), "calibration_tokens": tokens}
    sizes["held_out_answer_tokens"] = sum(map(len, target.answers))
    text = wikipedia(options.model, tokenizer, tokens=tokens, count=len(own), seed=seed)
    dense = loss_on(model, target, tokenizer)
    for method, kind in left:
        loss, start = dense, time.perf_counter()
        if method:
            pruned, _ = load(options.model)
            data: Any = text
            if kind != "wikipedia":
                data = AnsweredPrompts(own.prompts, tokenizer, settings=settings, seed=seed)
                data.take(own.answers)
            config = GISPConfig(
                method=method, sparsity_levels=(options.sparsity,), num_steps=options.steps, channel_multiple=1
            )
            every = options.regenerate_every if kind == "own answers, anew" else 0.0
            prune(pruned, tokenizer, data, config=config, batch_size=options.batch_size, regenerate_every=every)
            loss = loss_on(pruned, target, tokenizer)
        row = {"seed": seed, "method": method, "calibration": kind, "loss": loss, "above": loss - dense, **sizes}
        results["rows"].append({**row, "seconds": round(time.perf_counter() - start, 1)})
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(options.output, json.dumps(results, indent=1) + "\n")
        print(f"seed {seed}, {method} {kind}: {loss:.4f} nats a token, {loss - dense:.4f} above", flush=True)


def read_results(path: Path | None, facts: dict[str, Any]) -> dict[str, Any] | None:
    """The rows that an earlier run has written, if it had the same settings.

    Raises:
        ValueError: if it had others.
    """
    if path is None or not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    for key, value in facts.items():
        if found.get(key) != value:
            raise ValueError(f"{path} was made with {key}={found.get(key)!r}, not {value!r}; give another --output")
    return found


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a method and calibration: the mean of its seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["calibration"]), []).append(row)
    return [
        {
            "seed": f"{len(group)} seeds",
            "method": method,
            "calibration": kind,
            "loss": sum(row["loss"] for row in group) / len(group),
            "above": sum(row["above"] for row in group) / len(group),
        }
        for (method, kind), group in groups.items()
    ]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Own answers beside Wikipedia as calibration data.")
    parser.add_argument("--model", choices=["smollm2", "tiny"], default="smollm2")
    parser.add_argument("--methods", nargs="+", default=["gisp-activation", "gisp"])
    parser.add_argument("--prompts", type=int, default=0, help="of the file, the first of them; 0: all")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--sparsity", type=float, default=0.4)
    parser.add_argument("--steps", type=int, default=16, help="pruning steps")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--regenerate-every", type=float, default=0.0, help="of sparsity; 0: never")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each with held-out instructions of its own")
    parser.add_argument("--cache-dir", type=Path, help="keeps the dense model's answers")
    parser.add_argument("--output", type=Path, help="write the rows there as JSON, and go on from them")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    compare(options)


if __name__ == "__main__":
    main(sys.argv[1:])
