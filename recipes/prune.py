"""Prune any supported causal language model on text, questions or worked answers, on one process or many.

    python recipes/prune.py --model_name HuggingFaceTB/SmolLM2-135M --data wikitext2 --output_dir runs/smollm2
    python recipes/prune.py recipes/llama-2-7b/prune.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/prune.py recipes/llama-2-7b/prune.yaml

Options are those below and all of TrainingArguments, on the command line or in one YAML file; options after the file
override it. One pruning step uses per_device_train_batch_size x gradient_accumulation_steps x processes sequences. With
--objective completion or margin it uses all that were drawn: the number of micro-batches is set to what that takes.
Hardware and time: see the header of the YAML files. A killed run goes on with --resume_from_checkpoint true, if it was
started with --save_strategy steps --save_steps 1.
"""

import sys
from dataclasses import dataclass, field, fields
from typing import Any

import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from gisp_hf import GISPConfig, GISPPruner
from gisp_hf.data import load_calibration


@dataclass
class PruneArguments:
    """What to prune, on which text, how far."""

    model_name: str = field(metadata={"help": "Hub id or folder of the model."})
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the model."})
    dtype: str = field(default="bfloat16", metadata={"help": "dtype of the weights: bfloat16 or float32."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    data: str = field(
        default="c4",
        metadata={
            "help": "c4, wikitext2, cmqa, gsm8k, owner/name[:config] on the Hub, or a .jsonl, .parquet or .txt file."
        },
    )
    objective: str = field(
        default="language_modeling", metadata={"help": "language_modeling, completion (loss on answers) or margin."}
    )
    data_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the data set."})
    block_length: int = field(
        default=256, metadata={"help": "Tokens in a calibration sequence; the most, for answers."}
    )
    num_blocks: int = field(default=2000, metadata={"help": "Sequences in all; times block_length, the budget."})
    sparsity_levels: list[float] = field(
        default_factory=lambda: [0.2, 0.3, 0.4, 0.5], metadata={"help": "Levels to save, increasing."}
    )
    num_steps: int = field(default=80, metadata={"help": "Pruning steps up to the highest level."})
    schedule: str = field(default="linear", metadata={"help": "linear, cosine or exponential."})
    normalization: str = field(default="params", metadata={"help": "params (Eq. 9), reference or none."})
    prune: str = field(default="both", metadata={"help": "both, heads or channels."})
    protect_first: float = field(default=0.1, metadata={"help": "First layers kept whole: fraction or count."})
    protect_last: float = field(default=1, metadata={"help": "Last layers kept whole: fraction or count."})
    channel_multiple: int = field(default=1, metadata={"help": "Channels per layer are a multiple of this."})
    layer_passes: int = field(default=1, metadata={"help": "Score the layers in this many passes, to save memory."})
    levels_dir: str | None = field(default=None, metadata={"help": "Where levels go; output_dir/levels by default."})
    push_levels_to: str | None = field(default=None, metadata={"help": "Hub repository for the levels, owner/name."})


def parse(argv: list[str]) -> tuple[PruneArguments, TrainingArguments]:
    """The options of a YAML file, if the first argument names one, and then of the command line."""
    defaults: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    if argv and argv[0].endswith((".yaml", ".yml")):
        with open(argv[0], encoding="utf-8") as file:
            defaults |= yaml.safe_load(file)
        argv = argv[1:]
    parser = HfArgumentParser([PruneArguments, TrainingArguments])
    known = {f.name for cls in (PruneArguments, TrainingArguments) for f in fields(cls)}
    if unknown := sorted(set(defaults) - known):
        parser.error(f"unknown options in the YAML file: {', '.join(unknown)}")
    parser.set_defaults(**defaults)
    for action in parser._actions:  # an option that the file gives need not be on the command line
        action.required = action.required and action.dest not in defaults
    return parser.parse_args_into_dataclasses(argv)


def main(argv: list[str]) -> GISPPruner:
    options, args = parse(argv)
    names = {f.name for f in fields(GISPConfig)} & {f.name for f in fields(PruneArguments)}
    config = GISPConfig.from_dict({name: getattr(options, name) for name in names})
    if args.max_steps < 0:
        args.max_steps = config.num_steps * options.layer_passes

    tokenizer = AutoTokenizer.from_pretrained(options.model_name, revision=options.model_revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # blocks are full: nothing is ever padded
    calibration = load_calibration(
        options.data,
        tokenizer,
        objective=options.objective,
        tokens=options.num_blocks * options.block_length,
        block_size=options.block_length,
        seed=args.seed,
        revision=options.data_revision,
    )
    answers = options.objective != "language_modeling"
    if answers:  # how many the budget holds depends on their lengths
        at_once = args.per_device_train_batch_size * args.world_size
        args.gradient_accumulation_steps = -(-len(calibration.dataset) // at_once)
    model = AutoModelForCausalLM.from_pretrained(
        options.model_name,
        revision=options.model_revision,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
    )
    pruner = GISPPruner(
        config,
        output_dir=options.levels_dir or f"{args.output_dir}/levels",
        layer_passes=options.layer_passes,
        base_model=options.model_name,
        base_revision=options.model_revision,
        calibration=calibration.provenance,
        hub_model_id=options.push_levels_to,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=calibration.dataset,
        data_collator=calibration.collator,
        compute_loss_func=calibration.loss if answers else None,  # else the model's own, which needs less memory
        processing_class=tokenizer,
        callbacks=[pruner],
    )
    trainer.remove_callback(PrinterCallback)  # GISPPruner prints a line per step; one is enough
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=resume == "true" or (resume if resume != "false" else None))
    return pruner


if __name__ == "__main__":
    main(sys.argv[1:])
