"""Would low-rank corrections in the elastic file pay? SmolLM2 at one level.

    python -m recipes.low_rank_gap ELASTIC RESTORED --ranks 8 16 64

ELASTIC is an elastic checkpoint with shared weights, RESTORED one of its levels, restored on its own. The difference of
their output projections is cut to a rank, so that the squared error on the level's own inputs (calibration text) is
smallest: by the singular values of ``D G^(1/2)``. Prints perplexity on held-out text of three domains at each rank, and
what the corrections weigh beside the elastic file. Hardware: two CPU cores, 4 GB of memory.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

import gisp_hf  # noqa: F401  teaches the Auto classes levels and elastic checkpoints
from gisp_hf.atomic import write_text_atomic
from gisp_hf.recovery.grams import Grams
from gisp_hf.report import format_table
from recipes import restore_study
from recipes.compare_results import geometric_mean
from recipes.demo_data import DOMAINS
from recipes.restore_study import MIXTURE, TOKENS, WINDOW, WORK

RESULTS = Path("recipes/results/elastic/low_rank")


def load_level(elastic: Path, sparsity: float) -> PreTrainedModel:
    """A level of an elastic checkpoint with its structures in their original order, as a restored one has them."""
    model: Any = AutoModelForCausalLM.from_pretrained(elastic, sparsity=sparsity, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def projections(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The shared weights: ``o_proj`` and ``down_proj`` of every layer."""
    ends = ("o_proj", "down_proj")
    return {name: part for name, part in model.named_modules() if name.endswith(ends) and isinstance(part, nn.Linear)}


@torch.no_grad()
def grams_of(model: PreTrainedModel, batches: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sums of ``x x^T`` over the inputs of each projection: (n, n), float32."""
    sums = {name: Grams(part.in_features) for name, part in projections(model).items()}
    handles = [
        part.register_forward_pre_hook(lambda _, args, name=name: sums[name].add(args[0]))
        for name, part in projections(model).items()
    ]
    for ids in tqdm(batches, desc="Inputs", unit="batch"):
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: found.gram for name, found in sums.items()}


def factors_of(change: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``left`` (m, k) and ``right`` (k, n), in float64, whose product is ``change`` (m, n).

    ``left[:, :rank] @ right[:rank]`` is the matrix of that rank nearest to it on inputs with the Gram matrix ``gram``
    (n, n).
    """
    values, vectors = torch.linalg.eigh(gram.double())
    scale = values.clamp_min(1e-6 * float(values.max())).sqrt()
    u, s, v = torch.linalg.svd((change.double() @ vectors) * scale, full_matrices=False)
    return u * s, (v / scale) @ vectors.T


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("elastic", type=Path)
    parser.add_argument("restored", type=Path)
    parser.add_argument("--sparsity", type=float, default=0.5, metavar="FRACTION", help="of the level (default: 0.5)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help="of calibration")
    parser.add_argument("--evaluation-tokens", type=int, default=4096, metavar="N", help="of each domain")
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="text and base model")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args(argv)
    dtype = restore_study.dtype_here()
    material = restore_study.prepare(options.work, evaluation_tokens=options.evaluation_tokens, dtype=dtype)
    level = load_level(options.elastic, options.sparsity)
    own = AutoModelForCausalLM.from_pretrained(options.restored, dtype=torch.float32)
    text = restore_study.draw(MIXTURE, material.tokenizer, tokens=options.tokens, seed=0, work=options.work)
    grams = grams_of(level, restore_study.batches_of_text(text))
    shared = {name: part.weight.detach().clone() for name, part in projections(level).items()}
    goal = {name: part.weight.detach() for name, part in projections(own).items()}
    file = sum(path.stat().st_size for path in options.elastic.glob("model*.safetensors"))
    changes = {name: goal[name] - weight for name, weight in shared.items()}
    factors = {name: factors_of(change, grams[name]) for name, change in tqdm(changes.items(), desc="Factors")}
    rows = []
    for rank in [0, *options.ranks, None]:
        weight = 0
        for name, part in projections(level).items():
            change = changes[name]
            weight += change.numel() if rank is None else rank * sum(change.shape)
            if rank is not None:
                left, right = factors[name]
                change = (left[:, :rank] @ right[:rank]).float()
            part.weight.data.copy_(shared[name] + change)
        found = material.perplexities(level)
        share = dtype.itemsize * weight / file
        rows.append({"rank": "full" if rank is None else rank, **found, "mean": geometric_mean(found), "weight": share})
    facts = {"sparsity": options.sparsity, "tokens": options.tokens, "window": WINDOW, "rows": rows}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_text_atomic(options.output_dir / f"level-{options.sparsity:g}.json", json.dumps(facts, indent=1) + "\n")
    columns = {"rank": "rank", **{name: name for name in DOMAINS}, "mean": "geometric mean", "weight": "of the file"}
    print(format_table(rows, columns, formats={**dict.fromkeys((*DOMAINS, "mean"), ",.2f"), "weight": ".2%"}))


if __name__ == "__main__":
    main()
