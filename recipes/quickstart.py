"""Prune and restore SmolLM2-135M-Instruct at four nested levels with a plain Trainer and one callback, and watch it.

Calibrated on a third each of Wikipedia, news and code, and measured on other documents of all three. Restoration fits
the output projections of each level anew, in closed form.

    make quickstart                       # or: python -m recipes.quickstart
    python -m recipes.quickstart --one-shot --output-dir runs/compared

The model is the Instruct one, unpacked from 4 bits (see recipes/demo_data.py). Hardware: two CPU cores and 5 GB of
memory. A level shows up, with its perplexity and a sample of its text, as soon as it is reached.
Writes to runs/quickstart (the next run: runs/quickstart-2): sparsity-0.20 ... 0.50 (checkpoints), trajectory.* (the
removal order), results.json, results.md and three plots. `make bench` measures the speed of the levels.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from gisp_hf import GISPConfig, GISPPruner, RestoreConfig, Trajectory
from gisp_hf.config import level_name
from gisp_hf.evaluation import evaluation_mode, perplexity
from gisp_hf.levels.info import read_levels
from gisp_hf.models.dtype import describe_dtypes, fast_dtype
from gisp_hf.report import format_table, plot_loss, plot_perplexity, plot_removed
from gisp_hf.training.stages import Level, Stage
from recipes.demo_data import Domain, held_out_tokens, load_domains, load_smollm2, mixture_blocks, write_mixture

FOLDER = Path("runs/quickstart")
BATCH_SIZE = 8  # blocks in one forward pass
WINDOW = 256  # tokens, of perplexity
PROMPT = "The history of the city begins in"
COLUMNS = {
    "level": "level",
    "sparsity": "sparsity",
    "parameters": "parameters",
    "pruned": "pruned",
    "perplexity": "restored",
    "wikipedia": "wikipedia",
    "news": "news",
    "code": "code",
    "one_shot": "one shot",
    "groups_removed": "groups removed",
    "channels_removed": "channels removed",
}


class LiveView(TrainerCallback):
    """Shows a run while it goes on: one line with the time left, and what each level is worth once it is reached."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, held_out: Mapping[str, torch.Tensor], *, prompt: str
    ) -> None:
        self.tokenizer = tokenizer
        self.held_out = held_out
        self.prompt = prompt
        self.texts: dict[str, str] = {}
        self.seconds: dict[str, float] = {}  # from the first step until the level is measured
        self._names = iter(())
        self._bar: tqdm | None = None
        self._start = 0.0

    def follow(self, levels: tuple[float, ...]) -> None:
        self._names = iter([level_name(level) for level in levels])

    def evaluate(self, model: PreTrainedModel) -> dict[str, float]:
        """For ``GISPPruner(evaluate=...)``: called with the model at each level, the mildest first."""
        name = next(self._names)
        if self._bar is not None:
            self._bar.set_description(f"measuring {name}")
        found = self.measure(model, name)  # the pruner prints it
        self.seconds[name] = time.perf_counter() - self._start
        tqdm.write(f"{name} after {self.seconds[name]:.0f} s writes: {self.texts[name]!r}")
        if self._bar is not None:
            self._bar.set_description("pruning")
        return found

    def measure(self, model: PreTrainedModel, name: str) -> dict[str, float]:
        """Perplexity on each domain and their geometric mean; keeps what ``model`` writes after the prompt."""
        with evaluation_mode(model):
            inputs = self.tokenizer(self.prompt, return_tensors="pt").to(model.device)
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=24,
                do_sample=False,
                use_cache=True,  # it is off during the run
            )
        self.texts[name] = str(self.tokenizer.decode(output[0], skip_special_tokens=True))
        return self.perplexities(model)

    def perplexities(self, model: PreTrainedModel) -> dict[str, float]:
        """On each domain, and as ``perplexity`` their geometric mean."""
        found = {domain: perplexity(model, tokens, window=WINDOW) for domain, tokens in self.held_out.items()}
        return {"perplexity": statistics.geometric_mean(found.values()), **found}

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()
        # by batches, not steps, so that it moves every few seconds; steps become cheaper: the time left is an upper one
        total = state.max_steps * args.gradient_accumulation_steps
        self._bar = tqdm(total=total, desc="pruning", unit="batch", smoothing=0, dynamic_ncols=True)

    def on_substep_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._bar is not None
        self._bar.update()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._bar is not None
        self._bar.update()

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._bar is not None
        self._bar.close()
        self._bar = None


class BeforeRestoration(Stage):
    """Measures each level before it is restored."""

    def __init__(self, view: LiveView) -> None:
        self.view = view
        self.perplexity: dict[float, float] = {}

    def __call__(self, level: Level) -> Level:
        self.perplexity[level.sparsity] = self.view.perplexities(level.model)["perplexity"]
        tqdm.write(f"{level_name(level.sparsity)} before restoration: {self.perplexity[level.sparsity]:.2f}")
        return level


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: list[dict[str, torch.Tensor]],
    *,
    config: GISPConfig,
    output_dir: Path,
    view: LiveView,
    restore: RestoreConfig | None,
) -> tuple[GISPPruner, dict[float, float]]:
    """The part to copy: an ordinary Trainer with one more callback. The steps share out ``blocks``.

    Returns:
        the pruner, and level -> perplexity before it was restored.
    """
    pruner = GISPPruner(config, output_dir=output_dir, evaluate=view.evaluate, restore=restore)
    before = BeforeRestoration(view)
    if restore is not None:  # for the table: your script needs no such stage
        pruner.stages.insert(1, before)
    view.follow(config.sparsity_levels)
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=config.num_steps,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=max(1, len(blocks) // (BATCH_SIZE * config.num_steps)),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=blocks, processing_class=tokenizer, callbacks=[pruner, view]
    )
    trainer.remove_callback(ProgressCallback)  # the view has a bar
    trainer.train()
    return pruner, before.perplexity


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    blocks: list[dict[str, torch.Tensor]],
    held_out: Mapping[str, torch.Tensor],
    output_dir: Path,
    config: GISPConfig,
    restore: RestoreConfig | None = None,
    one_shot: bool = False,
    prompt: str = PROMPT,
) -> list[dict[str, Any]]:
    """Prunes ``model`` and measures every level on its way; writes table and plots.

    Args:
        held_out: domain -> tokens, as `gisp_hf.evaluation.perplexity` takes them.
        restore: how to restore each level; None: not at all.
        one_shot: also remove all structures of each level at once from a copy, for comparison.

    Returns:
        One row a level, the unpruned model first.
    """
    copied = copy.deepcopy(model) if one_shot else None
    view = LiveView(tokenizer, held_out, prompt=prompt)
    dense: dict[str, Any] = {
        "level": "dense",
        "sparsity": 0.0,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "pruned": None,
        **view.measure(model, "dense"),
        "groups_removed": 0,
        "channels_removed": 0,
        "text": view.texts["dense"],
    }
    print(f"dense: perplexity {dense['perplexity']:.4f}")
    print(f"dense writes: {dense['text']!r}")
    print(f"\nPruning in {config.num_steps} steps of {len(blocks) // config.num_steps} blocks of text")
    pruner, before = prune(model, tokenizer, blocks, config=config, output_dir=output_dir, view=view, restore=restore)
    rows = [dense]
    trajectory = Trajectory.load(output_dir)
    for level in read_levels(output_dir):
        rows.append(
            {
                "level": level.name,
                "sparsity": trajectory.sparsity_at(trajectory.prefix(level.sparsity)),
                "parameters": level.parameters,
                "pruned": before.get(level.sparsity),
                **level.metrics,
                **removed_of(trajectory, level.sparsity),
                "text": view.texts[level.name],
                "seconds": view.seconds[level.name],
            }
        )
    if copied is not None:
        print("\nThe same score, all structures of a level at once")
        at_once = GISPConfig.from_dict({**config.to_dict(), "num_steps": 1})
        folder = output_dir / "one-shot"
        baseline, _ = prune(copied, tokenizer, blocks, config=at_once, output_dir=folder, view=view, restore=restore)
        for row, level in zip(rows[1:], pruner.level_metrics, strict=True):
            row["one_shot"] = baseline.level_metrics[level]["perplexity"]

    left_out = ([] if one_shot else ["one_shot"]) + ([] if restore else ["pruned"])
    columns = {key: heading for key, heading in COLUMNS.items() if key not in left_out}
    columns |= {} if restore else {"perplexity": "perplexity"}
    table = format_table([{"one_shot": None, **row} for row in rows], columns, formats={"sparsity": ".3f"})
    (output_dir / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (output_dir / "results.md").write_text(table + "\n", encoding="utf-8")
    plot(trajectory, rows, output_dir)
    print(f"\n{table}")
    return rows


def removed_of(trajectory: Trajectory, level: float) -> dict[str, int]:
    """How many structures of each kind a level lacks."""
    counts = {"attention": 0, "mlp": 0}
    for block, keep in zip(trajectory.layout.blocks, trajectory.kept(level)):
        counts[block.kind] += block.size - len(keep)
    return {"groups_removed": counts["attention"], "channels_removed": counts["mlp"]}


def plot(trajectory: Trajectory, rows: list[dict[str, Any]], output_dir: Path) -> None:
    dense, *pruned = rows
    series = {"pruned": [(row["sparsity"], row["perplexity"]) for row in pruned]}
    if pruned[0]["pruned"] is not None:
        series = {"restored": series["pruned"], "pruned": [(row["sparsity"], row["pruned"]) for row in pruned]}
    if "one_shot" in pruned[0]:
        series["one shot"] = [(row["sparsity"], row["one_shot"]) for row in pruned]
    plot_perplexity(series, output_dir / "perplexity.png", baselines={"dense": dense["perplexity"]})
    removed: dict[float, dict[str, list[float]]] = {}
    for level in trajectory.config.sparsity_levels:
        kinds: dict[str, list[float]] = {"attention groups": [], "MLP channels": []}
        for block, keep in zip(trajectory.layout.blocks, trajectory.kept(level)):
            kind = "attention groups" if block.kind == "attention" else "MLP channels"
            kinds[kind].append(1 - len(keep) / block.size)
        removed[level] = kinds
    plot_removed(removed, output_dir / "removed.png")
    # A step's loss is that of the model before its removals: it belongs to the sparsity of the step before.
    before = [0.0, *(step.sparsity for step in trajectory.steps)]
    losses = [
        {"step": step.step, "sparsity": sparsity, "loss": step.loss}
        for step, sparsity in zip(trajectory.steps, before)
        if step.loss is not None
    ]
    plot_loss(losses, output_dir / "loss.png", levels=trajectory.config.sparsity_levels)


def free_folder(folder: Path) -> Path:
    """``folder``, or the first of ``folder-2``, ``folder-3`` ... that is not there yet or empty. Nothing is deleted."""
    candidates = (folder if number == 1 else folder.with_name(f"{folder.name}-{number}") for number in count(1))
    return next(path for path in candidates if not path.exists() or not any(path.iterdir()))


def next_steps(folder: Path) -> str:
    """Where everything is and what to try next."""
    programs = os.path.relpath(Path(sys.executable).parent)
    generate = f"pipeline('text-generation', '{folder / 'sparsity-0.20'}')('{PROMPT}')"
    return f"""
Everything is in {folder}:
  sparsity-0.20 ...             checkpoints that from_pretrained loads, after `import gisp_hf`
  trajectory.*                  the order in which structures went
  results.md, results.json      the table above, with samples of text
  perplexity.png, removed.png, loss.png

Try next:
  {programs}/gisp-hf levels {folder}
  {programs}/gisp-hf card {folder} --level 0.2
  {programs}/python -c "import gisp_hf; from transformers import pipeline; print({generate})"
  make bench                    speed of the levels
  README.md, "Add it to your script": the same for a model and data of your own"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Prune SmolLM2-135M-Instruct to four nested levels and measure them.")
    parser.add_argument(
        "--output-dir", type=Path, help="must be new or empty (default: runs/quickstart, then runs/quickstart-2 ...)"
    )
    parser.add_argument("--num-steps", type=int, default=10, help="pruning steps up to 50 %%")
    parser.add_argument(
        "--num-blocks", type=int, default=16, help="calibration blocks of 128 tokens in each step, others each time"
    )
    parser.add_argument("--test-tokens", type=int, default=2048, help="held-out tokens of each domain for perplexity")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: the one that this machine is fast at"
    )
    parser.add_argument(
        "--restore-tokens", type=int, default=16384, help="tokens of the mixture for restoration; 0: none"
    )
    parser.add_argument("--one-shot", action="store_true", help="compare with removing all structures at once")
    options = parser.parse_args(argv)
    output_dir = options.output_dir or free_folder(FOLDER)
    if output_dir != FOLDER and options.output_dir is None:
        print(f"{FOLDER} holds the results of an earlier run; this one goes to {output_dir}")
    dtype = getattr(torch, options.dtype) if options.dtype else fast_dtype()
    print(f"{str(dtype).removeprefix('torch.')} weights ({describe_dtypes()})")
    start = time.perf_counter()
    model, tokenizer = load_smollm2(dtype)
    domains: Mapping[str, Domain] = load_domains()
    texts = ", ".join(f"{len(domain.calibration) + len(domain.held_out)} {name}" for name, domain in domains.items())
    print(
        f"SmolLM2-135M-Instruct, unpacked from 4 bits, and documents of three domains ({texts}): "
        f"{time.perf_counter() - start:.0f} s\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        # load_calibration, which restoration draws with, reads files
        data = write_mixture(domains, Path(folder)) if options.restore_tokens else None
        run_on(model, tokenizer, domains, options, output_dir, data)
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes\n{next_steps(output_dir)}")


def run_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: Mapping[str, Domain],
    options: argparse.Namespace,
    output_dir: Path,
    data: str | None,
) -> None:
    """The run that the options describe; ``data`` names the text for restoration."""
    run(
        model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu"),
        tokenizer,
        blocks=mixture_blocks(domains, tokenizer, length=128, count=options.num_blocks * options.num_steps),
        held_out={
            name: held_out_tokens(domain.held_out, tokenizer, count=options.test_tokens)
            for name, domain in domains.items()
        },
        output_dir=output_dir,
        config=GISPConfig(num_steps=options.num_steps, score_momentum=0.5),  # docs/ablations.md
        restore=None if data is None else RestoreConfig(data=data, tokens=options.restore_tokens),
        one_shot=options.one_shot,
    )


if __name__ == "__main__":
    main()
