"""Would a knapsack round better than ``channel_multiple`` does, which always rounds up? Measured beside it.

    python -m recipes.benchmark_sizes       # first: makes the removal order
    python -m recipes.knapsack_rounding     # SmolLM2-135M-Instruct, two CPU cores, about 5 minutes

Writes knapsack.json to recipes/results/sizes.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gisp_hf import Trajectory
from gisp_hf.atomic import write_text_atomic
from gisp_hf.models.layout import Layout
from gisp_hf.report import format_table
from recipes.benchmark_sizes import RESULTS, bracket, cut, cut_at, load_held_out, measure_one, read_setup
from recipes.compare import load_model
from recipes.compare_settings import Comparison

MULTIPLES = (64, 128)


def in_multiples(layout: Layout, order: Sequence[torch.Tensor], multiples: Mapping[str, int]) -> list[torch.Tensor]:
    """The same structures in an order in which those of a layer go by whole multiples.

    Rounding up alone gives every layer its remainder back, even one structure short of the next multiple, and all
    layers have to go further to reach the sparsity. Here the next ``multiple`` structures of a layer are one item, and
    items are ranked by the mean position of their structures: a layer gets its remainder back if less than about half
    of the item would be gone, and otherwise loses the rest of it. Items of a kind cost the same, so that this ranking
    solves the knapsack: which items go for a given number of parameters. Items are prefixes of a layer's own order, so
    that levels stay nested.

    Args:
        order: per block, positions, int32 of shape ``(block.size,)``; -1 = never removed.
        multiples: kind -> multiple.

    Returns:
        positions as in ``order``. Structures too few for a whole item come last. An order that goes by these multiples
        already comes back as it is.
    """
    items: list[tuple[float, int, list[int]]] = []
    rest: list[tuple[float, int, list[int]]] = []
    for number, (block, positions) in enumerate(zip(layout.blocks, order)):
        multiple = multiples.get(block.kind, 1)
        gone = int((positions >= 0).sum())
        structures = positions.argsort()[block.size - gone :].tolist()
        start = 0
        while start < gone:
            size = (block.size - start) % multiple or multiple  # the first item leaves a multiple
            item = structures[start : start + size]
            mean = float(positions[item].double().mean())
            (items if len(item) == size else rest).append((mean, number, item))
            start += size
    result = [torch.full_like(positions, -1) for positions in order]
    place = 0
    for _, number, item in sorted(items) + sorted(rest):
        for structure in item:
            result[number][structure] = place
            place += 1
    return result


def with_knapsack(trajectory: Trajectory, multiple: int) -> Trajectory:
    """The same run, in an order whose channels go by whole multiples."""
    order = in_multiples(trajectory.layout, trajectory.order, {"mlp": multiple})
    return replace(trajectory, order=tuple(order))


def run(setup: Comparison, folder: Path, *, multiples: Sequence[int] = MULTIPLES) -> list[dict[str, Any]]:
    """A row for each level and multiple: rounded up, by the knapsack, and multiple 1 at the same reached sparsity.

    Raises:
        FileNotFoundError: there is no removal order in ``folder``.
    """
    trajectory = Trajectory.load(folder)
    base, tokenizer = load_model(setup.models[0], getattr(torch, setup.dtype))
    held_out = load_held_out(tokenizer, setup)

    def measure(model: PreTrainedModel) -> float:
        return measure_one(model, held_out, window=setup.window)["geometric_mean"]

    @functools.cache
    def unrounded(length: int) -> float:
        return measure(cut_at(base, trajectory, length))

    def equal(sparsity: float) -> float:
        return math.prod(unrounded(length) ** weight for length, weight in bracket(trajectory, sparsity).items())

    rows = []
    for level in setup.levels:
        for multiple in multiples:
            row: dict[str, Any] = {"level": level, "multiple": multiple}
            for name, order in (("up", trajectory), ("knapsack", with_knapsack(trajectory, multiple))):
                length = order.prefix(level, channel_multiple=multiple)
                reached = order.sparsity_at(length, channel_multiple=multiple)
                mean = measure(cut(base, order, level, multiple))
                row |= {f"{name}_reached": reached, name: mean, f"{name}_cost": mean / equal(reached) - 1}
            rows.append(row)
            print(row, flush=True)
    write_text_atomic(folder / "knapsack.json", json.dumps(rows, indent=1) + "\n")
    return rows


def main() -> None:
    rows = run(read_setup("smollm2", None), RESULTS)
    columns = {"level": "sparsity", "multiple": "multiple", "up": "rounded up", "up_cost": "cost"}
    columns |= {"knapsack": "knapsack", "knapsack_cost": "cost "}
    print(format_table(rows, columns, formats={"level": ".0%", "up_cost": "+.1%", "knapsack_cost": "+.1%"}))


if __name__ == "__main__":
    main()
