"""Language modelling against the margin on a decision task: same model, tokens and steps for both.

    python -m recipes.prune_multiple_choice

Hardware: two CPU cores or a GPU. Time: about an hour on the cores.
Writes to runs/multiple_choice: results.json, results.md, accuracy.png and calibration.jsonl (the questions).

The task: given the beginning of a Wikipedia passage, tell how it goes on from three continuations taken from other
articles. Questions for calibration and for the test come from different articles. Both objectives read the same file of
questions: the margin with its wrong continuations, language modelling as packed text, prompts with their true
continuations. The token budget is the same, so language modelling sees more passages.
"""

import argparse
import copy
import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gisp_hf import GISPConfig, Trajectory
from gisp_hf.data import load_calibration
from gisp_hf.evaluation import multiple_choice_accuracy, perplexity
from gisp_hf.models.dtype import describe_dtypes
from gisp_hf.pruning.selection import removed_mask
from gisp_hf.report import COLOURS, MARKERS, format_table
from recipes.calibrated_run import prune
from recipes.demo_data import held_out_tokens, load_smollm2, load_wikipedia, split_articles

OBJECTIVES = {"language_modeling": "language modelling", "margin": "margin"}
MEASURES = ("accuracy", "accuracy_normalized", "perplexity")
CHOICES = 4
CALIBRATION_QUESTIONS = 4_000  # of which each seed draws what its budget holds
BLOCK_SIZE = 128  # tokens in a block of language modelling, and in a window of perplexity
COLUMNS = {
    "objective": "calibration",
    "level": "sparsity",
    "accuracy": "accuracy",
    "accuracy_std": "std",
    "accuracy_normalized": "accuracy, normalised",
    "accuracy_normalized_std": "std",
    "perplexity": "ppl, 128",
    "perplexity_std": "std",
    "removed_alike": "removed alike",
    "seeds": "seeds",
}


def make_questions(
    articles: Sequence[str], *, count: int, prompt_words: int, choice_words: int, seed: int = 0
) -> list[dict[str, Any]]:
    """``count`` questions ``{"prompt", "choices", "label"}`` from passages that do not overlap.

    A passage is ``prompt_words + choice_words`` words in one paragraph. The wrong choices are the same stretch of
    passages from other articles, all different, and the right one stands anywhere among them.

    Raises:
        ValueError: the articles hold too few passages, or there are too few articles.
    """
    generator = random.Random(seed)
    length = prompt_words + choice_words
    passages = []  # (article, prompt, continuation)
    for article, text in enumerate(articles):
        for paragraph in text.split("\n\n"):
            words = paragraph.split()
            for start in range(0, len(words) - length + 1, length):
                border = start + prompt_words
                prompt, rest = words[start:border], words[border : start + length]
                passages.append((article, " ".join(prompt), " " + " ".join(rest)))
    by_article: dict[int, list[str]] = {}
    for article, _, continuation in passages:
        by_article.setdefault(article, []).append(continuation)
    if len(passages) < count or len(by_article) < CHOICES:
        raise ValueError(
            f"{len(articles)} articles hold {len(passages)} passages of {length} words in {len(by_article)} of them; "
            f"{count} in at least {CHOICES} are needed: give more text, or ask for fewer or shorter passages"
        )
    questions = []
    for article, prompt, right in generator.sample(passages, count):
        others = generator.sample([other for other in by_article if other != article], CHOICES - 1)
        choices = [generator.choice(by_article[other]) for other in others]
        label = generator.randrange(CHOICES)
        choices.insert(label, right)
        questions.append({"prompt": prompt, "choices": choices, "label": label})
    return questions


def write_calibration(questions: Sequence[Mapping[str, Any]], path: Path, *, wrong_choices: int) -> None:
    """The questions as a file for `load_calibration`: prompt, correct, incorrect.

    Fewer ``wrong_choices`` leave room for more questions in the same token budget.
    """
    with path.open("w", encoding="utf-8") as file:
        for question in questions:
            wrong = list(question["choices"])
            right = wrong.pop(question["label"])
            record = {"prompt": question["prompt"], "correct": [right], "incorrect": wrong[:wrong_choices]}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    calibration_questions: Sequence[Mapping[str, Any]],
    test_questions: Sequence[Mapping[str, Any]],
    held_out: torch.Tensor,
    output_dir: Path,
    config: GISPConfig,
    tokens: int,
    seeds: Sequence[int],
    wrong_choices: int = 1,
    batches: int = 8,
    keep_checkpoints: bool = False,
) -> dict[str, Any]:
    """Prunes a copy of ``model`` for every seed and objective, measures all levels, writes table and plot.

    Args:
        tokens: calibration tokens in every step, the same for both objectives; a multiple of 128.
        seeds: each draws its own questions from ``calibration_questions``; the test questions never change.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    file = output_dir / "calibration.jsonl"
    write_calibration(calibration_questions, file, wrong_choices=wrong_choices)
    runs = [measure(model, tokenizer, test_questions, held_out) | {"objective": "dense", "level": 0.0, "seed": None}]
    print(f"dense: {runs[0]}", flush=True)
    provenance = []
    trajectories: dict[str, list[Trajectory]] = {objective: [] for objective in OBJECTIVES}
    for seed in seeds:
        for objective in OBJECTIVES:
            start = time.perf_counter()
            calibration = load_calibration(
                str(file), tokenizer, objective=objective, tokens=tokens, block_size=BLOCK_SIZE, seed=seed
            )
            provenance.append(calibration.provenance)
            with tempfile.TemporaryDirectory() as scratch:
                folder = (output_dir if keep_checkpoints else Path(scratch)) / f"{objective}-seed{seed}"
                pruner = prune(
                    copy.deepcopy(model),
                    tokenizer,
                    calibration,
                    config=config,
                    output_dir=folder,
                    batch_size=-(-len(calibration.dataset) // batches),  # rounded up: the last one may be smaller
                )
                trajectories[objective].append(pruner.trajectory)
                for level, path in pruner.level_folders.items():
                    pruned = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype).to(model.device)
                    row = measure(pruned, tokenizer, test_questions, held_out)
                    runs.append(row | {"objective": objective, "level": level, "seed": seed})
                    print(f"{objective}, seed {seed}, {level:.0%}: {row}", flush=True)
            print(f"{objective}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
        # after every seed: an interrupted run keeps what it has measured
        results = {
            "config": config.to_dict(),
            "tokens": tokens,
            "batches": batches,
            "wrong_choices": wrong_choices,
            "dtype": str(model.dtype),
            "calibration_questions": len(calibration_questions),
            "test_questions": len(test_questions),
            "test_tokens": len(held_out),
            "rows": summarize(runs, trajectories),
            "runs": runs,
            "calibration": provenance,
        }
        table = write_results(results, output_dir)
    print(f"\n{table}\n\nTable and plot are in {output_dir}")
    return results


def write_results(results: Mapping[str, Any], output_dir: Path) -> str:
    """Writes results.json, results.md and accuracy.png, and returns the table."""
    spreads = {f"{name}{end}": ".3f" for name in MEASURES[:2] for end in ("", "_std")}
    table = format_table(results["rows"], COLUMNS, formats={"level": ".0%", "removed_alike": ".0%", **spreads})
    (output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (output_dir / "results.md").write_text(table + "\n", encoding="utf-8")
    plot_accuracy(results["rows"], output_dir / "accuracy.png", chance=1 / CHOICES)
    return table


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Mapping[str, Any]],
    held_out: torch.Tensor,
) -> dict[str, Any]:
    """Accuracy on the questions and perplexity of running text."""
    results = multiple_choice_accuracy(model, tokenizer, questions, batch_size=64)
    return {**results, "perplexity": perplexity(model, held_out, window=BLOCK_SIZE, batch_size=16)}


def summarize(
    runs: Sequence[Mapping[str, Any]], trajectories: Mapping[str, Sequence[Trajectory]]
) -> list[dict[str, Any]]:
    """A row for each objective and level: mean and standard deviation (n - 1) over the seeds, None for one seed."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in runs:
        groups.setdefault((row["objective"], row["level"]), []).append(row)
    rows = []
    for (objective, level), members in groups.items():
        row: dict[str, Any] = {"objective": objective, "level": level, "seeds": len(members)}
        for name in MEASURES:
            values = [member[name] for member in members]
            row[name] = statistics.fmean(values)
            row[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        row["removed_alike"] = removed_alike(trajectories.get(objective, ()), level)
        rows.append(row)
    return rows


def removed_alike(trajectories: Sequence[Trajectory], level: float) -> float | None:
    """Of what two seeds removed, the share that both did: mean over the pairs, None without a pair.

    Low values say that the calibration set is too small to tell what matters: each draw gives another model.
    """
    removed = []
    for trajectory in trajectories:
        length, multiples = trajectory.prefix(level), trajectory.config.multiples
        masks = [
            removed_mask(block, order, length=length, multiples=multiples)
            for block, order in zip(trajectory.layout.blocks, trajectory.order)
        ]
        removed.append(torch.cat(masks))
    shares = [2 * int((a & b).sum()) / int(a.sum() + b.sum()) for a, b in combinations(removed, 2)]
    return statistics.fmean(shares) if shares else None


def plot_accuracy(rows: Sequence[Mapping[str, Any]], path: Path, *, chance: float) -> None:
    """Accuracy against sparsity: mean of the seeds, with a bar of one standard deviation to either side."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8, 14 / 3), dpi=150, layout="constrained")  # 1200 x 700 pixels, as gisp_hf.report.plots
    axes = figure.add_subplot()
    dense = rows[0]
    for i, (objective, label) in enumerate(OBJECTIVES.items()):
        points = sorted((row for row in rows if row["objective"] == objective), key=lambda row: row["level"])
        axes.errorbar(
            [0.0, *(row["level"] for row in points)],
            [dense["accuracy"], *(row["accuracy"] for row in points)],
            yerr=[0.0, *(row["accuracy_std"] or 0.0 for row in points)],
            label=f"{label} (mean of {points[0]['seeds']} seeds, bars: one standard deviation)",
            color=COLOURS[i],
            marker=MARKERS[i],
            linewidth=2,
            capsize=4,
        )
    axes.axhline(chance, color="#666666", linestyle=":", label=f"chance ({chance:.0%})")
    axes.set(
        xlabel="sparsity (decoder-layer parameters removed)",
        ylabel="multiple-choice accuracy",
        xlim=(-0.01, None),
        ylim=(0, None),
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", framealpha=1, edgecolor="white")  # below the line of chance
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prune for a decision task: language modelling against the margin.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/multiple_choice"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one calibration draw each")
    parser.add_argument("--num-steps", type=int, default=8, help="pruning steps up to the highest level")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.2, 0.4, 0.5])
    parser.add_argument("--tokens", type=int, default=16_384, help="calibration tokens in every step")
    parser.add_argument("--questions", type=int, default=400, help="test questions")
    parser.add_argument("--prompt-words", type=int, default=8)
    parser.add_argument("--choice-words", type=int, default=8)
    parser.add_argument("--test-tokens", type=int, default=4096, help="held-out tokens for perplexity")
    parser.add_argument("--wrong-choices", type=int, default=1, help="wrong continuations of a calibration question")
    parser.add_argument("--batches", type=int, default=8, help="micro-batches of a step")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="default: the one that this machine is fast at"
    )
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep the pruned models in the output folder")
    options = parser.parse_args()
    model, tokenizer = load_smollm2(getattr(torch, options.dtype) if options.dtype else None)
    print(f"{str(model.dtype).removeprefix('torch.')} weights ({describe_dtypes()})")
    calibration, held_out = split_articles(load_wikipedia())
    sizes = {"prompt_words": options.prompt_words, "choice_words": options.choice_words}
    run(
        model,
        tokenizer,
        calibration_questions=make_questions(calibration, count=CALIBRATION_QUESTIONS, **sizes),
        test_questions=make_questions(held_out, count=options.questions, **sizes),
        held_out=held_out_tokens(held_out, tokenizer, count=options.test_tokens),
        output_dir=options.output_dir,
        config=GISPConfig(num_steps=options.num_steps, sparsity_levels=tuple(options.levels)),
        tokens=options.tokens,
        seeds=options.seeds,
        wrong_choices=options.wrong_choices,
        batches=options.batches,
        keep_checkpoints=options.keep_checkpoints,
    )


if __name__ == "__main__":
    main()
