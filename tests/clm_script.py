"""A script in the shape of Transformers' language-modelling example: arguments, text file, blocks, Trainer, evaluation.

The lines that end in ``# pruning`` are what a user adds. `tests/test_clm_script.py` runs it with them and without.
"""

import math
import sys
from dataclasses import dataclass, field
from itertools import chain

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from gisp_hf import GISPPruner  # pruning


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "folder or Hub id"})


@dataclass
class DataArguments:
    train_file: str = field(metadata={"help": "a text file"})
    validation_file: str = field(metadata={"help": "a text file"})
    block_size: int = field(default=16, metadata={"help": "tokens in a block"})


def main(arguments: list[str]) -> Trainer:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(arguments)
    set_seed(training_args.seed)
    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    raw = load_dataset("text", data_files=files)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))

    def tokenize(examples):
        return tokenizer(examples["text"], return_token_type_ids=False)

    def group(examples):
        joined = {key: list(chain(*examples[key])) for key in examples}
        total = len(joined["input_ids"]) // data_args.block_size * data_args.block_size
        size = data_args.block_size
        result = {key: [ids[i : i + size] for i in range(0, total, size)] for key, ids in joined.items()}
        result["labels"] = result["input_ids"].copy()
        return result

    with training_args.main_process_first(desc="tokens and blocks"):
        blocks = raw.map(tokenize, batched=True, remove_columns=["text"]).map(group, batched=True)

    def keep_predictions(logits, labels):
        return logits.argmax(dim=-1)

    def accuracy(predictions):
        hits = predictions.predictions[:, :-1] == predictions.label_ids[:, 1:]
        return {"accuracy": float(hits.mean())}

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=blocks["train"] if training_args.do_train else None,
        eval_dataset=blocks["validation"] if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=keep_predictions,
    )
    pruner = GISPPruner({"sparsity_levels": [0.2, 0.4], "num_steps": training_args.max_steps})  # pruning
    trainer.add_callback(pruner)  # pruning
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.create_model_card(tasks="text-generation")
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
