"""Compare pruning methods: the same model, calibration tokens and sparsities; quality on three domains, speed, cost.

    make compare                                    # or: python -m recipes.compare
    python -m recipes.compare --fast                # six methods, two levels, fewer tokens
    python -m recipes.compare my.yaml --methods gisp one-shot --calibrations mixture
    python -m recipes.compare --report              # table and plots again, from the results that are there

Settings: recipes/compare.yaml. Every cell (model, method, calibration set, seed) runs in a process of its own, so that
peaks of memory do not mix, and writes one JSON file to recipes/results/compare/full (or fast). A cell whose file is
there, with the same settings, does not run again: a comparison that was killed goes on. On a CPU two cells run at once
and share the cores (``--jobs``). Levels are measured as a user gets them: loaded from their folders. The files' schema:
recipes/compare_results.py.
"""

import argparse
import math
import multiprocessing
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from threading import Event
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gisp_hf import RestoreConfig, __version__
from gisp_hf.data import Calibration, load_calibration
from gisp_hf.data.shares import split_mixture
from gisp_hf.evaluation import measure_speed, multiple_choice_accuracy, perplexity
from gisp_hf.models.dtype import fast_dtype
from recipes.calibrated_run import prune
from recipes.compare_results import DENSE, FORMAT, geometric_mean, read_cell, slug, write_cell, write_report
from recipes.compare_settings import CONFIG, Cell, Comparison, Variant, read_config
from recipes.demo_data import (
    DOMAINS,
    Domain,
    held_out_tokens,
    load_domain,
    load_smollm2,
    write_mixture,
)
from recipes.prune_multiple_choice import make_questions

RESULTS = Path("recipes/results/compare")
WORK = Path("runs/compare")  # texts, and the levels of the cell that runs
EVALUATION_BATCH = 4  # windows at once
QUESTION_DOMAIN = "wikipedia"  # the questions are how its held-out passages go on
QUESTION_WORDS = 8  # of a prompt, and of each of its four continuations
PROMPT_TOKENS = 256  # of the prompt whose prefill is timed, batch 1
IMPORTS = ["evaluate", "recipes.calibrated_run", "recipes.compare_settings", "recipes.prune_multiple_choice"]


def is_done(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a cell's file is there, with these settings. Says so if it has others.

    Raises:
        ValueError: the file is no result.
    """
    if not path.is_file():
        return False
    found = read_cell(path)["settings"]
    changed = [f"{key} {found[key]!r}, now {settings[key]!r}" for key in settings if found[key] != settings[key]]
    if changed:
        print(f"{path} was made with {'; '.join(changed)}: it runs again")
    return not changed


def compare(comparison: Comparison, folder: Path, *, run: Callable[[Cell], None], jobs: int = 1) -> str:
    """Runs the cells that have no result yet; then writes tables and plots.

    Args:
        run: runs one cell and writes its file.
        jobs: cells at once. After an error none is begun, and those that run come to their end.

    Returns:
        The text of ``results.md``.
    """
    cells = comparison.cells()
    waiting = [cell for cell in cells if not is_done(folder / cell.file, comparison.settings(cell))]
    print(f"{len(cells)} cells, {len(cells) - len(waiting)} of them done before", flush=True)

    failed = Event()

    def run_one(number: int, cell: Cell) -> None:
        if failed.is_set():
            return
        print(f"\n{number}/{len(waiting)}: {cell.file}", flush=True)
        try:
            run(cell)
        except BaseException:  # Ctrl-C too
            failed.set()
            raise

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(run_one, number, cell) for number, cell in enumerate(waiting, start=1)]:
            future.result()
    return write_report(folder)


def run_cell(cell: Cell, comparison: Comparison, folder: Path, *, work: Path = WORK) -> None:
    """Prunes and measures one cell in this process, and writes its file."""
    work.mkdir(parents=True, exist_ok=True)
    variant = None if cell.method == DENSE else comparison.variant(cell.method)
    model, tokenizer = load_model(cell.model, getattr(torch, variant.dtype if variant else comparison.dtype))
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    domains = {name: load_domain(name) for name in DOMAINS}
    seconds, cpu_seconds, steps, tokens_used, calibration = 0.0, 0.0, 0, 0, None
    folders: dict[float, Path | None] = {0.0: None}
    removed = {0.0: 0.0}
    scratch = work / slug(cell.file)
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    try:
        if variant is not None:
            data = next(iter(comparison.calibrations)) if cell.calibration is None else cell.calibration
            name = write_mixture(domains, work, shares=split_mixture(comparison.calibrations[data]))
            drawn = draw(name, tokenizer, variant, seed=cell.seed or 0)
            restore = RestoreConfig(data=name, tokens=variant.restore) if variant.restore else None
            start, cpu_start = time.perf_counter(), time.process_time()
            pruner = prune(
                model,
                tokenizer,
                drawn,
                config=variant.config,
                output_dir=scratch / "levels",
                batch_size=variant.batch_size,
                fresh=variant.fresh,
                restore=restore,
            )
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            order = pruner.trajectory
            folders = dict(pruner.level_folders)
            removed = {level: order.sparsity_at(order.prefix(level)) for level in folders}
            steps = variant.config.num_steps
            if cell.calibration is not None:
                calibration = drawn.provenance
                tokens_used = steps * variant.tokens
        peak = peak_memory()  # of pruning: measuring comes after it
        model = pruner = None  # make room
        start = time.perf_counter()
        levels = measure(cell.model, folders, removed, tokenizer, domains, comparison)
        evaluation_seconds = time.perf_counter() - start
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    write_cell(
        folder / cell.file,
        {
            "format": FORMAT,
            "settings": comparison.settings(cell),
            "environment": environment(),
            "calibration": calibration,
            "steps": steps,
            "tokens_used": tokens_used,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "evaluation_seconds": evaluation_seconds,
            "peak_memory": peak,
            "levels": levels,
        },
    )


def measure(
    name: str,
    folders: Mapping[float, Path | None],
    removed: Mapping[float, float],
    tokenizer: PreTrainedTokenizerBase,
    domains: Mapping[str, Domain],
    comparison: Comparison,
) -> list[dict[str, Any]]:
    """What each level is worth: entries of ``levels`` in the result of a cell.

    Args:
        name: the unpruned model, which prefill is compared with.
        folders: sparsity -> checkpoint; None: the unpruned model itself.
        removed: sparsity -> the sparsity that was reached.
    """
    dtype = getattr(torch, comparison.dtype)
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    held_out = {
        domain: held_out_tokens(text.held_out, tokenizer, count=comparison.evaluation_tokens)
        for domain, text in domains.items()
    }
    words = {"prompt_words": QUESTION_WORDS, "choice_words": QUESTION_WORDS}
    questions = make_questions(domains[QUESTION_DOMAIN].held_out, count=comparison.questions, **words)
    dense = load_model(name, dtype)[0].to(device)
    entries = []
    for sparsity, folder in folders.items():
        model = dense if folder is None else AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
        found = {
            domain: finite(perplexity(model, tokens, window=comparison.window, batch_size=EVALUATION_BATCH))
            for domain, tokens in held_out.items()
        }
        try:
            accuracy = multiple_choice_accuracy(model, tokenizer, questions, batch_size=64)["accuracy"]
        except ValueError:  # a log-likelihood is nan
            if all(found.values()):
                raise
            accuracy = None
        speeds = measure_speed({"dense": dense, "level": model}, prompt_tokens=PROMPT_TOKENS, new_tokens=1)
        entries.append(
            {
                "sparsity": sparsity,
                "removed": removed[sparsity],
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "perplexity": found,
                "geometric_mean": geometric_mean(found),
                "accuracy": accuracy,
                "prefill": speeds["level"].prefill,
                "prefill_ratio": speeds["level"].prefill / speeds["dense"].prefill,
            }
        )
    return entries


def finite(value: float) -> float | None:
    """The value, or None if it has overflowed."""
    return value if math.isfinite(value) else None


def load_model(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """``smollm2``, or a folder or Hub id, with its tokenizer."""
    if name == "smollm2":
        return load_smollm2(dtype, cache=WORK)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # blocks are full: nothing is ever padded
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), tokenizer


def draw(name: str, tokenizer: PreTrainedTokenizerBase, variant: Variant, *, seed: int) -> Calibration:
    """The calibration set of a variant, for all its steps."""
    tokens = variant.tokens * (variant.config.num_steps if variant.fresh else 1)
    return load_calibration(name, tokenizer, tokens=tokens, block_size=variant.block_size, seed=seed)


def environment() -> dict[str, Any]:
    """What a result was made with, beside its settings."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    python = platform.python_version()
    return {"gisp_hf": __version__, "python": python, **packages, "device": device, "threads": torch.get_num_threads()}


def peak_memory() -> int:
    """Bytes: the largest resident size of this process so far; on a GPU, what torch allocated there."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cell_processes() -> SpawnContext | ForkServerContext:
    """How the processes of cells start.

    On a CPU one process imports everything, six seconds' work, and each cell's process is a fork of it, which has run
    nothing yet. CUDA does not survive a fork, and some package may start it on import: there each imports anew.
    """
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(IMPORTS)
    return context


def run_in_its_own_process(cell: Cell, argv: Sequence[str], *, dtype: str, threads: int | None) -> None:
    """The same command for one cell alone.

    Args:
        threads: of torch; None: as many as it takes by itself.

    Raises:
        RuntimeError: it failed; what it printed stands above.
    """
    command = [*argv, "--dtype", dtype, "--cell", cell.file]
    process = cell_processes().Process(target=run_alone, args=(command, threads))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(
            f"{cell.file} failed with exit code {process.exitcode}, see its output above; the cells before it are "
            "kept: the same command goes on with this one"
        )


def run_alone(argv: Sequence[str], threads: int | None) -> None:
    """What the process of a cell does."""
    if threads is not None:
        torch.set_num_threads(threads)
    main(argv)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare pruning methods on the same calibration tokens.")
    parser.add_argument("config", type=Path, nargs="?", default=CONFIG, help=f"settings (default: {CONFIG})")
    parser.add_argument("--fast", action="store_true", help="the smaller comparison that the settings name so")
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--calibrations", nargs="+", help="only these calibration sets of the settings")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: the one that this machine is fast at"
    )
    parser.add_argument("--output-dir", type=Path, help=f"default: {RESULTS}/full, with --fast {RESULTS}/fast")
    parser.add_argument(
        "--jobs", type=int, help="cells at once, which share the cores (default: 1 on a GPU or a single core, else 2)"
    )
    parser.add_argument("--report", action="store_true", help="only tables and plots, from the results that are there")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    folder = options.output_dir or RESULTS / ("fast" if options.fast else "full")
    if options.report:
        print(write_report(folder))
        return
    comparison = read_config(
        options.config,
        fast=options.fast,
        changes={
            "models": options.models,
            "methods": options.methods,
            "seeds": options.seeds,
            "dtype": options.dtype or str(fast_dtype()).removeprefix("torch."),
        },
    )
    if options.calibrations:
        if unknown := sorted(set(options.calibrations) - set(comparison.calibrations)):
            known = ", ".join(comparison.calibrations)
            raise ValueError(f"{options.config} has no calibration set {unknown[0]!r}: choose from {known}")
        comparison = replace(
            comparison, calibrations={name: comparison.calibrations[name] for name in options.calibrations}
        )
    if options.cell:
        (cell,) = (cell for cell in comparison.cells() if cell.file == options.cell)
        run_cell(cell, comparison, folder)
        return
    cores = os.cpu_count() or 1
    jobs = options.jobs or (1 if torch.cuda.is_available() or cores < 2 else 2)
    threads = max(1, cores // jobs) if jobs > 1 else None
    report = compare(
        comparison,
        folder,
        run=lambda cell: run_in_its_own_process(cell, argv, dtype=comparison.dtype, threads=threads),
        jobs=jobs,
    )
    print(f"\n{report}\nIn {folder}: results.md, plots, and one JSON file a cell")


if __name__ == "__main__":
    main(sys.argv[1:])
