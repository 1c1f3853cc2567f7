"""Measure the elastic checkpoint of SmolLM2: perplexity of every width on text of three domains, switching, drafting.

    python -m recipes.elastic_study --run runs/restore_study/levels-mixture --base runs/restore_study/base
    python -m recipes.elastic_study --full-weight 1 --streams own --tokens 16512
    python -m recipes.elastic_study --norms levels            # with --full-weight 100, as gisp-hf elastic
    python -m recipes.elastic_study --report        # the table again, from the results that are there

The run is that of ``recipes.restore_study`` (a third of each domain, 4,096 tokens in each of 12 steps, to 50 %); it is
pruned now if the folder has no trajectory. A setting of the shared weights is one JSON file in
recipes/results/elastic, which grows number by number: a study that was killed goes on. Hardware: two CPU cores, 4 GB of
memory. Time: see docs/elastic.md.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from gisp_hf import Trajectory
from gisp_hf.atomic import write_text_atomic
from gisp_hf.evaluation import perplexity
from gisp_hf.levels.elastic import make_elastic, save_elastic
from gisp_hf.models.dtype import fast_dtype
from gisp_hf.recovery.batches import batches_of
from gisp_hf.recovery.config import RestoreConfig
from gisp_hf.recovery.elastic import FULL, full_weight, level_weights
from gisp_hf.recovery.elastic_file import give_norms, record, share
from gisp_hf.report import format_table
from recipes.compare_results import geometric_mean
from recipes.demo_data import DOMAINS, held_out_tokens, load_domain, load_smollm2
from recipes.restore_study import LEVELS, MIXTURE, NORM_TOKENS, TOKENS, Cell, draw, find_level, prepare

RESULTS = Path("recipes/results/elastic")
WORK = Path("runs/restore_study")
BETWEEN = 0.37  # none of the levels
WIDTHS = (FULL, *LEVELS, BETWEEN)
WINDOW = 256
DRAFT = 0.5
SWITCHES = 20


def measure(path: Path, key: str, value: Callable[[], Any]) -> Any:
    """The number of that key in a result file; measured and written now if it is not there."""
    facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if key not in facts:
        facts[key] = value()
        write_text_atomic(path, json.dumps(facts, indent=1) + "\n")
        print(f"{path.stem} {key}: {facts[key]}", flush=True)
    return facts[key]


def switch_times(model: Any) -> dict[str, float]:
    """Milliseconds of a switch, the median and the slowest of `SWITCHES` to and fro."""
    times = []
    for number in range(SWITCHES):
        start = time.perf_counter()
        model.set_sparsity(DRAFT if number % 2 == 0 else FULL)
        times.append(1000 * (time.perf_counter() - start))
    model.set_sparsity(FULL)
    return {"median": sorted(times)[len(times) // 2], "slowest": max(times)}


def drafting(model: Any, prompt: torch.Tensor, *, new_tokens: int) -> dict[str, Any]:
    """Greedy decoding at full width with and without a narrower draft of the same weights.

    ``acceptance``: drafted tokens that full width agrees with, of all drafted.
    """
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    draft = model.at(DRAFT)
    calls = {"full": 0, "draft": 0}
    for name, counted in (("full", model), ("draft", draft)):
        counted.register_forward_pre_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    found, seconds = [], []
    for assistant in (None, draft):
        calls.update(full=0, draft=0)
        start = time.perf_counter()
        found.append(
            model.generate(prompt, attention_mask=torch.ones_like(prompt), assistant_model=assistant, **options)
        )
        seconds.append(time.perf_counter() - start)
    length = found[0].shape[1] - prompt.shape[1]
    accepted = found[1].shape[1] - prompt.shape[1] - calls["full"]  # each call of the full model adds one of its own
    return {
        "same_text": bool(torch.equal(*found)),
        "new_tokens": length,
        "seconds_plain": seconds[0],
        "seconds_with_draft": seconds[1],
        "full_calls": calls["full"],
        "draft_calls": calls["draft"],
        "acceptance": accepted / max(1, calls["draft"]),
    }


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, Any, Trajectory]:
    model, tokenizer = load_smollm2(options.dtype)
    if not (options.run / "trajectory.json").is_file():
        if options.run.name != "levels-mixture":
            raise SystemExit(f"{options.run} holds no trajectory; without --run the study prunes by itself")
        material = prepare(options.run.parent, evaluation_tokens=options.evaluation_tokens, dtype=options.dtype)
        find_level(Cell(LEVELS[-1], tokens=0), material)
    if options.base.is_dir():
        model = AutoModelForCausalLM.from_pretrained(options.base, dtype=options.dtype)
    return model, tokenizer, Trajectory.load(options.run)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=WORK / "levels-mixture", metavar="DIR", help="of a pruning run")
    parser.add_argument("--base", type=Path, default=WORK / "base", metavar="DIR", help="the unpruned model")
    parser.add_argument("--streams", choices=("none", "unpruned", "own"), default="unpruned")
    parser.add_argument("--full-weight", type=float, metavar="W", help="default: that of gisp-hf elastic")
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help="of calibration")
    parser.add_argument("--blend", type=float, default=0.5, metavar="FRACTION", help="of targets, for --streams own")
    parser.add_argument(
        "--norms",
        choices=("base", "levels", "all"),
        default="base",
        help="which are trained: none, those of the levels, those of the full width too",
    )
    parser.add_argument("--norm-tokens", type=int, default=NORM_TOKENS, metavar="N", help="of their training, one pass")
    parser.add_argument("--widths", type=float, nargs="+", default=list(WIDTHS), metavar="FRACTION")
    parser.add_argument("--evaluation-tokens", type=int, default=4096, metavar="N", help="of each domain")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="to decode; 0: do not")
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="for text and files")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--report", action="store_true", help="write the table again, and run nothing")
    options = parser.parse_args(argv)
    options.dtype = fast_dtype("cpu")
    if options.full_weight is None:
        options.full_weight = full_weight(options.norms)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    if not options.report:
        run(options)
    text = table(options.output_dir)
    write_text_atomic(options.output_dir / "results.md", text + "\n")
    print(text)


def run(options: argparse.Namespace) -> None:
    model, tokenizer, trajectory = load(options)
    name = "unrestored"
    if options.streams != "none":
        name = f"{options.streams}-{options.tokens}-full{options.full_weight:g}"
        name += f"-blend{options.blend:g}" if options.streams == "own" else ""
    name += f"-norms_{options.norms}-{options.norm_tokens}" if options.norms != "base" else ""
    path = options.output_dir / f"{name}.json"
    settings = {"evaluation_tokens": options.evaluation_tokens, "dtype": str(options.dtype)}
    measure(path, "settings", lambda: {**settings, "ridge": RestoreConfig().middle_ridge})
    weights = {}
    if options.streams != "none":
        calibration = draw(MIXTURE, tokenizer, tokens=options.tokens, seed=0, work=options.work)
        batches = batches_of(calibration.dataset, batch_size=8, tokens=None, collate=calibration.collator)
        config, shares = RestoreConfig(blend=options.blend), level_weights(LEVELS, options.full_weight)
        start = time.perf_counter()
        fits = share(model, trajectory, batches, weights=shares, config=config, streams=options.streams)
        seconds = time.perf_counter() - start
        facts = record(fits, shares, config=config, streams=options.streams, full_apart=False)
        measure(path, "fit", lambda: {"seconds": seconds, "errors": facts["errors"]})
        weights = {fit.parameter: fit.weight for fit in fits}
    elastic: Any = make_elastic(model, trajectory, levels=LEVELS, weights=weights)
    if options.norms != "base":
        blocks = draw(MIXTURE, tokenizer, tokens=options.norm_tokens, seed=0, work=options.work, block_size=WINDOW)
        trained = give_norms(elastic, blocks, widths=(FULL, *LEVELS) if options.norms == "all" else LEVELS)
        measure(path, "norms", lambda: {level: _brief(facts) for level, facts in trained.items()})
    measure(path, "switch_ms", lambda: switch_times(elastic))
    for width in options.widths:
        elastic.set_sparsity(width)
        for domain in DOMAINS:
            ids = held_out_tokens(load_domain(domain).held_out, tokenizer, count=options.evaluation_tokens)
            measure(path, f"{width:g} {domain}", lambda ids=ids: perplexity(elastic, ids, window=WINDOW, batch_size=4))
    elastic.set_sparsity(FULL)
    if options.new_tokens:
        prompt = held_out_tokens(load_domain("wikipedia").held_out, tokenizer, count=256)[None, :32]
        measure(path, "drafting", lambda: drafting(elastic, prompt, new_tokens=options.new_tokens))
    measure(path, "file", lambda: file_sizes(elastic, trajectory, options))


def _brief(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: facts[key] for key in ("steps", "tokens", "seconds", "loss", "training")}


def file_sizes(elastic: PreTrainedModel, trajectory: Trajectory, options: argparse.Namespace) -> dict[str, float]:
    """Bytes of the weights: of the elastic checkpoint, of the base, and their ratio."""
    folder = save_elastic(elastic, options.work / f"elastic-{time.time_ns()}", trajectory=trajectory)
    sizes = [sum(path.stat().st_size for path in where.glob("model*.safetensors")) for where in (folder, options.base)]
    return {"elastic": sizes[0], "base": sizes[1], "ratio": sizes[0] / max(1, sizes[1])}


def table(folder: Path) -> str:
    """Perplexity of every setting and width; the mean is the geometric one over the domains."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        for width in dict.fromkeys(key.split(" ")[0] for key in facts if " " in key):
            found = {domain: facts[f"{width} {domain}"] for domain in DOMAINS if f"{width} {domain}" in facts}
            if len(found) == len(DOMAINS):
                name = "full" if float(width) == FULL else f"{float(width):.0%}"
                rows.append({"width": name, "weights": path.stem, **found, "mean": geometric_mean(found)})
    columns = {"width": "sparsity", "weights": "weights", **{name: name for name in DOMAINS}, "mean": "geometric mean"}
    return format_table(rows, columns, formats=dict.fromkeys((*DOMAINS, "mean"), ",.2f"))


if __name__ == "__main__":
    main()
