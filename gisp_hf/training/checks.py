"""Refusals before a run: unsupported arguments, models and data."""

import logging
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from gisp_hf.config import GISPConfig
from gisp_hf.criteria.base import Needs
from gisp_hf.models import discover
from gisp_hf.models.dtype import slow_factor
from gisp_hf.models.layout import Layout, kind_of
from gisp_hf.models.shards import plain_parameters
from gisp_hf.models.surgery import empty_copy
from gisp_hf.models.wrapped import has_adapters, is_plain, quantization_of
from gisp_hf.pruning.selection import minimum_kept
from gisp_hf.training.distributed import check_connected
from gisp_hf.training.mode import is_being_pruned

logger = logging.getLogger(__name__)

# Quantizations whose layers hand gradients of activations through; tests run them.
WITH_BACKWARD = ("bitsandbytes", "torchao")


def check_arguments(args: TrainingArguments, needs: Needs = "weight_gradients") -> None:
    """Refuses ways of running whose gradients cannot be scored.

    Args:
        needs: what the method's criterion reads.

    Raises:
        ValueError: with what to do instead.
    """
    check_connected(args)
    if args.fp16:
        raise ValueError(
            "fp16=True scales gradients up and skips steps that overflow, which breaks the scores; use bf16=True, or "
            "load the model in bfloat16"
        )
    if needs in ("activations", "activation_gradients") and args.torch_compile:
        raise ValueError(
            "torch_compile=True leaves out the hooks through which this method watches activations; do not set it in a "
            "pruning run, or take a method of weights or their gradients (gisp, one-shot, magnitude)"
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
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True starts the run again with another batch size when memory runs out, and a model "
            "that has lost structures cannot start again; set per_device_train_batch_size, and "
            "gradient_accumulation_steps for the number of examples in a step"
        )
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            f"neftune_noise_alpha={args.neftune_noise_alpha:g} puts noise into the embeddings, which changes the "
            "order; leave it out of a pruning run"
        )
    if args.save_strategy == SaveStrategy.BEST or args.load_best_model_at_end:
        raise ValueError(
            "a pruning run has no best checkpoint, since every step removes more; use save_strategy='steps', "
            "'epoch' or 'no', and load_best_model_at_end=False"
        )


def check_model(model: PreTrainedModel, needs: Needs = "weight_gradients", *, sharded: bool = False) -> None:
    """Refuses models that have not got what the scores are made of.

    Args:
        needs: of the criterion. Scores of activations allow quantized weights and adapters.
        sharded: whether FSDP cuts the parameters into rows.

    Raises:
        ValueError: with what to do instead.
    """
    of_activations = needs.startswith("activation")
    if has_adapters(model) and not of_activations:
        raise ValueError(
            "the model has PEFT adapters, which would hide its own weights from the scores; call merge_and_unload() "
            "first, prune the base model and train adapters on a pruned level, or score activations: "
            "GISPConfig(method='gisp-activation')"
        )
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"{type(model.active_peft_config).__name__} puts tokens of its own before the text, and scores would count "
            "them; use the model without it, or adapters inside the layers, such as LoRA"
        )
    quantization = quantization_of(model)
    if quantization is not None and not of_activations:
        raise ValueError(
            "the model is quantized, and quantized weights have no gradients; load it in bfloat16, prune, and quantize "
            "the pruned level, or score activations: GISPConfig(method='gisp-activation')"
        )
    if quantization not in (None, *WITH_BACKWARD) and needs == "activation_gradients":
        raise ValueError(
            f"the model is quantized by {quantization}, whose backward pass is not tested here; quantize it by "
            f"{' or '.join(WITH_BACKWARD)}, or load it in bfloat16"
        )
    if quantization is not None and sharded:
        raise ValueError(
            f"the model is quantized by {quantization}, and FSDP would cut its packed weights into rows; use DDP or a "
            "single process, or load it in bfloat16"
        )
    if not is_plain(model):
        return
    for name, parameter in plain_parameters(model):
        if parameter.is_inference() or not parameter.is_floating_point():
            raise ValueError(
                f"{name} cannot have a gradient (dtype {parameter.dtype}, made under inference_mode: "
                f"{parameter.is_inference()}); load the model in bfloat16 or float32, outside torch.inference_mode()"
            )


def check_sizes(model: PreTrainedModel, layout: Layout) -> None:
    """Refuses a model whose layers are not of the size that its config says.

    Args:
        layout: read off the weights of the model (`discover`).

    Raises:
        ValueError: with the first block that differs.
    """
    kinds = [kind.name for kind in layout.kinds]
    described = {block.name: block.size for block in discover(empty_copy(model), kinds).blocks}
    for block in layout.blocks:
        if described.get(block.name) != block.size:
            why = "another GISPPruner is pruning this model already, or was stopped: " if is_being_pruned(model) else ""
            raise ValueError(
                f"{why}the weights of the model do not match its config: {block.name} has {block.size} "
                f"{kind_of(block.kind).plural}, the config says {described.get(block.name)}. A run that was stopped "
                "leaves such a model until the pruner's close(); load the model anew with from_pretrained"
            )


def note_of_few_groups(layout: Layout, config: GISPConfig) -> str | None:
    """What to tell at the start of a run in which at most half of the attention can go; None if more can.

    A layer keeps one key/value group at least: with one or two groups, none or half of its attention can go.
    """
    numbers = layout.of_kind("attention")
    if not numbers or not config.prunes("attention"):
        return None
    minimum = minimum_kept(layout, config)
    blocks = [(layout.blocks[number], minimum[number]) for number in numbers]
    whole = sum(block.size * block.cost for block, _ in blocks)
    can_go = sum((block.size - least) * block.cost for block, least in blocks)
    most = max(block.size for block, _ in blocks)
    if most > 2:
        return None
    return (
        f"GISP: layers of this model have {most} key/value group{'s' if most > 1 else ''}, and each keeps one: "
        f"{can_go / whole:.0%} of the attention's parameters can go, {can_go / layout.total:.1%} of the decoder "
        f"layers'. MLP channels bear the rest. GISPConfig(attention_unit='query') removes query heads instead"
    )


def check_run_length(
    args: TrainingArguments, state: TrainerState, *, num_steps: int, passes: int, dataloader: Any
) -> None:
    """Refuses a run that is too short, has no data, or whose steps would see different amounts of it.

    Args:
        num_steps: pruning steps.
        passes: optimizer steps that make up one pruning step.

    Raises:
        ValueError: with the numbers that would do.
    """
    at_once = args.per_device_train_batch_size * args.world_size
    per_step = at_once * args.gradient_accumulation_steps
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
            f"layer_passes={passes} goes over the same data {passes} times in each step, so that one optimizer step "
            f"must be one epoch; {examples or 'a stream of'} examples at {per_step} per step are not. Give "
            f"{per_step} examples, or set gradient_accumulation_steps to the number of batches in the data set"
        )
    if examples is not None:
        _check_leftovers(args, examples=examples, at_once=at_once, per_step=per_step, steps=needed)


def _check_leftovers(args: TrainingArguments, *, examples: int, at_once: int, per_step: int, steps: int) -> None:
    """Refuses a data set whose last step of an epoch is smaller than the others: its removals would be decided on less.

    The Trainer ends an epoch with whatever is left: 130 examples at 128 per step give steps of 128, 2, 128, 2 ...
    """
    used = examples // at_once * at_once if args.dataloader_drop_last else examples
    whole, left = divmod(used, per_step)
    if not whole or not left or steps <= whole:  # one smaller step is the whole data set, each time
        return
    fitting = " or ".join(str(number * per_step) for number in (whole, whole + 1))
    raise ValueError(
        f"{used} examples at {per_step} per step leave {left} for the last step of an epoch, and its removals would be "
        f"decided on these alone: give {fitting} examples (dataset.select(range(...))), or choose "
        "per_device_train_batch_size and gradient_accumulation_steps so that a step takes all or divides them"
    )


def warn_of_slow_dtype(model: PreTrainedModel) -> None:
    """Warns of a dtype that this processor multiplies slowly."""
    factor = slow_factor(model.dtype, model.device)
    if factor > 2:
        logger.warning(
            "%s products run %.0f times slower than float32 ones on this processor; load the model with "
            "dtype=torch.float32",
            str(model.dtype).removeprefix("torch."),
            factor,
        )
