"""How much of what restoration leaves could gradient descent still repair? SmolLM2, one level, three domains.

    python -m recipes.restore_bound                  # 30 %; prunes first if there is no level
    python -m recipes.restore_bound --level 0.5 --epochs 4

Restores a level of `recipes.restore_study` in closed form, and then trains *every* matrix and norm of each layer, layer
after layer, to put out the target of the restoration: Adam on the squared error of the layer's output, on the same
tokens, a tenth of them held out. The weights of the epoch with the smallest held-out error stay. The closed form has
only ``o_proj`` and ``down_proj`` to work with, so this bounds what local repair can reach. Prints perplexity on
held-out text; one JSON file per setting in recipes/results/restore_bound. Hardware: two CPU cores, 6 GB of memory.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from gisp_hf.atomic import write_text_atomic
from gisp_hf.recovery.config import RestoreConfig
from gisp_hf.recovery.restore import restore
from gisp_hf.report import format_table
from recipes import restore_study
from recipes.compare_results import geometric_mean
from recipes.demo_data import DOMAINS
from recipes.restore_study import MIXTURE, TOKENS, WINDOW, WORK, Cell, Material

RESULTS = Path("recipes/results/restore_bound")
HELD_OUT = 10  # one batch in so many

Run = Callable[[nn.Module, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Settings:
    level: float = 0.3
    tokens: int = TOKENS
    epochs: int = 3
    learning_rate: float = 1e-4
    batch_size: int = 8
    blend: float = 0.5
    seed: int = 0


def runner(model: PreTrainedModel, ids: torch.Tensor) -> tuple[Run, Callable[[torch.Tensor], torch.Tensor]]:
    """How the model runs one of its layers on a batch of this shape, and what enters the first of them."""
    seen: dict[str, Any] = {}

    def keep(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs, hidden=args[0])

    def embed(ids: torch.Tensor) -> torch.Tensor:
        with model.model.layers[0].register_forward_pre_hook(keep, with_kwargs=True), torch.no_grad():
            model.model(input_ids=ids, use_cache=False)
        return seen.pop("hidden")

    embed(ids)
    arguments = {key: value for key, value in seen.items() if key != "past_key_values"}
    return lambda layer, hidden: layer(hidden, **arguments), embed


def train_layer(
    layer: nn.Module, run: Run, inputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], settings: Settings
) -> tuple[float, float]:
    """Trains a layer in place; its relative error on held-out batches before and after."""
    held_out = [i for i in range(len(inputs)) if i % HELD_OUT == HELD_OUT - 1] or [0]
    training = [i for i in range(len(inputs)) if i not in held_out] or [0]

    def error() -> float:
        with torch.no_grad():
            off = sum(float(F.mse_loss(run(layer, inputs[i]), targets[i])) for i in held_out)
        return (off / sum(float((targets[i] - inputs[i]).square().mean()) for i in held_out)) ** 0.5

    layer.requires_grad_(True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=settings.learning_rate)
    before = best = error()
    kept = copy.deepcopy(layer.state_dict())
    for _ in range(settings.epochs):
        for i in training:
            loss = F.mse_loss(run(layer, inputs[i]), targets[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if (now := error()) < best:
            best, kept = now, copy.deepcopy(layer.state_dict())
    layer.load_state_dict(kept)
    layer.requires_grad_(False)
    return before, best


def train_layers(
    level: PreTrainedModel, base: PreTrainedModel, batches: Sequence[torch.Tensor], settings: Settings
) -> list[dict[str, float]]:
    """Trains all layers of a level in place, in order; the errors of each."""
    errors = []
    run, embed = runner(level, batches[0])
    run_base, embed_base = runner(base, batches[0])
    stream, dense = [embed(ids) for ids in batches], [embed_base(ids) for ids in batches]
    layers = list(zip(level.model.layers, base.model.layers, strict=True))
    for number, (layer, whole) in enumerate(tqdm(layers, desc="Training", unit="layer")):
        with torch.no_grad():
            own = [run_base(whole, hidden) for hidden in stream]
            dense = [run_base(whole, hidden) for hidden in dense]
            blend = settings.blend
            targets = [blend * goal + (1 - blend) * mine for goal, mine in zip(dense, own)]
        before, after = train_layer(layer, run, stream, targets, settings)
        errors.append({"layer": number, "before": before, "after": after})
        with torch.no_grad():
            stream = [run(layer, hidden) for hidden in stream]
    return errors


def measure(settings: Settings, material: Material) -> dict[str, Any]:
    """Perplexity of the level as it is, restored, and trained, and the seconds that each took."""
    source = restore_study.find_level(Cell(settings.level, tokens=0), material)
    base = AutoModelForCausalLM.from_pretrained(material.work / "base", dtype=torch.float32)
    level = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    text = restore_study.draw(
        MIXTURE, material.tokenizer, tokens=settings.tokens, seed=settings.seed, work=material.work
    )

    def perplexities() -> dict[str, float]:
        found = material.perplexities(level)
        return {**found, "mean": geometric_mean(found)}

    rows = {"pruned": {**perplexities(), "seconds": 0.0}}
    start = time.perf_counter()
    restore(level, base, text, RestoreConfig(tokens=None, blend=settings.blend), progress=False)
    rows["restored"] = {"seconds": time.perf_counter() - start, **perplexities()}
    start = time.perf_counter()
    batches = restore_study.batches_of_text(text, batch_size=settings.batch_size)
    batches = [batch for batch in batches if len(batch) == settings.batch_size]
    errors = train_layers(level.eval(), base.eval(), batches, settings)
    rows["restored, all weights trained"] = {"seconds": time.perf_counter() - start, **perplexities()}
    return {"rows": rows, "errors": errors}


def main(argv: Sequence[str] | None = None) -> None:
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", type=float, default=default.level, metavar="FRACTION")
    parser.add_argument("--tokens", type=int, default=default.tokens, metavar="N", help="of calibration")
    parser.add_argument(
        "--epochs", type=int, default=default.epochs, metavar="N", help="over the tokens, at each layer"
    )
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate, metavar="RATE")
    parser.add_argument("--evaluation-tokens", type=int, default=4096, metavar="N", help="of each domain")
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="text, base model and levels")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, metavar="DIR", help="results")
    options = parser.parse_args(argv)
    settings = Settings(options.level, options.tokens, options.epochs, options.learning_rate)
    material = restore_study.prepare(
        options.work, evaluation_tokens=options.evaluation_tokens, dtype=restore_study.dtype_here()
    )
    found = measure(settings, material)
    name = f"level-{settings.level:g}-{settings.tokens}-epochs{settings.epochs}-rate{settings.learning_rate:g}.json"
    facts = {"settings": asdict(settings), "evaluation_tokens": options.evaluation_tokens, "window": WINDOW, **found}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_text_atomic(options.output_dir / name, json.dumps(facts, indent=1) + "\n")
    columns = {name: name for name in ("way", *DOMAINS)} | {"mean": "geometric mean", "seconds": "seconds"}
    formats = {**dict.fromkeys((*DOMAINS, "mean"), ",.2f"), "seconds": ",.0f"}
    print(format_table([{"way": way, **row} for way, row in found["rows"].items()], columns, formats=formats))


if __name__ == "__main__":
    main()
