"""Prune any supported causal language model on text, questions or worked answers, on one process or many.

    python recipes/prune.py --model_name HuggingFaceTB/SmolLM2-135M --data wikitext2 --output_dir runs/smollm2
    python recipes/prune.py recipes/llama-2-7b/prune.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/prune.py recipes/llama-2-7b/prune.yaml
    python recipes/prune.py --model_name HuggingFaceTB/SmolLM2-135M-Instruct --data prompts.jsonl --objective self \
        --method gisp-activation --regenerate_every 0.1 --output_dir runs/own

Options are those below, the fields of GISPConfig and all of TrainingArguments, on the command line or in one YAML file;
options after the file override it. One pruning step uses per_device_train_batch_size x gradient_accumulation_steps x
processes sequences. With --objective completion, margin or self it uses all that were drawn: the number of
micro-batches is set to what that takes. Hardware and time: see the header of the YAML files. A killed run goes on with
--resume_from_checkpoint true, if it was started with --save_strategy steps --save_steps 1.
"""

import sys
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Any, get_type_hints

import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from gisp_hf import GISPConfig, GISPPruner, prune
from gisp_hf.data import AnswerSettings, load_calibration
from gisp_hf.models.dtype import fast_dtype
from gisp_hf.training.regenerate import RegenerateAnswers


@dataclass
class PruneArguments:
    """What to prune, on which text, how far."""

    model_name: str | None = field(default=None, metadata={"help": "Hub id or folder of the model (required)."})
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the model."})
    dtype: str = field(
        default="auto", metadata={"help": "dtype of the weights: bfloat16, float32, or the faster of them (auto)."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    data: str = field(
        default="c4:0.5,gsm8k:0.25,cmqa:0.25",  # one domain alone costs all others: docs/compare.md
        metadata={
            "help": "c4, wikitext2, cmqa, gsm8k, owner/name[:config] on the Hub, a .jsonl, .parquet or .txt file, or a "
            "mixture of these with their shares of the tokens."
        },
    )
    objective: str = field(
        default="language_modeling",
        metadata={"help": "language_modeling, completion (loss on answers), margin, or self (loss on own answers)."},
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Most tokens of an own answer (--objective self)."})
    regenerate_every: float = field(
        default=0.0,
        metadata={"help": "Sparsity after which the pruned model answers anew (--objective self); 0: never."},
    )
    data_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the data set."})
    block_length: int = field(
        default=256, metadata={"help": "Tokens in a calibration sequence; the most, for answers."}
    )
    num_blocks: int = field(default=2000, metadata={"help": "Sequences in all; times block_length, the budget."})
    layer_passes: int = field(
        default=1,
        metadata={"help": "Score the layers in this many passes, to save memory.", "aliases": ["--layer_groups"]},
    )
    levels_dir: str | None = field(default=None, metadata={"help": "Where levels go; output_dir/levels by default."})
    push_levels_to: str | None = field(default=None, metadata={"help": "Hub repository for the levels, owner/name."})


def _option(name: str) -> tuple[str, Any, Any]:
    """A field of GISPConfig as an option: lists in place of tuples, ``kind=count`` words in place of a dict."""
    (found,) = (f for f in fields(GISPConfig) if f.name == name)
    default = found.default_factory() if found.default_factory is not MISSING else found.default
    if isinstance(default, tuple):
        return name, list[float], field(default_factory=lambda: list(default), metadata=found.metadata)
    if isinstance(default, dict):
        return name, list[str], field(default_factory=list, metadata=found.metadata)
    return name, get_type_hints(GISPConfig)[name], field(default=default, metadata=found.metadata)


# The options of this recipe, and every field of GISPConfig.
PruneOptions = make_dataclass("PruneOptions", [_option(f.name) for f in fields(GISPConfig)], bases=(PruneArguments,))


def config_of(options: Any) -> GISPConfig:
    values = {f.name: getattr(options, f.name) for f in fields(GISPConfig)}
    if not isinstance(values["minimum_kept"], dict):  # as in the YAML file
        words = [word.partition("=") for word in values["minimum_kept"]]
        if odd := [kind for kind, _, count in words if not count.isdecimal()]:
            raise ValueError(f"minimum_kept needs words such as attention=2 mlp=64, got {', '.join(odd)}")
        values["minimum_kept"] = {kind: int(count) for kind, _, count in words}
    return GISPConfig.from_dict(values)


def parse(argv: list[str]) -> tuple[Any, TrainingArguments]:
    """The options of a YAML file, if the first argument names one, and then of the command line."""
    defaults: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    if argv and argv[0].endswith((".yaml", ".yml")):
        with open(argv[0], encoding="utf-8") as file:
            defaults |= yaml.safe_load(file)
        if "layer_groups" in defaults:  # the name in version 0.1
            defaults["layer_passes"] = defaults.pop("layer_groups")
        argv = argv[1:]
    parser = HfArgumentParser([PruneOptions, TrainingArguments])
    known = {f.name for cls in (PruneOptions, TrainingArguments) for f in fields(cls)}
    if unknown := sorted(set(defaults) - known):
        parser.error(f"unknown options in the YAML file: {', '.join(unknown)}")
    parser.set_defaults(**defaults)
    options, args = parser.parse_args_into_dataclasses(argv)
    if options.model_name is None:
        parser.error("give --model_name, or a YAML file that has it")
    return options, args


def load_model(options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        options.model_name,
        revision=options.model_revision,
        dtype=fast_dtype() if options.dtype == "auto" else options.dtype,
        attn_implementation=options.attn_implementation,
    )


def main(argv: list[str]) -> GISPPruner:
    options, args = parse(argv)
    config = config_of(options)
    own = options.objective == "self"
    if options.regenerate_every and not own:
        raise ValueError(
            f"regenerate_every={options.regenerate_every:g} lets the model answer anew, and objective "
            f"{options.objective!r} has no answers of its own; use --objective self, or leave it out"
        )
    if args.max_steps < 0:
        args.max_steps = config.num_steps * options.layer_passes

    tokenizer = AutoTokenizer.from_pretrained(options.model_name, revision=options.model_revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # blocks are full: nothing is ever padded
    model = load_model(options) if own else None  # it answers the prompts
    kept = f"{args.output_dir}/answers"
    # With several processes the first one answers, and the others read what it has written.
    with args.main_process_first(local=False, desc="calibration data") if own else nullcontext():
        calibration = load_calibration(
            options.data,
            tokenizer,
            objective=options.objective,
            tokens=options.num_blocks * options.block_length,
            block_size=options.block_length,
            seed=args.seed,
            revision=options.data_revision,
            model=None if model is None else model.to(args.device),
            answers=AnswerSettings(options.max_new_tokens, cache_dir=kept) if own else None,
        )
    answers = options.objective != "language_modeling"
    if answers:  # how many the budget holds depends on their lengths
        at_once = args.per_device_train_batch_size * args.world_size
        args.gradient_accumulation_steps = -(-len(calibration.dataset) // at_once)
    model = load_model(options) if model is None else model
    every, again = options.regenerate_every, []
    if every:
        again.append(RegenerateAnswers(None, calibration.dataset, every=every, folder=kept))  # type: ignore[arg-type]
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=calibration.dataset,
        data_collator=calibration.collator,
        compute_loss_func=calibration.loss if answers else None,  # else the model's own, which needs less memory
        processing_class=tokenizer,
        callbacks=again,
    )
    trainer.remove_callback(PrinterCallback)  # GISPPruner prints a line per step; one is enough
    resume = args.resume_from_checkpoint
    return prune(
        trainer,
        config,
        options.levels_dir or f"{args.output_dir}/levels",
        resume_from_checkpoint=resume == "true" or (resume if resume != "false" else None),
        layer_passes=options.layer_passes,
        base_model=options.model_name,
        base_revision=options.model_revision,
        calibration=calibration.provenance,
        hub_model_id=options.push_levels_to,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
