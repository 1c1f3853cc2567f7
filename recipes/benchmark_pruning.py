"""Cost of pruning: this package beside a plain masked implementation, in one run, on the same model, data and steps.

    python -m recipes.benchmark_pruning                          # SmolLM2-135M-Instruct, two CPU cores, about 8 minutes
    python -m recipes.benchmark_pruning --repeats 3              # on a machine whose speed varies
    python -m recipes.benchmark_pruning --shape llama-2-7b-narrow   # random weights of that shape, on the CPU too
    python -m recipes.benchmark_pruning --shape llama-2-7b       # the same at full width, one GPU of 80 GB

(a) "masked" is the published way of working, written out below: gradients of all parameters, zeros instead of smaller
    matrices, so that the last step costs what the first one did.
(b) "gisp_hf" is a Trainer with GISPPruner: no gradient where nothing is scored, each gradient scored and freed as soon
    as it is complete, structures sliced out as it goes, and the loss taken a few tokens at a time.
(c) "activation" is (b) with method="gisp-activation": no gradient of any weight of a layer. It ranks by another score.

Each runs in a process of its own. Memory on a GPU is the peak that torch counts. On a CPU it is the weights and what a
second process holds at most beyond what it held when they were loaded: there glibc is told to return freed blocks at
once, which takes time, so that the peak is what the run needs and not what the allocator keeps for later. The peak of
the timed process, whose allocator keeps what it likes, over what it held before the model was loaded stands beside it
("resident"). Prints the ratios to (a).

Seconds of a step end when its structures are removed. (b) and (c) then write a level, which (a) does not; that time
stands by itself ("writing").
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from gisp_hf import GISPConfig, Trajectory, prune
from gisp_hf.criteria import taylor
from gisp_hf.criteria.base import share_out
from gisp_hf.criteria.taylor import score_entries
from gisp_hf.levels import stage
from gisp_hf.losses import chunked
from gisp_hf.models import discover
from gisp_hf.models.surgery import zero_structures
from gisp_hf.pruning import engine
from gisp_hf.pruning.normalization import normalizer
from gisp_hf.pruning.selection import minimum_kept, parameter_budget, removed_masks, select
from gisp_hf.report import format_table
from gisp_hf.training import identity
from recipes.benchmark_loss import status_bytes

SHAPES: dict[str, dict[str, int]] = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    # An eighth of its width: as deep, and the LM head has the same 2 % of the parameters. Runs on two cores.
    "llama-2-7b-narrow": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 32,
        "num_attention_heads": 8,
        "vocab_size": 4000,
    },
    # A quarter of its width.
    "llama-2-7b-quarter": {
        "hidden_size": 1024,
        "intermediate_size": 2752,
        "num_hidden_layers": 32,
        "num_attention_heads": 8,
        "vocab_size": 8000,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "vocab_size": 64,
    },
}


def load(shape: str, *, blocks: int, length: int, dtype: torch.dtype) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    if shape == "smollm2":
        from recipes.demo_data import load_smollm2, load_wikipedia, pack_blocks, split_articles

        model, tokenizer = load_smollm2(dtype)
        calibration, _ = split_articles(load_wikipedia())
        return model, pack_blocks(calibration, tokenizer, length=length, count=blocks)
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    tokens = torch.randint(config.vocab_size, (blocks, length), generator=torch.Generator().manual_seed(0))
    return model, [{"input_ids": row, "labels": row.clone()} for row in tokens]


def prune_masked(model: PreTrainedModel, data: list[dict[str, Any]], *, config: GISPConfig, batch_size: int) -> Any:
    """The plain way: every gradient, dense passes, zeros. Returns (removal order, seconds per step)."""
    layout = discover(model)
    minimum = minimum_kept(layout, config)
    order = [torch.full((block.size,), -1, dtype=torch.int32) for block in layout.blocks]
    length, seconds = 0, []
    model.train()
    for step in range(1, config.num_steps + 1):
        start = time.perf_counter()
        model.zero_grad()
        targets = len(data) * (len(data[0]["labels"]) - 1)
        for first in range(0, len(data), batch_size):
            ids = torch.stack([row["input_ids"] for row in data[first : first + batch_size]]).to(model.device)
            model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(targets)).loss.backward()
        scores = []
        for block, low in zip(layout.blocks, minimum):
            total = torch.zeros(block.size, device=model.device)
            for member in block.members:
                weight = model.get_parameter(member.parameter)
                assert weight.grad is not None
                entries = score_entries(weight, weight.grad, dim=member.dim)
                total += share_out(entries, member, block.size)
            scores.append(total / normalizer(block, config.normalization) if block.size > low else None)
        budget = parameter_budget(layout, config.sparsity_levels[-1] * step / config.num_steps)
        for number, index in select(layout, scores, order, minimum=minimum, budget=budget, multiples=config.multiples):
            order[number][index] = length
            length += 1
        for block, gone in zip(layout.blocks, removed_masks(layout, order, length=length, multiples=config.multiples)):
            if gone.any():
                zero_structures(model, block, gone.nonzero().squeeze(1))
        seconds.append(time.perf_counter() - start)
    return order, seconds


TIGHT = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # every larger block is the system's again as soon as it is freed
SIDES = {"masked": "gisp", "gisp_hf": "gisp", "activation": "gisp-activation"}  # side -> method


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def prune_ours(
    model: PreTrainedModel,
    data: list[dict[str, Any]],
    *,
    config: GISPConfig,
    batch_size: int,
    chunk_tokens: int | None,
    checkpointing: bool,
) -> Any:
    """A Trainer with the callback. Returns (removal order, seconds per step)."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=f"{folder}/trainer",
            max_steps=config.num_steps,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=-(-len(data) // batch_size),
            train_sampling_strategy="sequential",  # the same batches as the other side
            max_grad_norm=0.0,
            activation_checkpointing=checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False},
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[clock])
        prune(trainer, config, Path(folder) / "levels", chunk_tokens=chunk_tokens)
        order = Trajectory.load(Path(folder) / "levels").order
    return order, [after - before for before, after in zip(clock.times, clock.times[1:])]


class _Stopwatch:
    """Seconds spent in some functions, by name; each is replaced by one that takes the time around it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, function: str, name: str) -> None:
        plain = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

        setattr(owner, function, timed)


def watch_parts() -> _Stopwatch:
    """Where the time of a run of ours goes; what is left over is the decoder layers, forward and backward."""
    stopwatch = _Stopwatch()
    stopwatch.watch(chunked.ChunkedLoss, "_loss", "LM head, loss and its gradient")
    stopwatch.watch(taylor, "score_entries", "scores, inside the backward pass")
    stopwatch.watch(engine.Engine, "advance", "ranking and slicing")
    stopwatch.watch(stage, "save_level", "writing levels")
    stopwatch.watch(identity, "model_fingerprint", "fingerprint of the base")
    return stopwatch


def child(side: str, options: argparse.Namespace) -> None:
    """One side, in this process; prints one line of JSON."""
    if options.shape == "smollm2":
        import gensim  # noqa: F401  what loading the text imports is not the model's memory
    before = status_bytes("VmRSS")
    blocks = options.activation_blocks if side == "activation" else options.blocks
    model, data = load(options.shape, blocks=blocks, length=options.block_length, dtype=getattr(torch, options.dtype))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if not torch.cuda.is_available():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    loaded = status_bytes("VmRSS")
    config = GISPConfig(
        num_steps=options.steps,
        sparsity_levels=(options.sparsity,),
        method=SIDES[side],
        channel_multiple=options.channel_multiple,
    )
    parts: dict[str, float] = {}
    if side == "masked":
        order, seconds = prune_masked(model, data, config=config, batch_size=options.batch_size)
    else:
        stopwatch = watch_parts()
        start = time.perf_counter()
        order, seconds = prune_ours(
            model,
            data,
            config=config,
            batch_size=options.batch_size,
            chunk_tokens=options.chunk_tokens or None,
            checkpointing=options.checkpointing,
        )
        parts = stopwatch.seconds
        seconds[-1] -= parts["writing levels"]  # the masked run writes none
        parts["decoder layers, Trainer, rest"] = time.perf_counter() - start - sum(parts.values())
    highest = status_bytes("VmHWM")
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else weights + highest - loaded
    order = torch.cat(list(order)).tolist()
    memory = {"peak": peak, "resident": highest - before, "weights": weights}
    print("RESULT " + json.dumps({"seconds": seconds, **memory, "order": order, "parts": parts}))


def compare(options: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Runs all sides, which take turns, and puts them side by side."""
    results: dict[str, dict[str, Any]] = {}
    for turn in range(1, options.repeats + 1):
        for side in SIDES:
            print(f"running {side}, {turn} of {options.repeats} ...", flush=True)
            found = run_side(side, argv)
            if side in results:
                found["seconds"] = [min(pair) for pair in zip(found["seconds"], results[side]["seconds"])]
            results[side] = found
    for side, found in results.items():
        if not torch.cuda.is_available():
            print(f"running {side} for its memory ...", flush=True)
            found["peak"] = run_side(side, argv, TIGHT)["peak"]
    masked, ours = results["masked"], results["gisp_hf"]
    gone = [{i for i, position in enumerate(side["order"]) if position >= 0} for side in results.values()]
    activation = {**_ratios(results["activation"], masked), "removed": len(gone[2]), "shared": len(gone[0] & gone[2])}
    activation["tokens"] = options.activation_blocks * options.block_length
    summary = {
        "shape": options.shape,
        "tokens": options.blocks * options.block_length,
        "steps": options.steps,
        "repeats": options.repeats,
        "channel_multiple": options.channel_multiple,
        "checkpointing": options.checkpointing,
        "weights_mb": masked["weights"] / 1e6,
        **_ratios(ours, masked),
        "removed": len(gone[0]),
        "removed_differently": len(gone[0] ^ gone[1]) // 2,
        "same_order": masked["order"] == ours["order"],
        "activation": activation,
    }
    rows = [
        {
            "side": name,
            "seconds": side["seconds"],
            "total": sum(side["seconds"]),
            "first": side["seconds"][0],
            "last": side["seconds"][-1],
            "writing": side["parts"].get("writing levels", 0.0),
            "peak": side["peak"] / 1e6,
            "resident": side["resident"] / 1e6,
        }
        for name, side in results.items()
    ]
    columns = {"side": "", "total": "total, s", "first": "first step, s", "last": "last step, s"}
    columns |= {"writing": "writing, s", "peak": "peak, MB", "resident": "resident, MB"}
    print("\n" + format_table(rows, columns, formats={"peak": ",.0f", "resident": ",.0f"}))
    print(
        f"\ntime {summary['time_ratio']:.2f}, last step {summary['last_step_ratio']:.2f}, memory "
        f"{summary['memory_ratio']:.2f} of the masked run; {summary['removed']:,} structures removed, "
        f"{summary['removed_differently']} of them other ones; same order: {summary['same_order']}"
    )
    print(
        f"activation, {activation['tokens']:,} tokens a step: time {activation['time_ratio']:.2f}, "
        f"last step {activation['last_step_ratio']:.2f}, memory {activation['memory_ratio']:.2f} of the masked run; "
        f"{activation['removed']:,} structures removed, {activation['shared']:,} of them also by the masked run; peak "
        f"{results['activation']['peak'] / masked['weights']:.2f} x the weights"
    )
    parts = [{"part": name, "seconds": seconds} for name, seconds in ours["parts"].items()]
    print("\n" + format_table(parts, {"part": "gisp_hf, part", "seconds": "s"}))
    return summary | {"rows": rows, "parts": ours["parts"]}


def run_side(side: str, argv: list[str], environ: dict[str, str] | None = None) -> dict[str, Any]:
    """One side, in a process of its own.

    Raises:
        RuntimeError: it failed; what it printed stands above.
    """
    command = [sys.executable, "-m", "recipes.benchmark_pruning", *argv, "--side", side]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, **(environ or {})})
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if run.returncode or not lines:
        raise RuntimeError(f"{side} failed with exit code {run.returncode}; see its output above")
    return json.loads(lines[0].removeprefix("RESULT "))


def _ratios(side: dict[str, Any], masked: dict[str, Any]) -> dict[str, float]:
    return {
        "time_ratio": sum(side["seconds"]) / sum(masked["seconds"]),
        "first_step_ratio": side["seconds"][0] / masked["seconds"][0],
        "last_step_ratio": side["seconds"][-1] / masked["seconds"][-1],
        "memory_ratio": side["peak"] / masked["peak"],
        "resident_ratio": side["resident"] / masked["resident"],
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of pruning, beside a plain masked implementation.")
    parser.add_argument("--shape", choices=["smollm2", *SHAPES], default="smollm2", help="model (default: smollm2)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--steps", type=int, default=8, help="pruning steps")
    parser.add_argument("--sparsity", type=float, default=0.5, help="at the end")
    parser.add_argument("--blocks", type=int, default=8, help="calibration blocks in each step")
    parser.add_argument("--activation-blocks", type=int, metavar="N", help="those of (c), if fewer do for it")
    parser.add_argument("--block-length", type=int, default=128, help="tokens in a block")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks in a forward pass")
    parser.add_argument(
        "--chunk-tokens", type=int, default=256, help="of the loss in (b) and (c); 0 for the model's own"
    )
    parser.add_argument(
        "--channel-multiple", type=int, default=1, metavar="N", help="of the channels that layers have, in every step"
    )
    parser.add_argument("--checkpointing", action="store_true", help="of activations, in (b) and (c)")
    parser.add_argument("--repeats", type=int, default=1, help="the sides take turns; a step counts by its fastest run")
    parser.add_argument("--output", type=Path, help="write the summary there as JSON")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.activation_blocks = options.activation_blocks or options.blocks
    return options


def main(argv: list[str]) -> None:
    options = parse(argv)
    if options.side:
        child(options.side, options)
        return
    summary = compare(options, argv)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
