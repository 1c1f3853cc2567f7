"""Speed of the levels of the quickstart: tokens per second of prompt and of new text, beside the unpruned model.

    make bench                            # or: python -m recipes.benchmark_levels --folder runs/quickstart

Hardware: two CPU cores and 6 GB of memory (all levels are loaded at once and take turns). Time: about 3 minutes.
Writes speed.json and speed.md into the folder.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from gisp_hf.evaluation import measure_speed
from gisp_hf.levels.info import read_levels
from gisp_hf.models.dtype import describe_dtypes, fast_dtype
from gisp_hf.report import format_table
from recipes.demo_data import load_smollm2
from recipes.quickstart import FOLDER

COLUMNS = {
    "level": "level",
    "parameters": "parameters",
    "prefill": "prefill, tokens/s",
    "decode": "decode, tokens/s",
}


def run(dense: PreTrainedModel, folder: Path, *, repeats: int = 3) -> list[dict[str, Any]]:
    """Measures ``dense`` and every level in ``folder``, all in the dtype and on the device of ``dense``.

    Raises:
        FileNotFoundError: the folder is not there or holds no level.
    """
    models = {"dense": dense}
    for level in read_levels(folder):
        pruned = AutoModelForCausalLM.from_pretrained(folder / level.name, dtype=dense.dtype)
        models[level.name] = pruned.to(dense.device)
    rows = [
        {
            "level": name,
            "parameters": sum(parameter.numel() for parameter in models[name].parameters()),
            "prefill": speed.prefill,
            "decode": speed.decode,
        }
        for name, speed in measure_speed(models, repeats=repeats).items()
    ]
    table = format_table(rows, COLUMNS, formats={"prefill": ",.0f", "decode": ",.1f"})
    (folder / "speed.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (folder / "speed.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\n{folder / 'speed.md'}")
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Speed of the quickstart's levels, beside the unpruned model.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"a run of the quickstart (default: {FOLDER})")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each model; the best counts")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: the one that this machine is fast at"
    )
    options = parser.parse_args(argv)
    if not options.folder.is_dir():  # before the model is loaded; a name would be looked up on the Hub
        parser.error(f"{options.folder} is not there: `make quickstart` makes it, or give --folder")
    dtype = getattr(torch, options.dtype) if options.dtype else fast_dtype()
    print(f"{str(dtype).removeprefix('torch.')} weights ({describe_dtypes()})")
    model, _ = load_smollm2(dtype)
    run(
        model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu"),
        options.folder,
        repeats=options.repeats,
    )


if __name__ == "__main__":
    main()
