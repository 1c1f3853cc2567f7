"""Compare ways to recover a level of SmolLM2 by perplexity on held-out text of three domains.

    python -m recipes.recover                                # all ways, levels 0.2 to 0.5, ten minutes of training each
    python -m recipes.recover --levels 0.3 --minutes 2
    python -m recipes.recover --prepare                      # prunes and restores, and trains nothing
    accelerate launch --num_processes 2 -m recipes.recover   # trains on two GPUs, after --prepare
    accelerate launch --config_file recipes/accelerate/cpu.yaml -m recipes.recover   # on two processes of a CPU
    python -m recipes.recover --report                       # the table again, from the results that are there

The ways: the level as it is; restored in closed form; LoRA by language modelling; LoRA by distillation from the
unpruned model; both kinds of LoRA after restoration; and norms or scales alone (`gisp_hf.recovery.vectors`) after it.
All trainings take the same wall time, on a third of text of each domain; the table also counts the seconds of
restoration. Prunes as `recipes.restore_study` does, in its folder.
A cell is one JSON file in recipes/results/recover; one whose file is there does not run again.
Hardware: two CPU cores, 6 GB of memory. Time: pruning once, then for each level restoration and six trainings.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainingArguments

from gisp_hf import RestoreConfig, restore_level
from gisp_hf.atomic import write_text_atomic
from gisp_hf.config import level_name
from gisp_hf.models.dtype import fast_dtype
from gisp_hf.recovery.lora import recover_level
from gisp_hf.recovery.lora_record import TRAINED, Recovery
from gisp_hf.recovery.time_limit import TimeLimit
from gisp_hf.report import format_table
from recipes import restore_study
from recipes.compare_results import geometric_mean
from recipes.demo_data import DOMAINS
from recipes.restore_study import LEVELS, MIXTURE, TOKENS, WINDOW, WORK, Material

RESULTS = Path("recipes/results/recover")
VECTORS = tuple(train for train in TRAINED if train != "lora")


@dataclass(frozen=True)
class Settings:
    """Of all trainings; a result says which it was made with."""

    minutes: float = 10.0
    tokens: int = 98_304  # of the training text, which repeats
    rank: int = 16
    learning_rate: float = 5e-4  # of adapters
    vector_learning_rate: float = 5e-3  # of norms and scales
    batch_size: int = 2  # blocks of 256 tokens, on each process
    accumulation: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Cell:
    """One way at one level.

    ``training``: "lora", "norms" or "scales" by language modelling, "distillation" (LoRA too), or "" for none.
    """

    sparsity: float
    restored: bool
    training: str

    @property
    def way(self) -> str:
        return ", ".join(filter(None, ["restored" if self.restored else "", self.training])) or "pruned"

    @property
    def name(self) -> str:
        return f"{level_name(self.sparsity)}-{self.way.replace(', ', '-')}"


def cells(levels: Sequence[float]) -> list[Cell]:
    """All ways, level after level."""
    ways = [(False, ""), (True, ""), (True, "lora"), (False, "lora"), (False, "distillation"), (True, "distillation")]
    ways += [(True, vectors) for vectors in VECTORS]
    return [Cell(level, restored, training) for level in levels for restored, training in ways]


def launch() -> PartialState:
    """The processes of this run. Accelerate connects those of a CPU only if it is told that they are."""
    return PartialState(cpu=not torch.accelerator.is_available())


def find_level(cell: Cell, material: Material) -> tuple[Path, float]:
    """The folder of a level before training, and the seconds of its restoration; makes both if they are not there.

    Raises:
        SystemExit: if it is not there and several processes run.
    """
    folder = material.work / ("restored" if cell.restored else "levels-mixture") / level_name(cell.sparsity)
    note = folder.with_name(f"{folder.name}.json")
    if not folder.is_dir() or (cell.restored and not note.is_file()):
        if launch().num_processes > 1:
            raise SystemExit(f"{folder} is not there yet: run python -m recipes.recover --prepare in one process first")
        plain = restore_study.find_level(restore_study.Cell(cell.sparsity), material)
        if cell.restored:
            text = restore_study.draw(MIXTURE, material.tokenizer, tokens=TOKENS, seed=0, work=material.work)
            config = RestoreConfig(tokens=None)
            shutil.rmtree(folder, ignore_errors=True)  # without its seconds, if a run ended at this place
            start = time.perf_counter()
            restore_level(
                plain.parent,
                folder,
                sparsity=cell.sparsity,
                config=config,
                calibration=text,
                base_model=material.work / "base",
                progress=False,
            )
            write_text_atomic(note, json.dumps({"seconds": time.perf_counter() - start}) + "\n")
    return folder, json.loads(note.read_text(encoding="utf-8"))["seconds"] if cell.restored else 0.0


def train(cell: Cell, level: Path, material: Material, settings: Settings, teacher: Path) -> Path:
    """Trains adapters or vectors on a level; the part to copy."""
    vectors = cell.training in VECTORS
    rate = settings.vector_learning_rate if vectors else settings.learning_rate
    own = f"{settings.minutes:g}min-rank{settings.rank}-rate{rate:g}-tokens{settings.tokens}"
    output = material.work / f"recovered-{cell.name}-{own}" / level_name(cell.sparsity)
    if output.is_dir():  # trained by a run that ended before its evaluation
        return output
    data = restore_study.draw(
        MIXTURE, material.tokenizer, tokens=settings.tokens, seed=settings.seed, work=material.work, block_size=WINDOW
    )
    arguments = TrainingArguments(
        output_dir=str(material.work / "trainer"),
        use_cpu=launch().device.type == "cpu",
        max_steps=1_000_000,  # the time ends it
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=rate,
        lr_scheduler_type="constant",
        seed=settings.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=10,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear")
    distil = cell.training == "distillation"
    return recover_level(
        level,
        output,
        data=data,
        arguments=arguments,
        train=cast(Any, cell.training if vectors else "lora"),
        lora=None if vectors else lora,
        teacher=AutoModelForCausalLM.from_pretrained(teacher, dtype=material.dtype) if distil else None,
        callbacks=[TimeLimit(60 * settings.minutes)],
    )


def run_cell(cell: Cell, material: Material, settings: Settings, teacher: Path) -> dict[str, Any] | None:
    """Recovers and measures one level. Only the first process measures; the others return None."""
    folder, seconds = find_level(cell, material)
    facts: dict[str, Any] = {"restoration_seconds": seconds, "training_seconds": 0.0, "steps": 0, "tokens": 0}
    if cell.training:
        folder = train(cell, folder, material, settings, teacher)
        record = Recovery.load(folder)
        facts |= {"training_seconds": record.seconds, "steps": record.steps, "tokens": record.tokens}
    if not launch().is_main_process:
        return None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=material.dtype)
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    found = material.perplexities(model)
    return {"perplexity": found, "geometric_mean": geometric_mean(found), **facts}


def table(folder: Path) -> str:
    """Every result, the best of each level first."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        cell, result = Cell(**found["cell"]), found["result"]
        rows.append(
            {
                "level": f"{cell.sparsity:.0%}",
                "way": cell.way,
                **result["perplexity"],
                "mean": result["geometric_mean"],
                "steps": result["steps"],
                "tokens": result["tokens"],
                "restoration": result["restoration_seconds"],
                "training": result["training_seconds"],
                "order": (cell.sparsity, result["geometric_mean"]),
            }
        )
    columns = {name: name for name in ("level", "way", *DOMAINS)} | {"mean": "geometric mean", "steps": "steps"}
    columns |= {"tokens": "tokens", "restoration": "restoration, s", "training": "training, s"}
    formats = {**dict.fromkeys((*DOMAINS, "mean"), ",.2f"), **dict.fromkeys(("restoration", "training"), ",.0f")}
    return format_table(sorted(rows, key=lambda row: row["order"]), columns, formats={**formats, "tokens": ","})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Settings()
    parser.add_argument("--levels", type=float, nargs="+", default=list(LEVELS), metavar="FRACTION")
    parser.add_argument("--minutes", type=float, default=default.minutes, help="of each training (default: 10)")
    parser.add_argument("--rank", type=int, default=default.rank, metavar="N", help="of the adapters (default: 16)")
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate, metavar="RATE")
    parser.add_argument(
        "--vector-learning-rate", type=float, default=default.vector_learning_rate, metavar="RATE", help="norms, scales"
    )
    parser.add_argument("--tokens", type=int, default=default.tokens, metavar="N", help="of the training text")
    parser.add_argument("--teacher", type=Path, metavar="DIR", help="base or elastic checkpoint (default: the base)")
    parser.add_argument("--evaluation-tokens", type=int, default=4096, metavar="N", help="of each domain")
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="text, base model and levels")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, metavar="DIR", help="results")
    parser.add_argument("--only", default="", metavar="TEXT", help="cells whose name holds this text")
    parser.add_argument("--prepare", action="store_true", help="prune and restore, and train nothing")
    parser.add_argument("--report", action="store_true", help="write the table again, and run nothing")
    options = parser.parse_args(argv)
    settings = Settings(
        minutes=options.minutes,
        tokens=options.tokens,
        rank=options.rank,
        learning_rate=options.learning_rate,
        vector_learning_rate=options.vector_learning_rate,
    )
    options.output_dir.mkdir(parents=True, exist_ok=True)
    paths = {cell: options.output_dir / f"{cell.name}.json" for cell in cells(options.levels)}
    waiting = [cell for cell, path in paths.items() if options.only in cell.name and not path.is_file()]
    if waiting and not options.report:
        state = launch()
        dtype = fast_dtype()
        with state.main_process_first():  # writes the base model
            material = restore_study.prepare(options.work, evaluation_tokens=options.evaluation_tokens, dtype=dtype)
        for cell in waiting:
            if options.prepare:
                find_level(cell, material)
                continue
            result = run_cell(cell, material, settings, options.teacher or options.work / "base")
            if result is not None:
                about = {"evaluation_tokens": options.evaluation_tokens, "window": WINDOW, "dtype": str(dtype)}
                about |= {"processes": state.num_processes, "settings": asdict(settings)}
                text = json.dumps({"cell": asdict(cell), **about, "result": result}, indent=1) + "\n"
                write_text_atomic(paths[cell], text)
                print(f"{cell.name}: {result['geometric_mean']:.2f} {result['perplexity']}", flush=True)
            state.wait_for_everyone()
    if launch().is_main_process:
        text = table(options.output_dir)
        write_text_atomic(options.output_dir / "results.md", text + "\n")
        print(text)


if __name__ == "__main__":
    main()
