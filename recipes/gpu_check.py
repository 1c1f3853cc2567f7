"""Everything in this repository that waits for a GPU, in one command within 9 minutes, without internet.

    python -m recipes.gpu_check                  # one GPU; 80 GB for all of it. Writes runs/gpu_check.json and .md
    python -m recipes.gpu_check --tiny           # the same checks on small shapes, on the CPU where there is no GPU
    python -m recipes.gpu_check --only speed     # one check

Models have random weights of the named shape, so times and memory are real and perplexity is not. Each check runs in a
process of its own. A check that the machine cannot run is skipped, and its line says what is missing.

Not run on a GPU yet by the authors of this file.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gisp_hf import GISPConfig, Trajectory, __version__
from gisp_hf.evaluation import measure_speed
from gisp_hf.models import discover
from gisp_hf.models.surgery import as_pruned_model
from gisp_hf.models.wrapped import plain_shell
from gisp_hf.pruning.engine import Engine

ROOT = Path(__file__).parents[1]
LIMIT = 9 * 60  # seconds for everything
TOKENS = 2048  # in a scoring step, as 8 sequences of 256

LLAMA = {"vocab_size": 32000, "max_position_embeddings": 4096}
SHAPES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 8},
}


class Skip(Exception):
    """The machine lacks what a check needs."""


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _need(tiny: bool, *, gigabytes: float = 0, package: str | None = None, cuda: bool = False) -> None:
    if package is not None and find_spec(package) is None:
        raise Skip(f"{package} is not installed")
    if tiny and not cuda:
        return
    if not torch.cuda.is_available():
        raise Skip("no CUDA GPU")
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    if memory < gigabytes:
        raise Skip(f"{gigabytes:g} GB of GPU memory are needed, {memory:.0f} GB are there")


def _random_model(shape: str) -> PreTrainedModel:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    torch.set_default_dtype(dtype)  # a float32 copy of a large model would not fit
    try:
        with _device():
            return LlamaForCausalLM(LlamaConfig(**LLAMA, **SHAPES[shape]))
    finally:
        torch.set_default_dtype(torch.float32)


# ---- checks: each returns numbers, or raises Skip --------------------------------------------------------------------


def check_pruning(tiny: bool) -> dict[str, Any]:
    """Time and memory of masked, gisp and gisp-activation on a Llama-2-7B shape."""
    _need(tiny, gigabytes=70)
    shape = ["tiny", "--block-length", "16"] if tiny else ["llama-2-7b", "--dtype", "bfloat16", "--block-length", "256"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "summary.json"
        command = [sys.executable, "-m", "recipes.benchmark_pruning", "--shape", *shape, "--steps", "3"]
        _run([*command, "--output", str(output)])
        summary = json.loads(output.read_text())
    keep = ("time_ratio", "last_step_ratio", "memory_ratio")
    rows = {row["side"]: {"seconds": row["total"], "peak_mb": row["peak"]} for row in summary["rows"]}
    return {"sides": rows, "gisp_hf": {k: summary[k] for k in keep}, "activation": summary["activation"]}


def check_speed(tiny: bool) -> dict[str, Any]:
    """Prefill and decode of a Llama-2-7B shape at 0, 20 and 50 %."""
    _need(tiny, gigabytes=40)
    shape, multiple = ("tiny", 8) if tiny else ("7b", 64)
    dense = _random_model(shape).eval()
    speeds: dict[str, Any] = {}
    for sparsity in (0.2, 0.5):
        pruned = _random_model(shape).eval()
        layout = discover(pruned)
        config = GISPConfig(method="random", sparsity_levels=(sparsity,), channel_multiple=multiple)
        engine = Engine(pruned, layout, config)
        with engine.watch():
            engine.accumulate()
        engine.advance(sparsity)
        as_pruned_model(pruned, layout, [len(keep) for keep in engine.kept()])
        found = measure_speed({"dense": dense, "pruned": pruned}, prompt_tokens=64 if tiny else 2048, new_tokens=16)
        speeds[f"{sparsity:g}"] = {
            "prefill_ratio": found["pruned"].prefill / found["dense"].prefill,
            "decode_ratio": found["pruned"].decode / found["dense"].decode,
            "dense_prefill": found["dense"].prefill,
            "dense_decode": found["dense"].decode,
        }
        del pruned, engine
    return speeds


def check_13b(tiny: bool) -> dict[str, Any]:
    """One step of gisp-activation on a 13B shape in bfloat16."""
    _need(tiny, gigabytes=36)
    return _score_once(_random_model("tiny" if tiny else "13b"), gates=False)


def check_4bit(tiny: bool) -> dict[str, Any]:
    """Scores of a 7B shape in 4 bits beside those in bfloat16: rank correlation, time and memory."""
    _need(tiny, gigabytes=24, package="bitsandbytes")
    model = _random_model("tiny" if tiny else "7b")
    plain = _score_once(model, gates=False)
    four = _score_once(_to_4bit(model), gates=True)
    pairs = [(a, b) for a, b in zip(plain.pop("scores"), four.pop("scores")) if len(a) > 64]
    correlations = [_spearman(a, b) for a, b in pairs]
    return {"bfloat16": plain, "nf4": four, "rank_correlation": [min(correlations), max(correlations)]}


def check_70b_4bit(tiny: bool) -> dict[str, Any]:
    """One step of gisp-activation on a 70B shape in 4 bits: what the table of docs/memory.md estimates."""
    _need(tiny, gigabytes=60, package="bitsandbytes")
    shape = "tiny" if tiny else "70b"
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA, **SHAPES[shape]))
    return _score_once(_to_4bit(model), gates=True)


def check_fsdp2(tiny: bool) -> dict[str, Any]:
    """FSDP2 by ``accelerate launch`` with one process: the order of a plain run; and resuming under FSDP2."""
    _need(tiny, cuda=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = _small_run(folder)
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
        launch += ["--config_file", "recipes/accelerate/fsdp2.yaml"]
        _run([sys.executable, "recipes/prune.py", *arguments, "--output_dir", str(folder / "plain")])
        saving = ["--output_dir", str(folder / "fsdp2"), "--save_strategy", "steps", "--save_steps", "1"]
        _run([*launch, "recipes/prune.py", *arguments, *saving])
        plain, first = (Trajectory.load(folder / run / "levels") for run in ("plain", "fsdp2"))
        for number in (3, 4):
            shutil.rmtree(folder / "fsdp2" / f"checkpoint-{number}", ignore_errors=True)
        _run([*launch, "recipes/prune.py", *arguments, *saving, "--resume_from_checkpoint", "true"])
        resumed = Trajectory.load(folder / "fsdp2" / "levels")
    same = sum(int(((a >= 0) & (b >= 0)).sum()) for a, b in zip(plain.order, first.order))
    return {"removed": len(plain), "shared_with_plain": same, "resumed_equal": resumed.digest() == first.digest()}


CHECKS: dict[str, tuple[Callable[[bool], dict[str, Any]], int]] = {  # name -> (check, seconds at most)
    "fsdp2": (check_fsdp2, 120),
    "pruning": (check_pruning, 180),
    "speed": (check_speed, 60),
    "4bit": (check_4bit, 60),
    "13b": (check_13b, 60),
    "70b-4bit": (check_70b_4bit, 90),
}


# ---- parts of checks -------------------------------------------------------------------------------------------------


def _small_run(folder: Path) -> list[str]:
    """Options of recipes/prune.py for a small model and text, both written here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 256)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**LLAMA, "vocab_size": 256}, **SHAPES["tiny"])).save_pretrained(folder / "model")
    numbers = torch.randint(3, 256, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{number}" for number in numbers))
    options = {"model_name": folder / "model", "data": folder / "text.txt", "block_length": 32, "num_blocks": 16}
    options |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_steps": 4, "dtype": "float32"}
    options |= {"method": "gisp-activation", "sparsity_levels": 0.3}
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def _score_once(model: PreTrainedModel, *, gates: bool) -> dict[str, Any]:
    """Seconds and peak memory of a second scoring step, with activation checkpointing."""
    config = GISPConfig(method="gisp-activation", sparsity_levels=(0.1,))
    engine = Engine(model, discover(plain_shell(model)), config, shrink=not gates, gates=gates)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train().requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    device = model.model.norm.weight.device
    length = 256 if device.type == "cuda" else 16
    ids = torch.randint(model.config.vocab_size, (TOKENS // 256, length), device=device)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with engine.watch():
        for _ in range(2):  # the first one chooses kernels
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            engine.accumulate()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    result = {"seconds": seconds, "tokens": ids.numel(), "weights_gb": weights / 1e9, "parameters": _count(model)}
    result |= {} if peak is None else {"peak_gb": peak / 1e9, "peak_over_weights": peak / weights}
    return {**result, "scores": [score.cpu() for score in engine.scores if score is not None]}


def _count(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in plain_shell(model).parameters())


def _to_4bit(model: PreTrainedModel) -> PreTrainedModel:
    """Linear layers of the decoder in NF4, one after the other; random ones where the model has no weights."""
    import bitsandbytes as bnb

    device = _device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, module in list(model.model.layers.named_modules()):
        if not isinstance(module, torch.nn.Linear):
            continue
        weight = module.weight.data
        if weight.is_meta:
            weight = torch.randn(weight.shape, device=device, dtype=dtype) * 0.02
        shape = (module.in_features, module.out_features)
        four = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
        four.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
        owner, _, leaf = name.rpartition(".")
        setattr(model.model.layers.get_submodule(owner), leaf, four)
    rest = [(name, p) for name, p in model.named_parameters() if p.is_meta]
    for name, parameter in rest:
        owner, _, leaf = name.rpartition(".")
        values = torch.ones if parameter.ndim == 1 else torch.randn
        filled = torch.nn.Parameter(
            values(parameter.shape, device=device, dtype=dtype) * (1 if parameter.ndim == 1 else 0.02)
        )
        setattr(model.get_submodule(owner), leaf, filled)
    if rest:  # rotary frequencies are computed, not stored
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    return model


def _spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort().double(), b.argsort().argsort().double()])
    return float(torch.corrcoef(ranks)[0, 1])


def _run(command: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} failed:\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")


# ---- the run ---------------------------------------------------------------------------------------------------------


def child(name: str, tiny: bool) -> None:
    """One check, in this process; prints one line of JSON."""
    try:
        result = {"status": "ran", "numbers": CHECKS[name][0](tiny)}
        result["numbers"].pop("scores", None)
    except Skip as reason:
        result = {"status": "skipped", "reason": str(reason)}
    print("RESULT " + json.dumps(result))


def run_checks(names: list[str], *, tiny: bool, limit: float = LIMIT) -> dict[str, Any]:
    """All checks one after the other; one that fails or takes too long does not stop the others."""
    end, results = time.monotonic() + limit, {}
    for name in names:
        left = end - time.monotonic()
        left = left if tiny else min(left, CHECKS[name][1])
        start = time.monotonic()
        if left < 5:
            results[name] = {"status": "skipped", "reason": f"the {limit:g} seconds for all checks are over"}
            continue
        command = [sys.executable, "-m", "recipes.gpu_check", "--check", name, *(["--tiny"] if tiny else [])]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=left)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            failed = {"status": "failed", "reason": (done.stderr or done.stdout)[-2000:]}
            results[name] = json.loads(lines[0].removeprefix("RESULT ")) if lines else failed
        except subprocess.TimeoutExpired:
            results[name] = {"status": "failed", "reason": f"took longer than {left:.0f} s"}
        results[name]["wall_s"] = round(time.monotonic() - start, 1)
        print(line_of(name, results[name]), flush=True)
    return results


def line_of(name: str, result: dict[str, Any]) -> str:
    """The line of a check, for the documents."""
    if result["status"] == "ran":
        return f"- {name}: {json.dumps(_rounded(result['numbers']))}"
    return f"- {name}: {result['status']}: {result['reason'].strip()}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def main(argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Everything that waits for a GPU.")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on the CPU where there is no GPU")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS), help="checks to run")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check.json"), help="and .md beside it")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all checks")
    parser.add_argument("--check", choices=list(CHECKS), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.check:
        child(options.check, options.tiny)
        return {}
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    facts = {"device": card, "torch": torch.__version__, "gisp_hf": __version__, "tiny": options.tiny}
    print(f"{card}, torch {torch.__version__}")
    report = {**facts, "checks": run_checks(options.only, tiny=options.tiny, limit=options.limit)}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = [f"{card}, torch {torch.__version__}:", "", *(line_of(*item) for item in report["checks"].items())]
    options.output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    main(sys.argv[1:])
