"""What must hold before a Trainer may prune, and the state that its model is put in for the run."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments


class CalibrationMode:
    """Only what is scored has a gradient, and dropout is off; ``leave`` gives everything back as it was.

    Freezing the rest (embeddings, LM head, norms, protected layers) is what lets the backward pass end at the first
    layer that can be pruned.
    """

    def __init__(self, model: PreTrainedModel, scored: Iterable[str]) -> None:
        self.scored = set(scored)
        self.was_training = model.training
        self.use_cache: bool | None = getattr(model.config, "use_cache", None)  # the Trainer overwrites it
        self.flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.dropout: list[tuple[nn.Module, str, float]] = []
        self.require_gradients(model, self.scored)

    def require_gradients(self, model: nn.Module, names: Iterable[str]) -> None:
        """Gives exactly the named parameters a gradient."""
        wanted = set(names)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)

    def switch_off_dropout(self, model: nn.Module) -> None:
        """Sets every dropout probability to 0. The Trainer puts the model in train mode itself, before each batch."""
        for module in model.modules():
            attribute = "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "attention_dropout"
            value = getattr(module, attribute, None)
            if isinstance(value, float) and value > 0:
                self.dropout.append((module, attribute, value))
                setattr(module, attribute, 0.0)

    def leave(self, model: PreTrainedModel) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.flags.get(name, parameter.requires_grad))
            parameter.grad = None
        for module, attribute, value in self.dropout:
            setattr(module, attribute, value)
        self.dropout = []
        if self.use_cache is not None:
            model.config.use_cache = self.use_cache
        model.train(self.was_training)


def check_arguments(args: TrainingArguments) -> None:
    """Refuses ways of running whose gradients cannot be scored.

    Raises:
        ValueError: with what to do instead.
    """
    if args.fp16:
        raise ValueError(
            "fp16=True scales gradients up and skips steps that overflow, which breaks the scores; use bf16=True, or "
            "load the model in bfloat16"
        )
    if args.deepspeed:
        raise ValueError(
            "deepspeed is not supported: its gradients are not on the parameters; use accelerate launch with DDP or "
            "FSDP2, or a single process"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would be nn.DataParallel; start with `accelerate launch`, or make one "
            "GPU visible by CUDA_VISIBLE_DEVICES=0"
        )
    checkpointing = args.activation_checkpointing_kwargs
    if args.activation_checkpointing and isinstance(checkpointing, dict) and checkpointing.get("use_reentrant"):
        raise ValueError(
            "reentrant activation checkpointing drops the gradients behind frozen embeddings; set "
            "activation_checkpointing_kwargs={'use_reentrant': False}"
        )


def check_model(model: PreTrainedModel) -> None:
    """Refuses models whose own weights have no gradients.

    Raises:
        ValueError: with what to do instead.
    """
    if "PeftModel" in {cls.__name__ for cls in type(model).__mro__} or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model has PEFT adapters, which would hide its own weights from the scores; call merge_and_unload() "
            "first, or prune the base model and train adapters on a pruned level"
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "the model is quantized, and quantized weights have no gradients; load it in bfloat16, prune, and quantize "
            "the pruned level"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_inference() or not parameter.is_floating_point():
            raise ValueError(
                f"{name} cannot have a gradient (dtype {parameter.dtype}, made under inference_mode: "
                f"{parameter.is_inference()}); load the model in bfloat16 or float32, outside torch.inference_mode()"
            )


def check_run_length(
    args: TrainingArguments, state: TrainerState, *, num_steps: int, passes: int, dataloader: Any
) -> None:
    """Refuses a run that is too short, has no data, or would show the passes of one step different data.

    Args:
        num_steps: pruning steps.
        passes: optimizer steps that make up one pruning step.

    Raises:
        ValueError: with the numbers that would do.
    """
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    try:
        examples = len(dataloader.dataset)
    except (AttributeError, TypeError):  # a stream
        examples = None
    if examples == 0:
        raise ValueError("the training data set is empty; pruning needs calibration examples")
    needed = num_steps * passes
    if state.max_steps < needed:
        size = f" ({examples} examples, {per_step} per step, {args.num_train_epochs:g} epochs)" if examples else ""
        each = f" of {passes} passes each" if passes > 1 else ""
        raise ValueError(
            f"{num_steps} pruning steps{each} were asked for, but this run has only {state.max_steps}{size}: set "
            f"TrainingArguments(max_steps={needed}), or GISPConfig(num_steps={state.max_steps // passes})"
        )
    if passes > 1 and (examples is None or len(dataloader) != args.gradient_accumulation_steps):
        raise ValueError(
            f"layer_groups={passes} goes over the same data {passes} times in each step, so that one optimizer step "
            f"must be one epoch; {examples or 'a stream of'} examples at {per_step} per step are not. Give "
            f"{per_step} examples, or set gradient_accumulation_steps to the number of batches in the data set"
        )
