"""Measure settings of restoration on SmolLM2: perplexity on text of three domains that calibration never saw.

    python -m recipes.restore_study                     # runs what has no result yet, most telling cells first
    python -m recipes.restore_study --levels 0.3 0.5
    python -m recipes.restore_study --report            # the table again, from the results that are there

Prunes once on a third of each domain (12 steps of the same 4,096 tokens) and once on Wikipedia (80 steps of 1,024 other
tokens each), keeps the levels in runs/restore_study, and then restores a copy of a level in every cell. A cell is one
JSON file in recipes/results/restore; one whose file is there does not run again. Hardware: two CPU cores, 4 GB of
memory. Time: see docs/restore.md.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from gisp_hf import GISPConfig
from gisp_hf.atomic import write_text_atomic
from gisp_hf.config import level_name
from gisp_hf.data import Calibration, load_calibration
from gisp_hf.data.shares import split_mixture
from gisp_hf.evaluation import perplexity
from gisp_hf.models.dtype import fast_dtype
from gisp_hf.recovery.batches import batches_of
from gisp_hf.recovery.config import RestoreConfig
from gisp_hf.recovery.restore import restore
from gisp_hf.recovery.training import norm_arguments, train_norms_of
from gisp_hf.report import format_table
from recipes.calibrated_run import prune
from recipes.compare_results import geometric_mean
from recipes.demo_data import DOMAINS, held_out_tokens, load_domain, load_smollm2, write_mixture

RESULTS = Path("recipes/results/restore")
WORK = Path("runs/restore_study")
LEVELS = (0.2, 0.3, 0.4, 0.5)
MIXTURE = "wikipedia:1/3,news:1/3,code:1/3"
RIDGES = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
BLOCK = 128  # tokens; of pruning and of restoration
WINDOW = 256  # of perplexity
STEPS = GISPConfig(sparsity_levels=LEVELS, num_steps=12)  # of the same 4,096 tokens
FRESH = GISPConfig(sparsity_levels=LEVELS, num_steps=80, score_momentum=0.8)  # of 1,024 other tokens each
NORM_TOKENS = 65_536
TOKENS = 16_512  # of restoration: ten times the inputs of the widest projection


@dataclass(frozen=True)
class Cell:
    """One restoration; ``tokens`` 0: the level as it is. ``sparsity`` 0: the unpruned model."""

    sparsity: float
    tokens: int = TOKENS
    data: str = MIXTURE
    blend: float = 0.5
    ridge: tuple[float, ...] = RIDGES
    seed: int = 0
    pruned_on: str = MIXTURE
    fresh: bool = False  # pruned in 80 steps, each with other text (`FRESH`)
    norms: int = 0  # tokens of ``data`` on which the norms are trained afterwards, in one pass

    @property
    def file(self) -> str:
        if self.sparsity == 0:
            return "dense.json"
        pruned = "" if self.pruned_on == MIXTURE else f"-pruned_on_{_short(self.pruned_on)}"
        pruned += "-fresh" if self.fresh else ""
        if self.tokens == 0:
            return f"{level_name(self.sparsity)}{pruned}-unrestored.json"
        ridge = "_".join(f"{value:g}" for value in self.ridge)
        own = f"{_short(self.data)}-{self.tokens}-blend{self.blend:g}-ridge{ridge}-seed{self.seed}"
        own += f"-norms{self.norms}" if self.norms else ""
        return f"{level_name(self.sparsity)}{pruned}-{own}.json"


def cells(levels: Sequence[float]) -> list[Cell]:
    """All cells, the most telling first, so that an early end leaves whole comparisons."""
    found = [Cell(0.0, tokens=0)]
    found += [cell for level in levels for cell in (Cell(level, tokens=0), Cell(level))]
    found += [Cell(level, blend=blend) for blend in (1.0, 0.0) for level in levels]
    found += [Cell(level, ridge=(1e-2,)) for level in levels]
    found += [Cell(level, data="wikipedia") for level in levels]
    found += [Cell(level, tokens=tokens) for tokens in (8_064, 65_664) for level in levels]
    found += [Cell(level, seed=seed) for seed in (1, 2) for level in levels]
    for level in levels:  # all that helps, on one domain and measured there
        plain = Cell(level, tokens=0, data="wikipedia", pruned_on="wikipedia", fresh=True)
        restored = replace(plain, tokens=65_664)
        found += [plain, restored, replace(restored, norms=NORM_TOKENS)]
    found += [Cell(level, tokens=65_664, norms=NORM_TOKENS) for level in levels]
    found += [Cell(level, blend=blend) for blend in (0.75, 0.25) for level in levels]
    found += [Cell(level, ridge=(ridge,)) for ridge in (1e-3, 1e-1, 3e-1) for level in levels]
    for level in levels:  # the mixture has too little text for so many tokens
        found.append(Cell(level, tokens=262_144, data="wikipedia", pruned_on="wikipedia", fresh=True))
    return list({cell.file: cell for cell in found}.values())


def draw(
    data: str, tokenizer: Any, *, tokens: int, seed: int, work: Path, block_size: int | None = None
) -> Calibration:
    """Calibration text of some domains, by their shares of the tokens; ``block_size`` None: `BLOCK`."""
    shares = split_mixture(data)
    name = write_mixture({domain: load_domain(domain) for domain in shares}, work, shares=shares)
    return load_calibration(name, tokenizer, tokens=tokens, block_size=block_size or BLOCK, seed=seed)


def batches_of_text(calibration: Calibration, *, batch_size: int = 8) -> list[torch.Tensor]:
    """The token ids of blocks, (B, T) each."""
    batches = batches_of(calibration.dataset, batch_size=batch_size, tokens=None, collate=calibration.collator)
    return [batch["input_ids"] for batch in batches]


@dataclass(frozen=True)
class Material:
    """Everything that cells share. ``work/base`` holds the unpruned model."""

    work: Path
    tokenizer: Any
    held_out: dict[str, torch.Tensor]
    dtype: torch.dtype

    def perplexities(self, model: PreTrainedModel) -> dict[str, float]:
        """On the held-out text of each domain."""
        return perplexities(model, self.held_out)


def perplexities(model: PreTrainedModel, held_out: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Name -> perplexity on a text, (n_tokens,)."""
    return {name: perplexity(model, ids, window=WINDOW, batch_size=4) for name, ids in held_out.items()}


def held_out_text(tokenizer: Any, *, count: int) -> dict[str, torch.Tensor]:
    """Token ids of each domain, (count,), that calibration never sees."""
    return {name: held_out_tokens(load_domain(name).held_out, tokenizer, count=count) for name in DOMAINS}


def prepare(work: Path, *, evaluation_tokens: int, dtype: torch.dtype) -> Material:
    """The unpruned model as a checkpoint, and the text of evaluation."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "base" / "tokenizer.json").is_file():
        model, tokenizer = load_smollm2(dtype)
        model.save_pretrained(work / "base")
        tokenizer.save_pretrained(work / "base")
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    return Material(work, tokenizer, held_out_text(tokenizer, count=evaluation_tokens), dtype)


def find_level(cell: Cell, material: Material) -> Path:
    """The folder of a level; prunes first if there is none."""
    folder = material.work / f"levels-{_short(cell.pruned_on)}{'-fresh' if cell.fresh else ''}"
    if not (folder / "trajectory.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(material.work / "base", dtype=material.dtype)
        config, tokens = (FRESH, 1024 * FRESH.num_steps) if cell.fresh else (STEPS, 4096)
        calibration = draw(cell.pruned_on, material.tokenizer, tokens=tokens, seed=0, work=material.work)
        prune(
            model,
            material.tokenizer,
            calibration,
            config=config,
            output_dir=folder,
            batch_size=8,
            fresh=cell.fresh,
        )
    return folder / level_name(cell.sparsity)


def run_cell(cell: Cell, material: Material) -> dict[str, Any]:
    """Restores and measures one level."""
    errors: list[dict[str, Any]] = []
    seconds = 0.0
    source = find_level(cell, material) if cell.sparsity else material.work / "base"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=material.dtype)
    if cell.tokens:
        config = RestoreConfig(tokens=None, blend=cell.blend, ridge=cell.ridge)
        calibration = draw(cell.data, material.tokenizer, tokens=cell.tokens, seed=cell.seed, work=material.work)
        start = time.perf_counter()
        record = restore(model, material.work / "base", calibration, config, progress=False)
        if cell.norms:
            train_norms(model, cell, material)
        seconds = time.perf_counter() - start
        errors = [asdict(error) for error in record.errors]
    found = material.perplexities(model)
    return {"perplexity": found, "geometric_mean": geometric_mean(found), "seconds": seconds, "errors": errors}


def train_norms(model: PreTrainedModel, cell: Cell, material: Material) -> None:
    """On the text that the cell is restored on, longer windows of it."""
    text = draw(cell.data, material.tokenizer, tokens=cell.norms, seed=cell.seed, work=material.work, block_size=WINDOW)
    train_norms_of(model, text, norm_arguments(str(material.work / "trainer"), text, seed=cell.seed))
    model.eval()


def table(folder: Path) -> str:
    """Every result, sorted by sparsity and geometric mean."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        cell = Cell(**{**found["cell"], "ridge": tuple(found["cell"]["ridge"])})
        plain = cell.tokens == 0
        rows.append(
            {
                "level": "dense" if cell.sparsity == 0 else f"{cell.sparsity:.0%}",
                "pruned on": "-"
                if cell.sparsity == 0
                else _short(cell.pruned_on) + (", fresh text" if cell.fresh else ""),
                "data": "-" if plain else _short(cell.data),
                "tokens": "-" if plain else f"{cell.tokens:,}",
                "blend": "-" if plain else f"{cell.blend:g}",
                "ridge": "-" if plain else _span(cell.ridge),
                "norms": f"{cell.norms:,}" if cell.norms else "-",
                "seed": "-" if plain else str(cell.seed),
                **found["result"]["perplexity"],
                "mean": found["result"]["geometric_mean"],
                "seconds": found["result"]["seconds"],
                "order": (cell.sparsity, found["result"]["geometric_mean"]),
            }
        )
    columns = {
        name: name for name in ("level", "pruned on", "data", "tokens", "blend", "ridge", "norms", "seed", *DOMAINS)
    }
    columns |= {"mean": "geometric mean", "seconds": "seconds"}
    formats = {**dict.fromkeys(DOMAINS, ",.2f"), "mean": ",.2f", "seconds": ",.0f"}
    return format_table(sorted(rows, key=lambda row: row["order"]), columns, formats=formats)


def dtype_here() -> torch.dtype:
    """The dtype of weights that this machine is fast at."""
    return torch.bfloat16 if torch.cuda.is_available() else fast_dtype("cpu")


def _span(ridge: Sequence[float]) -> str:
    return f"{ridge[0]:g}" if len(ridge) == 1 else f"best of {len(ridge)}, {ridge[0]:g} to {ridge[-1]:g}"


def _short(data: str) -> str:
    return "mixture" if data == MIXTURE else data


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=float, nargs="+", default=list(LEVELS), metavar="FRACTION")
    parser.add_argument("--evaluation-tokens", type=int, default=4096, metavar="N", help="of each domain")
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="text, base model and levels")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, metavar="DIR", help="results")
    parser.add_argument("--only", default="", metavar="TEXT", help="cells whose file name holds this text")
    parser.add_argument("--report", action="store_true", help="write the table again, and run nothing")
    options = parser.parse_args(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    dtype = dtype_here()
    waiting = [] if options.report else [cell for cell in cells(options.levels) if options.only in cell.file]
    waiting = [cell for cell in waiting if not (options.output_dir / cell.file).is_file()]
    if waiting:
        material = prepare(options.work, evaluation_tokens=options.evaluation_tokens, dtype=dtype)
    for cell in waiting:
        path = options.output_dir / cell.file
        result = run_cell(cell, material)
        settings = {"evaluation_tokens": options.evaluation_tokens, "window": WINDOW, "dtype": str(dtype)}
        facts = {"cell": asdict(cell), **settings, "result": result}
        write_text_atomic(path, json.dumps(facts, indent=1) + "\n")
        print(f"{cell.file}: {result['geometric_mean']:.2f} {result['perplexity']}", flush=True)
    text = table(options.output_dir)
    write_text_atomic(options.output_dir / "results.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main()
