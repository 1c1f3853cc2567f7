"""The numbers of a pruning step, where people look for them: the log, the trackers, the notebook, the terminal."""

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from gisp_hf.models.layout import kind_of
from gisp_hf.pruning.trajectory import Step
from gisp_hf.upstream import add_to_notebook, handler_of


def move_before_trackers(callback: TrainerCallback, handler: CallbackHandler | None) -> None:
    """Lets this callback see logs first, so that what it adds to them reaches the trackers of ``report_to``."""
    if handler is not None:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(1, callback)  # after DefaultFlowCallback, which decides what is logged


def log_step(
    callback: TrainerCallback,
    step: Step,
    *,
    num_steps: int,
    sparsity_of_unpruned: float | None,
    args: TrainingArguments,
    state: TrainerState,
    logs: dict[str, Any],
) -> None:
    """Adds the numbers of a step to the Trainer's logs, and writes them to the terminal where no bar shows them.

    Args:
        sparsity_of_unpruned: counted from the unpruned model, if the base is a pruned one.
        logs: what the Trainer is about to hand to the trackers and the progress bar.
    """
    numbers: dict[str, float] = {"sparsity": step.sparsity, "decoder_parameters": step.parameters}
    if sparsity_of_unpruned is not None:
        numbers["sparsity_of_unpruned"] = sparsity_of_unpruned
    numbers |= {f"{kind_of(kind).plural}_removed": count for kind, count in step.removed.items()}
    _add(numbers, [logs, *state.log_history[-1:]] if _is_logged(state) else [logs])
    add_to_notebook(handler_of(callback), {"Sparsity": f"{step.sparsity:.4f}"})
    if state.is_world_process_zero and args.disable_tqdm:  # the Trainer's bar shows the numbers otherwise
        counts = " and ".join(f"{count:,} {kind_of(kind).plural}" for kind, count in step.removed.items())
        tqdm.write(
            f"GISP step {step.step}/{num_steps}: sparsity {step.sparsity:.4f}, loss {step.loss:.4f}, "
            f"removed {counts}, {step.parameters / 1e6:,.1f}M parameters left in the decoder layers"
        )


def _is_logged(state: TrainerState) -> bool:
    """Whether the last entry of the history is that of this step."""
    return bool(state.log_history) and state.log_history[-1].get("step") == state.global_step


def _add(numbers: dict[str, float], entries: Sequence[dict[str, Any]]) -> None:
    for entry in entries:
        entry.update(numbers)
        if not entry.get("grad_norm"):  # gradients were scored and freed before the Trainer took their norm
            entry.pop("grad_norm", None)
