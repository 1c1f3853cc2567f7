"""Calibration by a model's own answers beside calibration by Wikipedia, on a model that follows instructions.

    python -m recipes.self_calibration                    # SmolLM2-135M-Instruct
    python -m recipes.self_calibration --prompts 16 --max-new-tokens 48 --steps 4    # a smaller version

The dense model answers the instructions of ``self_calibration.jsonl``, written for this purpose. A part of them is held
out. Each method prunes once with the other answers and once with as many tokens of Wikipedia, in as many steps. Prints
the loss on the dense model's answers to the held-out instructions: of the dense model, and of each pruned one. The last
rows let the pruned model answer anew (``--regenerate-every``).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments

import gisp_hf
from gisp_hf import GISPConfig
from gisp_hf.data import AnswerSettings, CandidateCollator
from gisp_hf.data.files import read_json_lines
from gisp_hf.data.self_answers import AnsweredPrompts, answered_prompts
from gisp_hf.evaluation.mode import evaluation_mode
from gisp_hf.losses.objectives import language_modeling_loss
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


def load_prompts(name: str, count: int) -> tuple[list[Any], list[Any]]:
    """Instructions for calibration, and those that are held out."""
    prompts = [row["prompt"] for row in read_json_lines(PROMPTS, count or None)]
    if name == "tiny":  # its tokenizer has no chat template
        prompts = [f"w{4 + number % 50} w{4 + 3 * number % 50}" for number in range(len(prompts))]
    held_out = prompts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [prompt for number, prompt in enumerate(prompts, 1) if number % HELD_OUT_EVERY], held_out


def wikipedia(name: str, tokenizer: PreTrainedTokenizerBase, *, tokens: int, count: int) -> list[dict[str, Any]]:
    """``count`` blocks with that many tokens in all."""
    if name == "tiny":
        from tests.tiny import tiny_blocks

        return tiny_blocks(count, 16)
    from recipes.demo_data import load_wikipedia, pack_blocks, split_articles

    texts, _ = split_articles(load_wikipedia())
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
    model, tokenizer = load(options.model)
    calibration, held_out = load_prompts(options.model, options.prompts)
    settings = AnswerSettings(options.max_new_tokens, options.batch_size, cache_dir=options.cache_dir)

    def answers(prompts: list[Any]) -> AnsweredPrompts:
        size = 128 + options.max_new_tokens
        return answered_prompts(model, prompts, tokenizer, block_size=size, settings=settings, seed=options.seed)

    print(f"the dense model answers {len(calibration)} instructions, and {len(held_out)} held-out ones", flush=True)
    own, target = answers(calibration), answers(held_out)
    tokens = sum(len(row.input_ids) for row in own.rows)
    text = wikipedia(options.model, tokenizer, tokens=tokens, count=len(own))
    dense = loss_on(model, target, tokenizer)
    rows: list[dict[str, Any]] = [{"method": "", "calibration": "dense model", "loss": dense, "above": 0.0}]
    for method in options.methods:
        config = GISPConfig(
            method=method, sparsity_levels=(options.sparsity,), num_steps=options.steps, channel_multiple=1
        )
        for name in ("wikipedia", "own answers", "own answers, anew"):
            anew = options.regenerate_every if name.endswith("anew") else 0.0
            if name.endswith("anew") and not anew:
                continue
            pruned, _ = load(options.model)
            data = (
                text
                if name == "wikipedia"
                else AnsweredPrompts(own.prompts, tokenizer, settings=settings, seed=options.seed)
            )
            if isinstance(data, AnsweredPrompts):
                data.take(own.answers)
            prune(pruned, tokenizer, data, config=config, batch_size=options.batch_size, regenerate_every=anew)
            loss = loss_on(pruned, target, tokenizer)
            rows.append({"method": method, "calibration": name, "loss": loss, "above": loss - dense})
            print(f"{method}, {name}: {loss:.4f} nats a token, {loss - dense:.4f} above the dense model", flush=True)
    columns = {"method": "method", "calibration": "calibration", "loss": "loss, nats", "above": "above dense"}
    print("\n" + format_table(rows, columns, formats={"loss": ".4f", "above": ".4f"}))
    facts = {key: getattr(options, key) for key in ("sparsity", "steps", "max_new_tokens", "seed", "regenerate_every")}
    return {
        **facts,
        "version": gisp_hf.__version__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "calibration_prompts": len(calibration),
        "held_out_prompts": len(held_out),
        "calibration_tokens": tokens,
        "held_out_answer_tokens": sum(map(len, target.answers)),
        "rows": rows,
    }


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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-dir", type=Path, help="keeps the dense model's answers")
    parser.add_argument("--output", type=Path, help="write the results there as JSON")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    torch.manual_seed(options.seed)
    results = compare(options)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
