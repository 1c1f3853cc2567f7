"""Do gradients that are summed in bfloat16 give another order than float32 sums?

    python -m recipes.gradient_precision

SmolLM2 in bfloat16, 200 micro-batches of one example, for language modelling and for the margin. Every micro-batch's
gradient goes into two sums: one in bfloat16, as the Trainer's accumulation makes it, and one in float32. Both give
scores of all structures; the table says how alike they are. Writes JSON and table to
recipes/results/gradient_precision. Hardware: two CPU cores with bfloat16 units and 5 GB of memory, five minutes; on
others ten times that.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gisp_hf.atomic import write_text_atomic
from gisp_hf.criteria.base import share_out
from gisp_hf.criteria.taylor import score_entries
from gisp_hf.data import Calibration, load_calibration
from gisp_hf.models import discover
from gisp_hf.models.layout import Layout
from gisp_hf.report import format_table
from recipes.demo_data import load_smollm2, load_wikipedia, split_articles
from recipes.prune_multiple_choice import make_questions, write_calibration

RESULTS = Path("recipes/results/gradient_precision")
LOWEST = 0.2  # share of the structures that a mild level removes
COLUMNS = {
    "objective": "objective",
    "micro_batches": "micro-batches",
    "rank_correlation": "rank correlation",
    "groups": "of groups",
    "channels": "of channels",
    "lowest_alike": f"lowest {LOWEST:.0%} alike",
}


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's, of two tensors of shape ``(n,)``."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def alike(a: torch.Tensor, b: torch.Tensor, share: float) -> float:
    """The share of the lowest ``share`` of ``a`` that is among the lowest of ``b``."""
    count = max(1, int(len(a) * share))
    lowest = [set(x.argsort()[:count].tolist()) for x in (a, b)]
    return len(lowest[0] & lowest[1]) / count


def scores_from(model: PreTrainedModel, layout: Layout, gradients: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """GISP's scores, divided by parameters: per block, shape ``(block.size,)``."""
    scores = []
    for block in layout.blocks:
        score = torch.zeros(block.size)
        for member in block.members:
            weight = model.get_parameter(member.parameter)
            score += share_out(score_entries(weight, gradients[member.parameter], dim=member.dim), member, block.size)
        scores.append(score / block.cost)
    return scores


def compare_sums(model: PreTrainedModel, calibration: Calibration, *, micro_batches: int) -> dict[str, float]:
    """Scores from bfloat16 and float32 sums of the same gradients.

    Raises:
        ValueError: if the calibration set has fewer items than ``micro_batches``.
    """
    if len(calibration.dataset) < micro_batches:
        raise ValueError(f"{len(calibration.dataset)} items are fewer than {micro_batches} micro-batches: raise tokens")
    layout = discover(model)
    names = [member.parameter for block in layout.blocks for member in block.members]
    parameters = {name: model.get_parameter(name) for name in names}
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    coarse = {name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name, parameter in parameters.items()}
    fine = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    for number in tqdm(range(micro_batches), desc="backward passes"):
        batch = dict(calibration.collator([calibration.dataset[number]]))
        labels = batch.pop("labels")
        loss = calibration.loss(model(**batch), labels)
        (loss / micro_batches).backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            coarse[name] += parameter.grad.bfloat16()
            fine[name] += parameter.grad.float()
            parameter.grad = None
    sums = [scores_from(model, layout, gradients) for gradients in (coarse, fine)]
    whole = [torch.cat(scores) for scores in sums]
    by_kind = {
        kind.plural: rank_correlation(*(torch.cat([scores[n] for n in layout.of_kind(kind.name)]) for scores in sums))
        for kind in layout.kinds
    }
    return {"rank_correlation": rank_correlation(*whole), **by_kind, "lowest_alike": alike(*whole, LOWEST)}


def run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, articles: list[str], *, micro_batches: int, length: int
) -> list[dict[str, Any]]:
    """One row for each objective. Questions: how Wikipedia passages go on, one wrong answer each."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        text, questions = Path(folder) / "text.jsonl", Path(folder) / "questions.jsonl"
        text.write_text("".join(json.dumps({"text": article}) + "\n" for article in articles), encoding="utf-8")
        made = make_questions(articles, count=micro_batches, prompt_words=8, choice_words=8)
        write_calibration(made, questions, wrong_choices=1)
        sets = {
            "language modelling": load_calibration(
                str(text), tokenizer, tokens=micro_batches * length, block_size=length
            ),
            "margin": load_calibration(str(questions), tokenizer, tokens=None, objective="margin"),
        }
    for objective, calibration in sets.items():
        found = compare_sums(model, calibration, micro_batches=micro_batches)
        rows.append({"objective": objective, "micro_batches": micro_batches, **found})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="bfloat16 against float32 sums of gradients.")
    parser.add_argument("--micro-batches", type=int, default=200)
    parser.add_argument("--length", type=int, default=64, help="tokens in an example of language modelling")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    model, tokenizer = load_smollm2(torch.bfloat16)
    articles, _ = split_articles(load_wikipedia())
    rows = run(model, tokenizer, articles, micro_batches=options.micro_batches, length=options.length)
    formats = dict.fromkeys(("rank_correlation", "groups", "channels"), ".5f") | {"lowest_alike": ".4f"}
    table = format_table(rows, COLUMNS, formats=formats)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_text_atomic(options.output_dir / "gradient_precision.json", json.dumps(rows, indent=1) + "\n")
    write_text_atomic(options.output_dir / "gradient_precision.md", table + "\n")
    print(f"\n{table}")


if __name__ == "__main__":
    main()
