"""Time, memory and accuracy of the loss of an LM head: whole logits, this package's chunks, and PyTorch's own chunks.

    python -m recipes.benchmark_loss --output recipes/results/benchmark/loss.json     # two CPU cores, minutes

Each way takes the sum of the cross-entropies of the same tokens, and its gradient with respect to the hidden states;
the head is frozen. "plain" is the baseline: all logits at once, the loss in float32. "chunked" is
`gisp_hf.losses.chunked.chunked_cross_entropy`. "library" is ``torch.nn.functional.linear_cross_entropy`` (PyTorch 2.13)
with chunks of the same size, and "library, auto" with those that it chooses itself.

Each runs in a process of its own, so that peaks of memory do not mix. Memory is the peak of the process over what it
held before (Linux). Errors are relative to float64 on the same rounded inputs.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gisp_hf.losses.chunked import chunked_cross_entropy
from gisp_hf.report import format_table

BASELINE = "plain"
WAYS = (BASELINE, "chunked", "library", "library, auto")
DTYPES = ("float32", "bfloat16")


def make_inputs(options: argparse.Namespace, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (n, d), head (V, d) and targets (n,), random; one target in eight is ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(options.tokens, options.hidden, generator=generator).to(dtype)
    weight = (torch.randn(options.vocabulary, options.hidden, generator=generator) / options.hidden**0.5).to(dtype)
    targets = torch.randint(options.vocabulary, (options.tokens,), generator=generator)
    targets[::8] = -100
    return hidden, weight, targets


def make_loss(way: str, chunk: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if way == "plain":
        return lambda hidden, weight, targets: F.cross_entropy(
            F.linear(hidden, weight).float(), targets, reduction="sum"
        )
    if way == "chunked":
        return lambda hidden, weight, targets: chunked_cross_entropy(hidden, weight, None, targets, size=chunk)
    same = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
    chosen = same if way == "library" else torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, targets: F.linear_cross_entropy(
        hidden, weight, targets, reduction="sum", options=chosen
    )


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = 64) -> tuple[float, Tensor]:
    """Loss and gradient in float64, a few tokens at a time."""
    total, gradients, wide = 0.0, [], weight.double()
    for part, target in zip(hidden.double().split(chunk), targets.split(chunk), strict=True):
        part.requires_grad_()
        loss = F.cross_entropy(part @ wide.T, target, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, part)
        total += float(loss.detach())
        gradients.append(gradient)
    return total, torch.cat(gradients)


def measure(way: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    hidden, weight, targets = make_inputs(options, getattr(torch, dtype))
    loss_of = make_loss(way, options.chunk_tokens)
    hidden.requires_grad_()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = status_bytes("VmRSS")
    seconds = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        loss = loss_of(hidden, weight, targets)
        (gradient,) = torch.autograd.grad(loss, hidden)
        seconds.append(time.perf_counter() - start)
    peak = status_bytes("VmHWM") - before
    true_loss, true_gradient = reference(hidden.detach(), weight, targets)
    return {
        "way": way,
        "dtype": dtype,
        "seconds": min(seconds),
        "peak_bytes": peak,
        "loss_dtype": str(loss.dtype).removeprefix("torch."),
        "loss_error": abs(float(loss.detach()) - true_loss) / abs(true_loss),
        "gradient_error": float((gradient.double() - true_gradient).norm() / true_gradient.norm()),
    }


def status_bytes(name: str) -> int:
    """A field of /proc/self/status, which is in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def compare(options: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Measures every way in each dtype, and puts it beside the baseline of that dtype."""
    ways = [way for way in WAYS if not way.startswith("library") or hasattr(F, "linear_cross_entropy")]
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        for way in ways:
            command = [sys.executable, "-m", "recipes.benchmark_loss", *argv, "--child", way, dtype]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(run.stdout.splitlines()[-1])
            baseline = rows[-ways.index(way)] if way != BASELINE else row
            row["time_ratio"] = row["seconds"] / baseline["seconds"]
            row["memory_ratio"] = row["peak_bytes"] / baseline["peak_bytes"]
            rows.append(row)
    columns = {
        "dtype": "dtype",
        "way": "way",
        "seconds": "seconds",
        "time_ratio": f"time / {BASELINE}",
        "megabytes": "peak, MB",
        "memory_ratio": f"memory / {BASELINE}",
        "loss_error": "error of the loss",
        "gradient_error": "error of the gradient",
    }
    shown = [{**row, "megabytes": row["peak_bytes"] / 1e6} for row in rows]
    print(format_table(shown, columns, formats={"megabytes": ",.0f", "loss_error": ".0e", "gradient_error": ".0e"}))
    sizes = {name: getattr(options, name) for name in ("tokens", "hidden", "vocabulary", "chunk_tokens", "repeats")}
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), **sizes, "rows": rows}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time, memory and accuracy of the loss of an LM head on the CPU.")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in the batch")
    parser.add_argument("--hidden", type=int, default=576, help="width of the hidden states (SmolLM2-135M: 576)")
    parser.add_argument("--vocabulary", type=int, default=49152, help="entries of the vocabulary (SmolLM2: 49152)")
    parser.add_argument("--chunk-tokens", type=int, default=256, help="tokens in a chunk")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--output", type=Path, help="write the numbers there as JSON")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    if options.child:
        print(json.dumps(measure(*options.child, options)))
        return
    results = compare(options, argv)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
