"""Sizes that suit the hardware: perplexity and speed of levels by ``channel_multiple`` (1, 8, 32, 64, 128).

    python -m recipes.benchmark_sizes                       # SmolLM2-135M-Instruct, two CPU cores, about 10 minutes
    python -m recipes.benchmark_sizes --speed               # speed again, from the removal order that is there
    python -m recipes.benchmark_sizes --report              # table and plot again, from the results that are there
    python -m recipes.benchmark_sizes --shape llama-2-7b    # speed alone, random weights of that shape, a GPU of 80 GB

One run prunes; every multiple is cut from its removal order. The run goes on past the last level, because rounding
gives structures back. Model, calibration text and evaluation text are those of `recipes.compare --fast`. Writes
trajectory.*, results.json, results.md and sizes.png to recipes/results/sizes.
"""

import argparse
import copy
import functools
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from gisp_hf import GISPConfig, Trajectory
from gisp_hf.atomic import write_text_atomic
from gisp_hf.data.shares import split_mixture
from gisp_hf.evaluation import measure_speed, perplexity
from gisp_hf.models import discover
from gisp_hf.models.dtype import fast_dtype
from gisp_hf.models.surgery import as_pruned_model, pruned_shell, slice_structures
from gisp_hf.pruning.selection import minimum_kept, parameter_budget, select
from gisp_hf.pruning.trajectory import Base
from gisp_hf.report import format_table
from recipes.benchmark_pruning import SHAPES
from recipes.calibrated_run import prune
from recipes.compare import EVALUATION_BATCH, draw, environment, load_model
from recipes.compare_results import geometric_mean
from recipes.compare_settings import CONFIG, Comparison, read_config
from recipes.demo_data import DOMAINS, held_out_tokens, load_domain, write_mixture

MULTIPLES = (1, 8, 32, 64, 128)
LEVELS = (0.3, 0.5)
BEYOND = 0.08  # how far the run goes past the last level
RESULTS = Path("recipes/results/sizes")
WORK = Path("runs/sizes")


def make_trajectory(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setup: Comparison, *, work: Path
) -> Trajectory:
    """Prunes ``model`` once, past the last level."""
    work.mkdir(parents=True, exist_ok=True)
    domains = {name: load_domain(name) for name in DOMAINS}
    name = write_mixture(domains, work, shares=split_mixture(setup.calibrations["mixture"]))
    calibration = draw(name, tokenizer, setup.variant(setup.methods[0]), seed=setup.seeds[0])
    config = GISPConfig(
        method=setup.methods[0],
        sparsity_levels=(*setup.levels, round(setup.levels[-1] + BEYOND, 4)),
        num_steps=setup.num_steps,
    )
    folder = work / "levels"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    try:
        pruner = prune(model, tokenizer, calibration, config=config, output_dir=folder, batch_size=setup.batch_size)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return pruner.trajectory


def cut(base: PreTrainedModel, trajectory: Trajectory, level: float, multiple: int) -> PreTrainedModel:
    """A copy of ``base``, sliced down to ``level``."""
    return trajectory.apply(copy.deepcopy(base), sparsity=level, channel_multiple=multiple)


def cut_at(base: PreTrainedModel, trajectory: Trajectory, length: int) -> PreTrainedModel:
    """A copy of ``base`` without the first ``length`` structures of the order, channels not rounded."""
    model, kept = copy.deepcopy(base), trajectory.kept_at(length, channel_multiple=1)
    slice_structures(model, discover(model), kept)
    return as_pruned_model(model, trajectory.layout, [len(keep) for keep in kept])


def bracket(trajectory: Trajectory, sparsity: float) -> dict[int, float]:
    """The lengths of the order just below and at a sparsity, with weights for an interpolation; multiple 1.

    One group of heads can be a tenth of a percent of the model: the length that reaches a sparsity may pass it. One
    length alone is given where it is met to a hundredth of a percent.
    """
    length = trajectory.prefix(sparsity, channel_multiple=1)
    above = trajectory.sparsity_at(length, channel_multiple=1)
    if above - sparsity < 1e-4:
        return {length: 1.0}
    below = trajectory.sparsity_at(length - 1, channel_multiple=1)
    weight = (sparsity - below) / (above - below)
    return {length - 1: 1 - weight, length: weight}


def load_held_out(tokenizer: PreTrainedTokenizerBase, setup: Comparison) -> dict[str, torch.Tensor]:
    """Domain -> tokens that no calibration set holds."""
    return {
        name: held_out_tokens(load_domain(name).held_out, tokenizer, count=setup.evaluation_tokens) for name in DOMAINS
    }


def measure_one(model: PreTrainedModel, held_out: Mapping[str, torch.Tensor], *, window: int) -> dict[str, Any]:
    """Parameters, perplexity of each domain and their geometric mean."""
    found = {
        name: perplexity(model, tokens, window=window, batch_size=EVALUATION_BATCH) for name, tokens in held_out.items()
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "perplexity": found, "geometric_mean": geometric_mean(found)}


def measure_perplexity(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trajectory: Trajectory, setup: Comparison
) -> list[dict[str, Any]]:
    """A row for the unpruned model, and one for each level and multiple.

    ``cost`` is the geometric mean over that of multiple 1 at the sparsity that this multiple reached, less 1; where no
    cut of multiple 1 has that sparsity, logarithms are interpolated between the two beside it.
    """
    held_out = load_held_out(tokenizer, setup)

    def measure(model: PreTrainedModel) -> dict[str, Any]:
        return measure_one(model, held_out, window=setup.window)

    @functools.cache
    def unrounded(length: int) -> float:
        return measure(cut_at(base, trajectory, length))["geometric_mean"]

    def equal(sparsity: float) -> float:
        return math.prod(unrounded(length) ** weight for length, weight in bracket(trajectory, sparsity).items())

    rows = [{"level": 0.0, "multiple": None, "reached": 0.0, **measure(base), "cost": None}]
    for level in setup.levels:
        for multiple in MULTIPLES:
            length = trajectory.prefix(level, channel_multiple=multiple)
            reached = trajectory.sparsity_at(length, channel_multiple=multiple)
            row = {"level": level, "multiple": multiple, "reached": reached}
            row |= measure(cut(base, trajectory, level, multiple))
            row["cost"] = 0.0 if multiple == 1 else row["geometric_mean"] / equal(reached) - 1
            rows.append(row)
            print(f"level {level:g}, multiple {multiple}: {row['geometric_mean']:.2f}, {row['cost']:+.2%}", flush=True)
    return rows


def speed_rows(models: Mapping[str, PreTrainedModel], **facts: Any) -> list[dict[str, Any]]:
    """Tokens per second of models that take turns, and ratios to ``dense`` and to multiple ``1``.

    Args:
        facts: level and batch_size, prompt_tokens, new_tokens and repeats of `measure_speed`; part of every row.
    """
    speeds = measure_speed(models, **{key: value for key, value in facts.items() if key != "level"})
    return [
        {
            "model": name,
            **facts,
            "parameters": sum(parameter.numel() for parameter in models[name].parameters()),
            "prefill": speed.prefill,
            "decode": speed.decode,
            "prefill_to_dense": speed.prefill / speeds["dense"].prefill,
            "prefill_to_one": speed.prefill / speeds["1"].prefill,
            "decode_to_dense": speed.decode / speeds["dense"].decode,
            "decode_to_one": speed.decode / speeds["1"].decode,
        }
        for name, speed in speeds.items()
    ]


def measure_levels(
    base: PreTrainedModel, trajectory: Trajectory, levels: Sequence[float], *, repeats: int, prompt_tokens: int = 256
) -> list[dict[str, Any]]:
    """Speed of every multiple beside the unpruned model, one level after the other."""
    rows = []
    for level in levels:
        models = {"dense": base} | {str(multiple): cut(base, trajectory, level, multiple) for multiple in MULTIPLES}
        rows += speed_rows(
            models, level=level, batch_size=1, prompt_tokens=prompt_tokens, new_tokens=16, repeats=repeats
        )
    return rows


# ---- a shape alone ---------------------------------------------------------------------------------------------------


def random_trajectory(dense: PreTrainedModel, *, end: float) -> Trajectory:
    """A removal order by random scores that differ between layers, for sizes as uneven as those of a real run."""
    layout, config = discover(dense), GISPConfig(sparsity_levels=(end,))
    generator = torch.Generator().manual_seed(0)
    scores = [
        torch.rand(block.size, generator=generator) * (0.5 + torch.rand(1, generator=generator))
        for block in layout.blocks
    ]
    order = [torch.full((block.size,), -1, dtype=torch.int32) for block in layout.blocks]
    minimum, budget = minimum_kept(layout, config), parameter_budget(layout, end)
    for place, (number, index) in enumerate(select(layout, scores, order, minimum=minimum, budget=budget)):
        order[number][index] = place
    return Trajectory(layout=layout, order=tuple(order), config=config, base=Base("random", None, ""))


def measure_shape(
    shape: str, *, levels: Sequence[float], repeats: int, prompt_tokens: int = 512, new_tokens: int = 64
) -> list[dict[str, Any]]:
    """Prefill and decode at batch sizes 1 and 16; weights are random, in bfloat16 on a GPU and float32 elsewhere."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    dtype = torch.bfloat16 if device.type != "cpu" else torch.float32
    with torch.device("meta"):
        dense = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], max_position_embeddings=4096)).to(dtype)
    trajectory = random_trajectory(dense, end=levels[-1] + BEYOND)

    def build(shell: PreTrainedModel) -> PreTrainedModel:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                return type(shell)(shell.config).eval()
        finally:
            torch.set_default_dtype(before)

    rows = []
    for level in levels:
        models = {"dense": build(dense)}
        for multiple in MULTIPLES:
            counts = [len(keep) for keep in trajectory.kept(level, channel_multiple=multiple)]
            models[str(multiple)] = build(pruned_shell(dense, trajectory.layout, counts))
        for batch_size in (1, 16):
            rows += speed_rows(
                models,
                level=level,
                batch_size=batch_size,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                repeats=repeats,
            )
        del models  # before those of the next level are built
    return rows


# ---- results ---------------------------------------------------------------------------------------------------------


def write_report(folder: Path) -> str:
    """Writes ``results.md`` and ``sizes.png`` from ``results.json``; returns the text."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    settings, made = results["settings"], results["environment"]
    names = {"level": "sparsity", "multiple": "multiple", "reached": "reached", "geometric_mean": "geometric mean"}
    rows = [{**row, **row["perplexity"]} for row in results["perplexity"]]
    columns = {**names, "cost": "cost", **{name: name for name in rows[0]["perplexity"]}, "parameters": "parameters"}
    quality = format_table(rows, columns, formats={"level": ".0%", "reached": ".2%", "cost": "+.1%"})
    parts = [
        f"`python -m recipes.benchmark_sizes`: {settings['model']}, {settings['dtype']}, {settings['tokens']:,} "
        f"calibration tokens x {settings['num_steps']} steps, perplexity on {settings['evaluation_tokens']:,} tokens "
        f"of each domain (windows of {settings['window']}). cost: the geometric mean over that of multiple 1 at the "
        "same reached sparsity, less 1.",
        quality,
    ]
    if results["speed"]:
        first = results["speed"][0]
        parts += [
            f"Tokens per second of one prompt of {first['prompt_tokens']} tokens, the best of {first['repeats']} turns "
            f"({made['device']}, threads: {results['speed_environment']['threads']}):",
            speed_table(results["speed"]),
        ]
        plot(results["perplexity"], results["speed"], folder / "sizes.png")
        parts.append("![cost in perplexity and speed of prefill against the multiple](sizes.png)")
    text = "\n\n".join(parts) + "\n"
    write_text_atomic(folder / "results.md", text)
    return text


def speed_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = {"level": "sparsity", "model": "multiple", "batch_size": "batch", "parameters": "parameters"}
    columns |= {"prefill": "prefill, tokens/s", "prefill_to_dense": "/ dense", "prefill_to_one": "/ multiple 1"}
    columns |= {"decode": "decode, tokens/s", "decode_to_dense": "/ dense ", "decode_to_one": "/ multiple 1 "}
    return format_table(rows, columns, formats={"level": ".0%", "prefill": ",.0f", "decode": ",.1f"})


def plot(quality: Sequence[Mapping[str, Any]], speed: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Two panels over the multiples: cost in perplexity, prefill beside multiple 1."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8, 14 / 3), dpi=150, layout="constrained")  # 1200 x 700 pixels, as gisp_hf.report.plots
    left, right = figure.subplots(1, 2)
    names = [str(multiple) for multiple in MULTIPLES]
    for level in dict.fromkeys(row["level"] for row in speed):
        label = f"{level:.0%} sparsity"
        costs = [row["cost"] for row in quality if row["level"] == level]
        ratios = [row["prefill_to_one"] for row in speed if row["level"] == level and row["model"] != "dense"]
        left.plot(names, costs, marker="o", label=label)
        right.plot(names, ratios, marker="o", label=label)
    left.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=1))
    left.set_ylabel("cost in perplexity at equal sparsity")
    right.set_ylabel("prefill, tokens per second / multiple 1")
    for axes in (left, right):
        axes.set_xlabel("channel_multiple")
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend()
    figure.savefig(path)


def run(setup: Comparison, folder: Path, *, work: Path = WORK, speed_only: bool = False, repeats: int = 7) -> str:
    """All of it, or speed alone; returns the text of ``results.md``.

    Raises:
        FileNotFoundError: speed alone was asked for, and there is no removal order in ``folder``.
        ValueError: the removal order was made from another model, or in another dtype.
    """
    file = folder / "results.json"
    base, tokenizer = load_model(setup.models[0], getattr(torch, setup.dtype))
    base.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if speed_only:
        trajectory = Trajectory.load(folder)
        results = json.loads(file.read_text(encoding="utf-8"))
    else:
        trajectory = make_trajectory(copy.deepcopy(base), tokenizer, setup, work=work)
        trajectory.save(folder)
        keys = ("levels", "tokens", "num_steps", "evaluation_tokens", "window", "dtype", "block_size", "batch_size")
        settings = {"model": setup.models[0], **{key: getattr(setup, key) for key in keys}}
        results = {"settings": settings, "environment": environment(), "speed": []}
        results["perplexity"] = measure_perplexity(base, tokenizer, trajectory, setup)
        write_text_atomic(file, json.dumps(results, indent=1) + "\n")  # speed can be measured later
    results["speed"] = measure_levels(base, trajectory, setup.levels, repeats=repeats)
    results["speed_environment"] = environment()
    write_text_atomic(file, json.dumps(results, indent=1) + "\n")
    return write_report(folder)


def read_setup(model: str, dtype: str | None) -> Comparison:
    """The settings of ``recipes.compare --fast``, with the levels of this recipe."""
    dtype = dtype or str(fast_dtype()).removeprefix("torch.")
    changes = {"models": [model], "methods": ["gisp"], "levels": list(LEVELS), "dtype": dtype}
    return read_config(CONFIG, fast=True, changes=changes)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Perplexity and speed of levels, by channel_multiple.")
    parser.add_argument("--model", default="smollm2", help="smollm2 (default), or a folder or Hub id")
    parser.add_argument("--speed", action="store_true", help="only speed, from the removal order in the output folder")
    parser.add_argument("--report", action="store_true", help="only table and plot, from the results that are there")
    parser.add_argument("--shape", choices=list(SHAPES), help="only speed, of random weights of this shape")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each model; the best counts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the one this machine is fast at")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    folder: Path = options.output_dir
    if options.report:
        print(write_report(folder))
    elif options.shape:
        rows = measure_shape(options.shape, levels=LEVELS, repeats=options.repeats)
        result = {"shape": options.shape, "environment": environment(), "speed": rows}
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(folder / f"{options.shape}.json", json.dumps(result, indent=1) + "\n")
        print(speed_table(rows))
    else:
        setup = read_setup(options.model, options.dtype)
        print(run(setup, folder, speed_only=options.speed, repeats=options.repeats))


if __name__ == "__main__":
    main(sys.argv[1:])
