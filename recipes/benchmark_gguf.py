"""Size and speed in llama.cpp of SmolLM2-135M-Instruct and its levels of 20 and 40 %, on the CPU.

    pip install -e '.[demo,llama]'        # compiles llama.cpp: 10 to 20 minutes
    python -m recipes.benchmark_gguf      # another run's levels: --folder runs/quickstart

Prunes by magnitude in one step, since quality is not the subject, with channels in multiples of 32, so that quantised
types fit. Writes GGUF files into FOLDER/gguf, quantises them (``--type f16`` leaves that out), and measures tokens per
second of a prompt and of new text. The models take turns, and each keeps its best repeat. Hardware: two CPU cores and
4 GB of memory. Writes gguf.json and gguf.md into the folder.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from gisp_hf import GISPConfig, prune
from gisp_hf.export import export_gguf
from gisp_hf.levels.info import read_levels
from gisp_hf.report import format_table
from recipes.demo_data import load_smollm2

FOLDER = Path("runs/gguf")
CONFIG = GISPConfig(method="magnitude", sparsity_levels=(0.2, 0.4), channel_multiple=32)

QUANTISED = {
    "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
    "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0",
    "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M",
}
COLUMNS = {
    "level": "level",
    "megabytes": "size, MB",
    "size_ratio": "of dense",
    "prefill": "prompt, tokens/s",
    "prefill_ratio": "of dense",
    "decode": "new text, tokens/s",
    "decode_ratio": "of dense",
}
FORMATS = {"megabytes": ",.1f", "prefill": ",.0f", "decode": ",.1f"} | dict.fromkeys(
    ("size_ratio", "prefill_ratio", "decode_ratio"), ".2f"
)
CONTEXT = 512


def _engine() -> Any:
    try:
        import llama_cpp
    except ImportError as error:
        raise ImportError("this benchmark needs llama-cpp-python: pip install 'gisp_hf[llama]'") from error
    return llama_cpp


def make_levels(folder: Path) -> None:
    """Prunes SmolLM2 by the size of its weights; the one block of text is not looked at."""
    model, tokenizer = load_smollm2(torch.float32)
    block = torch.arange(16)
    with tempfile.TemporaryDirectory() as temporary:
        arguments = TrainingArguments(temporary, max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
        data: Any = [{"input_ids": block, "labels": block}]
        prune(Trainer(model, arguments, train_dataset=data, processing_class=tokenizer), CONFIG, folder)


def write_files(folder: Path, *, file_type: str) -> dict[str, Path]:
    """GGUF files of the unpruned model and of the levels in ``folder``; those that are there stay.

    Returns:
        name -> file, ``dense`` first.
    """
    output = folder / "gguf"
    output.mkdir(exist_ok=True)
    files: dict[str, Path] = {}
    for name in ["dense", *(level.name for level in read_levels(folder))]:
        full, quantised = output / f"{name}-F16.gguf", output / f"{name}-{file_type.upper()}.gguf"
        if not full.exists():
            if name == "dense":
                with tempfile.TemporaryDirectory() as temporary:
                    model, tokenizer = load_smollm2(torch.float32)
                    model.save_pretrained(temporary)
                    tokenizer.save_pretrained(temporary)
                    export_gguf(temporary, full)
            else:
                export_gguf(folder / name, full)
        if not quantised.exists():
            quantise(full, quantised, file_type)
        files[name] = quantised
    return files


def quantise(source: Path, target: Path, file_type: str) -> None:
    engine = _engine()
    parameters = engine.llama_model_quantize_default_params()
    parameters.ftype = getattr(engine, f"LLAMA_FTYPE_MOSTLY_{file_type.upper()}")
    if code := engine.llama_model_quantize(str(source).encode(), str(target).encode(), parameters):
        raise OSError(f"llama.cpp could not quantise {source}: error {code}")


def measure(
    files: dict[str, Path], *, threads: int, prompt: int, new: int, repeats: int
) -> dict[str, dict[str, float]]:
    """name -> tokens per second of a prompt of ``prompt`` tokens, and of ``new`` tokens after it, one at a time."""
    engine = _engine()
    options = {"n_ctx": CONTEXT, "n_batch": CONTEXT, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
    models = {name: engine.Llama(str(path), **options) for name, path in files.items()}
    best = {name: {"prefill": 0.0, "decode": 0.0} for name in files}
    for turn in range(repeats + 1):
        for name, model in models.items():
            ids = torch.randint(model.n_vocab(), (prompt + new,), generator=torch.Generator().manual_seed(0)).tolist()
            model.reset()
            start = time.perf_counter()
            model.eval(ids[:prompt])
            middle = time.perf_counter()
            for token in ids[prompt:]:
                model.eval([token])
            end = time.perf_counter()
            if turn:  # the first turn warms up
                best[name]["prefill"] = max(best[name]["prefill"], prompt / (middle - start))
                best[name]["decode"] = max(best[name]["decode"], new / (end - middle))
    return best


def run(folder: Path, *, file_type: str, threads: int, prompt: int, new: int, repeats: int) -> list[dict[str, Any]]:
    """Makes what is missing, measures the files, and prints a table; ratios are to the unpruned model of this run."""
    if not folder.exists():
        make_levels(folder)
    files = write_files(folder, file_type=file_type)
    speeds = measure(files, threads=threads, prompt=prompt, new=new, repeats=repeats)
    dense, dense_size = speeds["dense"], files["dense"].stat().st_size
    rows = [
        {
            "level": name,
            "megabytes": path.stat().st_size / 1e6,
            "size_ratio": path.stat().st_size / dense_size,
            **speeds[name],
            **{f"{key}_ratio": speeds[name][key] / dense[key] for key in dense},
        }
        for name, path in files.items()
    ]
    table = format_table(rows, COLUMNS, formats=FORMATS)
    (folder / "gguf.json").write_text(json.dumps({"type": file_type, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    (folder / "gguf.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{file_type}, {threads} threads, prompt of {prompt} tokens, {new} new tokens\n\n{table}")
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Size and speed of levels in llama.cpp.")
    parser.add_argument(
        "--folder",
        type=Path,
        default=FOLDER,
        help=f"a run with levels of SmolLM2; made if it is not there (default: {FOLDER})",
    )
    parser.add_argument("--type", choices=("f16", *QUANTISED), default="q8_0", help="of the files (default: q8_0)")
    parser.add_argument("--threads", type=int, default=2, help="threads of llama.cpp")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens after it")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each model; the best counts")
    options = parser.parse_args(argv)
    _engine()  # before anything is computed
    if options.prompt + options.new > CONTEXT:
        parser.error(f"--prompt and --new must be at most {CONTEXT} together")
    run(
        options.folder,
        file_type=options.type,
        threads=options.threads,
        prompt=options.prompt,
        new=options.new,
        repeats=options.repeats,
    )


if __name__ == "__main__":
    main()
